"""The words of the templates, from what is deployed. A word that is none of these is a fragment of that name.

Templates: text files with words between @, as YAML that can be read as it is.

A word that stands alone in its line is a block: its lines take the line's indentation, and the line disappears where
there are none. Every other word is replaced where it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from spach_deploy.packaging.kubernetes.deployment import (
    PROBE_SECONDS,
    Deployment,
    is_version_compatible,
    listed,
    quantity,
)
from spach_deploy.packaging.kubernetes.golden_pack import allows_tf32
from spach_deploy.packaging.triton.options import Batching

PILLOW = "11.3.0"
"""For every Python that Triton's images have; its resizing is what it has been for years."""

_QUEUE_FACTOR = 10
_PULL_SECONDS = 600  # an image of Triton has 10 GB


class TemplateContext(Mapping[str, str]):
    """Every word there is; fragments are rendered when they are asked for."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = dict(given)

    def __getitem__(self, word: str) -> str:
        if word in self._given:
            return self._given[word]
        stem = word.lower().replace("_", "-")
        found = [file.name for file in sorted((TEMPLATES / "fragments").glob(f"{stem}.*"))]
        if not found:
            raise KeyError(word)
        return render(read_template(f"fragments/{found[0]}"), self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def also(self, **words: str) -> TemplateContext:
        """These and others."""
        return TemplateContext({**self._given, **words})


def template_context(deployed: Deployment, image_tag: str, batch_sizes: Sequence[int] = ()) -> TemplateContext:
    """The words for `deployed`; NAMESPACE is an overlay's. `batch_sizes`: of the golden check."""
    return TemplateContext(
        {
            **_model_words(deployed),
            **_image_words(deployed, image_tag),
            **_size_words(deployed),
            **_conditional(deployed),
            "BATCHES": listed(str(size) for size in batch_sizes),
            **(_kserve_words(deployed) if deployed.options.kserve else _plain_words(deployed)),
        }
    )


def _model_words(deployed: Deployment) -> dict[str, str]:
    model = deployed.model
    version = model.versions[-1]
    return {
        "NAME": deployed.name,
        "MODEL": deployed.title,
        "TRITON_MODEL": model.name,
        "SERVES": deployed.serves,
        "DESCRIPTION": f"{deployed.title} in {model.facts.precision.value}: {deployed.serves}, in Triton "
        f"{deployed.image.release}",
        "ARTIFACT_SHA256": version.bundle.manifest.files[version.artifact.name].sha256,
        "MIN_REPLICAS": str(deployed.options.replicas.min),
        "MAX_REPLICAS": str(deployed.options.replicas.max),
    }


def _image_words(deployed: Deployment, image_tag: str) -> dict[str, str]:
    return {
        "TRITON_IMAGE": deployed.image.reference,
        "NOTES_URL": deployed.image.notes,
        "CARRIES": f"{deployed.carries}.",
        "CUDA": deployed.image.cuda,
        "IMAGE_NAME": deployed.image_name,
        "IMAGE_TAG": image_tag,
        "PILLOW": PILLOW,
    }


def _size_words(deployed: Deployment) -> dict[str, str]:
    sizes, delay = deployed.sizes, Batching().queue_delay_us
    return {
        "MEGABYTES": f"{sizes.artifact_bytes / 1e6:.1f}",
        "MEMORY": quantity(sizes.memory_bytes),
        "SHM": quantity(sizes.shm_bytes),
        "STARTUP_SECONDS": str(sizes.startup_seconds),
        "STARTUP_ARITHMETIC": sizes.arithmetic,
        "STARTUP_PROBES": str(sizes.startup_probes),
        "PROBE_SECONDS": str(PROBE_SECONDS),
        # The model is loaded twice: for the golden check, then for the traffic.
        "PROGRESS_SECONDS": str(_PULL_SECONDS + 2 * sizes.startup_seconds),
        "QUEUE_US": str(_QUEUE_FACTOR * delay),
        "QUEUE_SENTENCE": f"Ten times the {delay} us that dynamic batching may wait for company.",
    }


def _conditional(deployed: Deployment) -> dict[str, str]:
    """Blocks that are there or not; a fragment is there unless a word says otherwise."""
    model = deployed.model
    words = {
        "GPU_AFFINITY": gpu_affinity(deployed.gpus, any_newer=_is_hardware_compatible(deployed)),
        "VERSION_COMPATIBLE": "- --backend-config=tensorrt,version-compatible=true"
        if is_version_compatible(model)
        else "",
        "REQUIREMENTS": _requirements(deployed),
    }
    if allows_tf32(model):
        words["TF32"] = ""
    if not deployed.options.ensemble:
        words["STEP_PACKAGES"] = ""
    return words


def _is_hardware_compatible(deployed: Deployment) -> bool:
    return deployed.model.bundle.manifest.engine.hardware_compatible


def gpu_affinity(gpus: tuple[str, ...], *, any_newer: bool) -> str:
    """Node affinity for GPUs such as sm90; empty for none. `any_newer`: for Ampere (sm80) and all that came later."""
    if not gpus:
        return ""
    lines = [
        "# Labels of NVIDIA's GPU feature discovery: the plan was built for these GPUs and loads on no other.",
        "affinity:",
        "  nodeAffinity:",
        "    requiredDuringSchedulingIgnoredDuringExecution:",
        "      nodeSelectorTerms:",
    ]
    if any_newer:
        return "\n".join([*lines, *_term("Gt", "7")])
    return "\n".join([*lines, *(line for gpu in gpus for line in _term("In", gpu[2:-1], gpu[-1]))])


def _term(operator: str, major: str, minor: str | None = None) -> list[str]:
    labels = [("major", operator, major), *([] if minor is None else [("minor", "In", minor)])]
    lines = ["        - matchExpressions:"]
    for label, how, value in labels:
        lines += [
            f"            - key: nvidia.com/gpu.compute.{label}",
            f"              operator: {how}",
            f'              values: ["{value}"]',
        ]
    return lines


def _requirements(deployed: Deployment) -> str:
    image = deployed.image
    lines = [
        f"- NVIDIA's device plugin (`nvidia.com/gpu`), and on the nodes a driver for CUDA {image.cuda}, see",
        f"  {image.notes}",
        "- for autoscaling, Prometheus and prometheus-adapter with the rule in monitoring/prometheus-adapter.yaml",
        "- a network plugin that enforces network policies, or they are only words",
    ]
    if deployed.gpus:
        gpus = listed(deployed.gpus)
        lines.append(f"- nodes that NVIDIA's GPU feature discovery has labelled: the plan was built for {gpus}")
    if deployed.options.kserve:
        lines.append("- KServe; RawDeployment (Standard) mode needs no Knative")
    return "\n".join(lines)


def _plain_words(deployed: Deployment) -> dict[str, str]:
    return {
        "SELECTOR": f"app.kubernetes.io/name: {deployed.name}",
        "HTTP_PORT": "8000",
        "GRPC_PORT": "8001",
        "DEPLOYMENT": deployed.name,
        "WORKLOAD": "Deployment",
        "SPREAD_PATH": "/spec/template/spec/topologySpreadConstraints/-",
        "KSERVE_TITLE": "",
        "KSERVE_STAGING_PATCH": "",
    }


def _kserve_words(deployed: Deployment) -> dict[str, str]:
    """KServe names what it makes NAME-predictor, and labels its pods so."""
    predictor = f"{deployed.name}-predictor"
    return {
        "SELECTOR": f"serving.kserve.io/inferenceservice: {deployed.name}",
        "HTTP_PORT": "8080",
        "GRPC_PORT": "9000",
        "DEPLOYMENT": predictor,
        "WORKLOAD": "InferenceService",
        "SPREAD_PATH": "/spec/predictor/topologySpreadConstraints/-",
        "KSERVE_TITLE": ", by KServe",
        "WORKLOAD_FILES": read_template("fragments/kserve-files.md"),
        "ASK": render(read_template("fragments/kserve-ask.md"), _model_words(deployed)),
    }


TEMPLATES = Path(__file__).with_name("templates")

_WORD = re.compile(r"@([A-Z][A-Z0-9_]*)@")
_BLOCK = re.compile(r"( *)@([A-Z][A-Z0-9_]*)@")


def read_template(name: str) -> str:
    """A template's text."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def render(text: str, words: Mapping[str, str]) -> str:
    """`text` with every word replaced. KeyError for a word that there is not."""
    return "".join(f"{line}\n" for given in text.splitlines() for line in _lines(given, words))


def _lines(line: str, words: Mapping[str, str]) -> Iterator[str]:
    block = _BLOCK.fullmatch(line)
    if block is None:
        yield _WORD.sub(lambda match: words[match[1]], line)
        return
    for inner in words[block[2]].splitlines():
        yield f"{block[1]}{inner}".rstrip()

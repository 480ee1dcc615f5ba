"""Filling in the templates: `render`, and `template_context`, the values of their placeholders for a deployment.

Templates are text files (YAML, Markdown, Dockerfile) with placeholders such as @NAME@. A placeholder alone on its line
is a block: each line of its value gets the line's indentation, and the line disappears where the value is empty. Other
placeholders are replaced in the line. A placeholder without a value is replaced by the template of that name in
templates/fragments/, rendered.

The golden pack becomes files for golden_check.py: raw tensors and one JSON file.

golden.json          the model's name, its tensors, tolerances, the batches to send, and the SHA-256 of every file
input.bin            N inputs, in the model's input format
logits.bin …         the expected outputs for them, float32 or int64, little-endian
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import CLASS_SCORES, expected_outputs, of_role
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.bundle.store import GOLDEN
from spach_deploy.common.errors import BundleError, printable
from spach_deploy.common.text import json_text
from spach_deploy.options.specs import BatchProfile, Role
from spach_deploy.packaging.kubernetes.deployment import (
    CORES,
    LONGEST,
    PROBE_SECONDS,
    Deployment,
    listed,
    quantity,
)
from spach_deploy.packaging.triton.config import DATA_TYPES
from spach_deploy.packaging.triton.options import Backend, Batching
from spach_deploy.packaging.triton.served_model import ServedModel
from spach_deploy.packaging.triton.serving import PILLOW, is_version_compatible
from spach_deploy.validation.runs import repeated_images
from spach_deploy.validation.tolerance import Bounds

WIDTH = 120
"""Of a line of the README."""

_QUEUE_FACTOR = 10
_PULL_SECONDS = 600  # Triton's images have 10 GB


class TemplateContext(Mapping[str, str]):
    """Values of placeholders by name. Fragments are rendered when they are looked up."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = dict(given)

    def __getitem__(self, name: str) -> str:
        if name in self._given:
            return self._given[name]
        stem = name.lower().replace("_", "-")
        fragments = [file.name for file in sorted((TEMPLATES / "fragments").glob(f"{stem}.*"))]
        if not fragments:
            raise KeyError(name)
        return render(read_template(f"fragments/{fragments[0]}"), self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def with_values(self, **values: str) -> TemplateContext:
        """A copy with more values."""
        return TemplateContext({**self._given, **values})


KUSTOMIZE_NAME = "spach-model"
"""The image's name in manifests, which the kustomization replaces."""


def template_context(deployment: Deployment, image_tag: str, batch_sizes: Sequence[int] = ()) -> TemplateContext:
    """The values for a deployment, except NAMESPACE, which differs by overlay. `batch_sizes`: of the golden check."""
    return TemplateContext(
        {
            **_model_values(deployment),
            **_image_values(deployment, image_tag),
            **_size_values(deployment),
            **_conditional_blocks(deployment),
            **_pin_values(deployment, image_tag),
            "BATCHES": listed(str(size) for size in batch_sizes),
            **(_kserve_values(deployment) if deployment.options.kserve else _plain_values(deployment)),
        }
    )


def _model_values(deployment: Deployment) -> dict[str, str]:
    model = deployment.model
    version = model.versions[-1]
    return {
        "NAME": deployment.name,
        "LONGEST": str(LONGEST),
        "MODEL": deployment.title,
        "TRITON_MODEL": model.name,
        "SERVES": deployment.serves,
        "DESCRIPTION": f"{deployment.title} in {model.facts.precision.value}: {deployment.serves}, in Triton "
        f"{deployment.image.release}",
        "ARTIFACT_SHA256": version.manifest.files[version.artifact.name].sha256,
        "MIN_REPLICAS": str(deployment.options.replicas.min),
        "MAX_REPLICAS": str(deployment.options.replicas.max),
    }


def _image_values(deployment: Deployment, image_tag: str) -> dict[str, str]:
    return {
        "TRITON_IMAGE": deployment.image.reference,
        "NOTES_URL": deployment.image.notes,
        "CARRIES": f"{deployment.carries}.",
        "CUDA": deployment.image.cuda,
        "IMAGE_NAME": deployment.image_name,
        "IMAGE_TAG": image_tag,
        "PILLOW": PILLOW,
    }


def _pin_values(deployment: Deployment, image_tag: str) -> dict[str, str]:
    """Digests, pull secrets, and how the folder is used: with kustomize, or with `chart_context` in a chart."""
    options = deployment.options
    secrets = [{"name": name} for name in options.pull_secrets]
    values = {
        "IMAGE_REFERENCE": KUSTOMIZE_NAME,
        "IMAGE_PIN": f"digest: {options.image_digest.digest}" if options.image_digest else f'newTag: "{image_tag}"',
        "IMAGE_DIGEST": options.image_digest.digest if options.image_digest else "",
        "TRITON_DIGEST": f"@{options.triton_digest.digest}" if options.triton_digest else "",
        "PULL_SECRETS": "\n".join(["imagePullSecrets:", *(f"  - name: {name}" for name in options.pull_secrets)])
        if secrets
        else "",
        "PULL_SECRETS_JSON": json.dumps(secrets),
        "REPLICAS": "",
        "ZONE_SPREAD": "",
        "COMMANDS": _commands(deployment, image_tag),
        "ENFORCED": "The namespaces enforce the pod\nsecurity standard `restricted`.",
    }
    if options.triton_digest:
        values["PIN_HINT"] = ""
    if options.helm:
        values["MANIFEST_FILES"] = read_template("fragments/helm-files.md")
        values["ENFORCED"] = (
            "A chart has no namespace; to\nlet yours enforce the pod security standard `restricted`:\n\n"
            f"    kubectl label namespace {deployment.name} pod-security.kubernetes.io/enforce=restricted"
        )
    return values


def _commands(deployment: Deployment, image_tag: str) -> str:
    options = deployment.options
    place = "`image.repository` in chart/values.yaml" if options.helm else "`newName` in base/kustomization.yaml"
    commands = "\n".join(f"    {command}" for command in deployment.commands(image_tag))
    if options.image_digest is not None:
        return f"The image was pushed before, and is named by its digest ({place}). From this folder:\n\n{commands}"
    return (
        f"Three commands, from this folder, with a registry of your own ({place}):\n\n{commands}\n\n"
        "A tag can be pushed again. `docker buildx imagetools inspect` shows the digest of what was pushed; packaged\n"
        "again with `--image-digest`, pods name the image by it, and get no other."
    )


def chart_context(context: TemplateContext, *, kserve: bool) -> TemplateContext:
    """The values for templates of a Helm chart: names are the release's, and what can be changed is read from the
    chart's values.
    """
    fullname = f'{{{{ include "{context["NAME"]}.fullname" . }}}}'
    named = context.with_values(
        NAME=fullname,
        DEPLOYMENT=f"{fullname}-predictor" if kserve else fullname,
        LABELS=render(read_template("fragments/helm-labels.yaml"), context),
        SELECTOR=f"serving.kserve.io/inferenceservice: {fullname}"
        if kserve
        else render(read_template("fragments/helm-selector.yaml"), context),
    )
    zone = named["ZONE"].splitlines()
    enabled, replicas = "{{ if .Values.autoscaling.enabled }}", "{{ else }}{{ .Values.replicas }}{{ end }}"
    return named.with_values(
        IMAGE_REFERENCE=f'{{{{ include "{context["NAME"]}.image" . | quote }}}}',
        PULL_SECRETS=read_template("fragments/helm-pull-secrets.yaml"),
        REPLICAS=read_template("fragments/helm-replicas.yaml"),
        MIN_REPLICAS=f"{enabled}{{{{ .Values.autoscaling.minReplicas }}}}{replicas}",
        MAX_REPLICAS=f"{enabled}{{{{ .Values.autoscaling.maxReplicas }}}}{replicas}",
        QUEUE_US="{{ .Values.autoscaling.queueMicroseconds }}",
        RESOURCES="{{ toJson .Values.resources }}",  # JSON is YAML, whatever the indentation
        ZONE_SPREAD="\n".join([f"- {zone[0]}", *(f"  {line}" for line in zone[1:])]),
    )


def _size_values(deployment: Deployment) -> dict[str, str]:
    sizes, delay = deployment.sizes, Batching().queue_delay_us
    return {
        "MEGABYTES": f"{sizes.artifact_bytes / 1e6:.1f}",
        "CORES": str(CORES),
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


def _conditional_blocks(deployment: Deployment) -> dict[str, str]:
    """Blocks that only some deployments have. An empty value here leaves out the fragment of the same name."""
    model = deployment.model
    values = {
        "GPU_AFFINITY": gpu_affinity(deployment.gpus, any_newer=_is_hardware_compatible(deployment)),
        "VERSION_COMPATIBLE": "- --backend-config=tensorrt,version-compatible=true"
        if is_version_compatible(model)
        else "",
        "REQUIREMENTS": _requirements(deployment),
        "NOTES": "".join(f"\n{note}" for note in _notes(deployment)),
        "GPU": "" if model.on_cpu else 'nvidia.com/gpu: "1"',
        "WHOLE_GPU": "" if model.on_cpu else "A whole GPU. ",
    }
    if model.on_cpu:
        values["GPU_TOLERATIONS"] = ""
    if allows_tf32(model):
        values["TF32"] = ""
    if not deployment.options.ensemble:
        values["STEP_PACKAGES"] = ""
    return values


def _notes(deployment: Deployment) -> Iterator[str]:
    """Remarks on the model as a list, with the bundle's name in place of where it was on the writing machine."""
    path = deployment.model.bundle.path
    for note in deployment.notes:
        text = printable(note.replace(str(path), path.name))
        yield textwrap.fill(f"- {text}", WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _is_hardware_compatible(deployment: Deployment) -> bool:
    return deployment.model.bundle.manifest.engine.hardware_compatible


def gpu_affinity(gpus: tuple[str, ...], *, any_newer: bool) -> str:
    """Node affinity for GPUs such as sm90; empty for none. `any_newer`: for Ampere (sm80) and all later GPUs."""
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


def _requirements(deployment: Deployment) -> str:
    image = deployment.image
    driver = [
        f"- NVIDIA's device plugin (`nvidia.com/gpu`), and on the nodes a driver for CUDA {image.cuda}, see",
        f"  {image.notes}",
    ]
    lines = [
        *([] if deployment.model.on_cpu else driver),
        "- for autoscaling, Prometheus and prometheus-adapter with the rule in monitoring/prometheus-adapter.yaml",
        "- a network plugin that enforces network policies, or they are only words",
    ]
    if deployment.gpus:
        gpus = listed(deployment.gpus)
        lines.append(f"- nodes that NVIDIA's GPU feature discovery has labelled: the plan was built for {gpus}")
    if deployment.options.kserve:
        lines.append("- KServe; RawDeployment (Standard) mode needs no Knative")
    if deployment.options.helm:
        lines.append("- Helm 3 or 4")
    first = deployment.image_name.partition("/")[0]
    host = first if re.search(r"[.:]|^localhost$", first) else "REGISTRY"
    for secret in deployment.options.pull_secrets:
        lines += [
            f"- the secret `{secret}`, with which nodes pull the image; pods wait until the namespace has it:",
            f"  `kubectl create secret docker-registry {secret} --namespace {deployment.name}",
            f"  --docker-server={host} --docker-username=USER --docker-password=TOKEN`",
        ]
    return "\n".join(lines)


def _plain_values(deployment: Deployment) -> dict[str, str]:
    return {
        "SELECTOR": f"app.kubernetes.io/name: {deployment.name}",
        "HTTP_PORT": "8000",
        "GRPC_PORT": "8001",
        "DEPLOYMENT": deployment.name,
        "WORKLOAD": "Deployment",
        "SPREAD_PATH": "/spec/template/spec/topologySpreadConstraints/-",
        "KSERVE_TITLE": "",
        "KSERVE_STAGING_PATCH": "",
    }


def _kserve_values(deployment: Deployment) -> dict[str, str]:
    """Values for KServe, which names its deployment and labels its pods NAME-predictor."""
    predictor = f"{deployment.name}-predictor"
    return {
        "SELECTOR": f"serving.kserve.io/inferenceservice: {deployment.name}",
        "HTTP_PORT": "8080",
        "GRPC_PORT": "9000",
        "DEPLOYMENT": predictor,
        "WORKLOAD": "InferenceService",
        "SPREAD_PATH": "/spec/predictor/topologySpreadConstraints/-",
        "KSERVE_TITLE": ", by KServe",
        "WORKLOAD_FILES": read_template("fragments/kserve-files.md"),
        "ASK": render(read_template("fragments/kserve-ask.md"), _model_values(deployment)),
    }


TEMPLATES = Path(__file__).with_name("templates")

_PLACEHOLDER = re.compile(r"@([A-Z][A-Z0-9_]*)@")
_BLOCK = re.compile(r"( *)@([A-Z][A-Z0-9_]*)@")


def read_template(name: str) -> str:
    """A template's text."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def render(text: str, context: Mapping[str, str]) -> str:
    """`text` with every placeholder replaced. KeyError for a placeholder without a value."""
    return "".join(f"{line}\n" for given in text.splitlines() for line in _lines(given, context))


def _lines(line: str, context: Mapping[str, str]) -> Iterator[str]:
    block = _BLOCK.fullmatch(line)
    if block is None:
        yield _PLACEHOLDER.sub(lambda match: context[match[1]], line)
        return
    for inner in context[block[2]].splitlines():
        yield f"{block[1]}{inner}".rstrip()


DESCRIPTION = "golden.json"

_EXPORT_AGAIN = "Export the bundle again."


@dataclasses.dataclass(frozen=True)
class GoldenPack:
    """The files by name, and the sizes of the batches that the check sends."""

    files: dict[str, bytes]
    batch_sizes: tuple[int, ...]


def golden_pack(model: ServedModel) -> GoldenPack:
    """The pack of `model`. BundleError where the bundle's golden pack does not fit the model."""
    golden = Golden.load(model.bundle.file(GOLDEN))
    golden.check(model.bundle)
    expected = expected_outputs(golden.outputs, model.outputs)
    tensors = {"input.bin": np.ascontiguousarray(golden.input).tobytes()}
    for output in model.outputs:
        tensors[_file(output)] = _bytes(output, expected[output.name])
    sent = batches(len(golden.names), model.batch)
    description = {
        "model": model.name,
        "images": list(golden.names),
        "input": _tensor(model.inputs[0], "input.bin"),
        "outputs": [_output(output, model) for output in model.outputs],
        "batches": [list(batch) for batch in sent],
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in tensors.items()},
    }
    text = json_text(description) + "\n"
    return GoldenPack({DESCRIPTION: text.encode(), **tensors}, tuple(map(len, sent)))


def bounds(model: ServedModel) -> Bounds:
    """Tolerances on a GPU: the engine's for a plan, or where they allow for TF32; else the graph's."""
    tolerances = model.facts.tolerances
    return tolerances.engine if model.backend is Backend.TENSORRT or allows_tf32(model) else tolerances.graph


def allows_tf32(model: ServedModel) -> bool:
    """Whether the bundle's tolerances of the engine allow for TF32."""
    return model.facts.tf32


def batches(images: int, profile: BatchProfile) -> tuple[tuple[int, ...], ...]:
    """Indices of images for each batch: the smallest batch, the rest of the images, then the largest batch.

    A graph can be right at one batch size and wrong at another. Images are repeated where there are too few.
    """
    sent = [_take(0, profile.min, images)]
    start = min(profile.min, images)
    while start < images:
        size = max(profile.min, min(profile.max, images - start))
        sent.append(_take(start, size, images))
        start += size
    if max(map(len, sent)) < profile.max:
        sent.append(_take(0, profile.max, images))
    return tuple(sent)


def _take(start: int, size: int, images: int) -> tuple[int, ...]:
    return repeated_images(images, start + size)[start:]


def _bytes(output: TensorInfo, expected: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(expected).astype("<i8" if output.role is Role.TOP_INDICES else "<f4").tobytes()


def _tensor(tensor: TensorInfo, file: str) -> dict[str, Any]:
    data_type = DATA_TYPES[tensor.dtype].removeprefix("TYPE_")
    return {"name": tensor.name, "datatype": data_type, "shape": list(tensor.shape[1:]), "file": file}


def _output(output: TensorInfo, model: ServedModel) -> dict[str, Any]:
    """Description of an output with its kind and tolerance. Indices are compared by the scores that they rank."""
    entry = _tensor(output, _file(output))
    logits = of_role(model.outputs, Role.LOGITS)
    if output.role is Role.TOP_INDICES and logits is not None:
        return {**entry, "kind": "indices", "ranks": logits.name, "tolerance": _tolerance(logits.name, model)}
    kind = "scores" if output.role in CLASS_SCORES else "values"
    return {**entry, "kind": kind, "tolerance": _tolerance(output.name, model)}


def _file(output: TensorInfo) -> str:
    return f"{output.name}.bin"


def _tolerance(output: str, model: ServedModel) -> dict[str, Any]:
    given = bounds(model).outputs.get(output)
    if given is None:
        raise BundleError(f"Bundle {model.bundle.path} has no tolerance for the output {output}.", _EXPORT_AGAIN)
    return {name: getattr(given, name) for name in ("rel_l2", "max_abs", "cosine_min", "flip_margin")}

"""The folder that spach-package kubernetes writes, in one step: a killed run leaves the old folder or none.

FOLDER/
  manifest.json    marks the folder as written by spach-package, from which bundle; no program reads it
  README.md        explains each file, and the three commands to use them
  image/           Dockerfile, the model repository, the golden pack and its check
  base/            a kustomization: Deployment and what belongs to it, or ServingRuntime and InferenceService
  overlays/        staging and production
  components/prometheus-operator/ monitoring/prometheus-adapter.yaml

With --helm, a chart of the same manifests is in place of base/, overlays/ and components/:

  chart/           Chart.yaml, values.yaml and its schema, templates
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

from spach_deploy._version import __version__
from spach_deploy.bundle.store import MANIFEST, DirectoryKind, check_target, writing
from spach_deploy.common.files import Destination, sha256_of
from spach_deploy.common.text import escaped, json_text
from spach_deploy.graph.runtimes import DATA, Runtimes
from spach_deploy.packaging.kubernetes.deployment import Deployment, KubernetesOptions, quantity, triton_options
from spach_deploy.packaging.kubernetes.template_context import (
    TEMPLATES,
    GoldenPack,
    TemplateContext,
    chart_context,
    golden_pack,
    read_template,
    render,
    template_context,
)
from spach_deploy.packaging.triton.repository import write_models
from spach_deploy.validation.bundle_facts import SERVE_SEVERAL

CONTENTS = DirectoryKind("kubernetes-deployment", "a deployment")

IMAGE, MODELS, GOLDEN_FOLDER, DOCKERFILE = "image", "models", "golden", "Dockerfile"

_CHECK = Path(__file__).with_name("golden_check.py")
_SHARED = ("hpa.yaml", "pdb.yaml", "service-account.yaml")
_PLAIN = ("deployment.yaml", "service.yaml", "network-policy.yaml")
_KSERVE = ("serving-runtime.yaml", "inference-service.yaml", "network-policy.yaml")
_KUSTOMIZATION, _POD_MONITOR = "kustomization.yaml", "pod-monitor.yaml"
_CONDITIONS = {"hpa.yaml": "autoscaling.enabled", _POD_MONITOR: "podMonitor.enabled"}
"""Templates of a chart that one of its values leaves out."""

_OVERLAYS = {"staging": "-staging", "production": ""}
"""Suffix of each overlay's namespace after the deployment's name."""


@dataclasses.dataclass(frozen=True)
class KubernetesPackage:
    """A written folder."""

    path: Path
    deployment: Deployment
    image_tag: str

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that build, push and run it."""
        return self.deployment.commands(self.image_tag, f"{self.path}/")


def write_folder(
    bundle: Path, output: Path, options: KubernetesOptions, *, overwrite: bool = False
) -> KubernetesPackage:
    """Write image, manifests and README for `bundle` to `output`.

    Raises BundleError where `bundle` is not a bundle, was changed, has no file for the backend, or the target cannot be
    written, and UsageError for options that do not fit, such as a Triton image that cannot load the engine.
    """
    destination = check_target(output, overwrite=overwrite, contents=CONTENTS)
    deployment = Deployment.of(bundle, options)
    deployment.model.facts.check_one_input("the image's golden check sends one", SERVE_SEVERAL)
    pack = golden_pack(deployment.model)
    with writing(destination) as staging:
        tag = _write_image(staging / IMAGE, deployment, pack)
        _write_manifests(staging, template_context(deployment, tag, pack.batch_sizes), options)
        _write(staging / MANIFEST, _manifest(deployment, tag))
    return KubernetesPackage(output, deployment, tag)


def _write_image(folder: Path, deployment: Deployment, pack: GoldenPack) -> str:
    """Write everything that `docker build` reads. Returns the image's tag, which changes with every file."""
    folder.mkdir()
    repository = folder / MODELS
    options = triton_options(deployment.options, deployment.device)
    write_models([deployment.model], Destination.of(repository), repository, options)
    (folder / GOLDEN_FOLDER).mkdir()
    for name, content in pack.files.items():
        (folder / GOLDEN_FOLDER / name).write_bytes(content)
    shutil.copyfile(_CHECK, folder / _CHECK.name)
    _write(folder / ".dockerignore", read_template("image/dockerignore"))
    dockerfile = read_template("image/Dockerfile")
    tag = _tag(folder, render(dockerfile, template_context(deployment, "")), deployment)
    _write(folder / DOCKERFILE, render(dockerfile, template_context(deployment, tag)))
    return tag


def _tag(folder: Path, dockerfile: str, deployment: Deployment) -> str:
    """`25.08-fp16-0123456789ab`: the release, the precision, and a hash of the image's files."""
    digest = hashlib.sha256(dockerfile.encode())
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {sha256_of(file)}\n".encode())
    return f"{deployment.image.release}-{deployment.model.facts.precision.value}-{digest.hexdigest()[:12]}"


def _write_manifests(staging: Path, context: TemplateContext, options: KubernetesOptions) -> None:
    _render_to(staging / "README.md", "README.md", context)
    _render_folder(staging, "monitoring", context)
    own, where = (_KSERVE, "kserve") if options.kserve else (_PLAIN, "base")
    templates = {name: f"base/{name}" for name in _SHARED} | {name: f"{where}/{name}" for name in own}
    if options.helm:
        _write_chart(staging / "chart", templates, context, options)
        return
    for name, template in {_KUSTOMIZATION: f"{where}/{_KUSTOMIZATION}", **templates}.items():
        _render_to(staging / "base" / name, template, context)
    for overlay, suffix in _OVERLAYS.items():
        _render_folder(staging, f"overlays/{overlay}", context.with_values(NAMESPACE=f"{context['NAME']}{suffix}"))
    _render_folder(staging, "components/prometheus-operator", context)


def _write_chart(folder: Path, templates: dict[str, str], context: TemplateContext, options: KubernetesOptions) -> None:
    """A Helm chart of the same templates, and a PodMonitor; what it makes by default is what production gets."""
    for name in ("Chart.yaml", "values.yaml", "values.schema.json"):
        _render_to(folder / name, f"chart/{name}", context)
    _render_to(folder / "templates" / "_helpers.tpl", "chart/helpers.tpl", context)
    values = chart_context(context, kserve=options.kserve)
    for name, template in {**templates, _POD_MONITOR: f"components/prometheus-operator/{_POD_MONITOR}"}.items():
        text = render(read_template(template), values)
        if name in _CONDITIONS:
            text = f"{{{{- if .Values.{_CONDITIONS[name]} }}}}\n{text}{{{{- end }}}}\n"
        _write(folder / "templates" / name, text)


def _render_folder(staging: Path, folder: str, context: TemplateContext) -> None:
    for template in sorted((TEMPLATES / folder).iterdir()):
        _render_to(staging / folder / template.name, f"{folder}/{template.name}", context)


def _render_to(target: Path, template: str, context: TemplateContext) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, render(read_template(template), context))


def _manifest(deployment: Deployment, tag: str) -> str:
    content = {
        "kind": CONTENTS.kind,
        "spach_deploy": __version__,
        "bundle": deployment.model.bundle.path.name,
        "model": deployment.title,
        "backend": deployment.model.backend.value,
        "triton_image": deployment.image.reference,
        "image": deployment.image_reference(tag),
    }
    return json_text(content) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


_LABEL_WIDTH = 12


def as_text(written: KubernetesPackage) -> str:
    """The summary for the terminal: what is served, in which image, and the three commands."""
    deployment = written.deployment
    sizes = deployment.sizes
    rows = {
        "model": f"{deployment.title}, {deployment.model.facts.precision.value}, as {deployment.model.name} in Triton",
        "serves": deployment.serves,
        "image": f"{deployment.image.reference} ({deployment.carries})",
        "pods": f"{_replicas(written)} of {deployment.name}, each with {deployment.takes} and"
        f" {quantity(sizes.memory_bytes)}"
        f"{' for ' + ', '.join(deployment.gpus) if deployment.gpus else ''}",
        "start-up": f"{sizes.startup_seconds} s ({sizes.arithmetic})",
        "folder": str(written.path),
    }
    lines = [f"{label:<{_LABEL_WIDTH}}{text}" for label, text in rows.items()]
    notes = [f"{'note':<{_LABEL_WIDTH}}{note}" for note in deployment.notes]
    return escaped([*lines, *notes, "", "Run it:", *(f"  {command}" for command in written.commands)])


def as_json(written: KubernetesPackage) -> str:
    """The summary as JSON."""
    deployment = written.deployment
    content = {
        "folder": str(written.path),
        "name": deployment.name,
        "model": deployment.title,
        "backend": deployment.model.backend.value,
        "kserve": deployment.options.kserve,
        "triton_image": deployment.image.reference,
        "helm": deployment.options.helm,
        "image": deployment.image_reference(written.image_tag),
        "gpus": list(deployment.gpus),
        "startup_seconds": deployment.sizes.startup_seconds,
        "notes": list(deployment.notes),
        "commands": list(written.commands),
    }
    return json_text(content)


def versions_table(known: Runtimes) -> str:
    """A table of the known Triton images with their TensorRT, ONNX Runtime, opset and CUDA."""
    lines = [f"{'release':<9}{'TensorRT':<12}{'ONNX Runtime':<14}{'opset':<7}CUDA"]
    for image in known.images:
        runtime = known.onnxruntime(image.onnxruntime)
        opset = "-" if runtime is None else str(runtime.opset)
        versions = f"{image.tensorrt or 'not known':<12}{image.onnxruntime:<14}{opset:<7}{image.cuda}"
        lines.append(f"{image.release:<9}{versions}")
    return "\n".join([*lines, "", f"As read on {known.read}. Where each was seen stands in {DATA}."])


def _replicas(written: KubernetesPackage) -> str:
    replicas = written.deployment.options.replicas
    return f"{replicas.min} to {replicas.max}" if replicas.min != replicas.max else f"{replicas.min}"

"""The folder that spach-package kubernetes writes, in one step: a killed run leaves the old one or none.

FOLDER/
  manifest.json    that spach-package wrote it, from what; nothing reads it afterwards
  README.md        each file explained, and the three commands
  image/           Dockerfile, the model repository, the golden pack and its check
  base/            a kustomization: Deployment and what belongs to it, or ServingRuntime and InferenceService
  overlays/        staging and production
  components/prometheus-operator/ monitoring/prometheus-adapter.yaml
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

from spach_deploy._version import __version__
from spach_deploy.bundle import MANIFEST, Contents, check_target, sha256_of, writing
from spach_deploy.command_lines import quoted
from spach_deploy.deployment.kubernetes.deployed import Deployed, triton_options
from spach_deploy.deployment.kubernetes.golden_pack import GoldenPack, golden_pack
from spach_deploy.deployment.kubernetes.options import KubernetesOptions
from spach_deploy.deployment.kubernetes.templating import TEMPLATES, read_template, render
from spach_deploy.deployment.kubernetes.words import Words, all_words
from spach_deploy.deployment.triton.repository import write_repository
from spach_deploy.text import json_text

CONTENTS = Contents("kubernetes-deployment", "a deployment")

IMAGE, MODELS, GOLDEN_FOLDER, DOCKERFILE = "image", "models", "golden", "Dockerfile"

_CHECK = Path(__file__).with_name("golden_check.py")
_SHARED = ("hpa.yaml", "pdb.yaml", "service-account.yaml")
_PLAIN = ("kustomization.yaml", "deployment.yaml", "service.yaml", "network-policy.yaml")
_KSERVE = ("kustomization.yaml", "serving-runtime.yaml", "inference-service.yaml", "network-policy.yaml")
_OVERLAYS = {"staging": "-staging", "production": ""}
"""What an overlay's namespace has behind the name."""


@dataclasses.dataclass(frozen=True)
class Written:
    """A folder that was written."""

    path: Path
    deployed: Deployed
    image_tag: str

    @property
    def commands(self) -> tuple[str, ...]:
        """The three that make it run."""
        image = f"{self.deployed.image_name}:{self.image_tag}"
        return (
            f"docker build -t {image} {quoted(self.path / IMAGE)}",
            f"docker push {image}",
            f"kubectl apply -k {quoted(self.path / 'overlays' / 'production')}",
        )


def write_folder(bundle: Path, output: Path, options: KubernetesOptions, *, overwrite: bool = False) -> Written:
    """Write image, manifests and README for `bundle` to `output`.

    Raises BundleError for what is no bundle, was changed, has nothing for the backend, or for a target that cannot be
    written, and UsageError for options that do not fit, above all a Triton image that cannot load the engine.
    """
    place = check_target(output, overwrite=overwrite, contents=CONTENTS)
    deployed = Deployed.of(bundle, options)
    pack = golden_pack(deployed.model)
    with writing(place) as staging:
        tag = _write_image(staging / IMAGE, deployed, pack)
        _write_manifests(staging, all_words(deployed, tag, pack.batch_sizes), kserve=options.kserve)
        _write(staging / MANIFEST, _manifest(deployed, tag))
    return Written(output, deployed, tag)


def _write_image(folder: Path, deployed: Deployed, pack: GoldenPack) -> str:
    """Everything that `docker build` reads; gives the image's tag, which changes with every file."""
    folder.mkdir()
    write_repository([deployed.argument], folder / MODELS, triton_options(deployed.options))
    (folder / GOLDEN_FOLDER).mkdir()
    for name, content in pack.files.items():
        (folder / GOLDEN_FOLDER / name).write_bytes(content)
    shutil.copyfile(_CHECK, folder / _CHECK.name)
    _write(folder / ".dockerignore", read_template("image/dockerignore"))
    dockerfile = read_template("image/Dockerfile")
    tag = _tag(folder, render(dockerfile, all_words(deployed, "")), deployed)
    _write(folder / DOCKERFILE, render(dockerfile, all_words(deployed, tag)))
    return tag


def _tag(folder: Path, dockerfile: str, deployed: Deployed) -> str:
    """`25.08-fp16-0123456789ab`: the release, the precision, and a hash of the image's files."""
    digest = hashlib.sha256(dockerfile.encode())
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {sha256_of(file)}\n".encode())
    return f"{deployed.image.release}-{deployed.model.facts.precision.value}-{digest.hexdigest()[:12]}"


def _write_manifests(staging: Path, words: Words, *, kserve: bool) -> None:
    _render_to(staging / "README.md", "README.md", words)
    for name in _SHARED:
        _render_to(staging / "base" / name, f"base/{name}", words)
    for name in _KSERVE if kserve else _PLAIN:
        _render_to(staging / "base" / name, f"{'kserve' if kserve else 'base'}/{name}", words)
    for overlay, suffix in _OVERLAYS.items():
        _render_folder(staging, f"overlays/{overlay}", words.also(NAMESPACE=f"{words['NAME']}{suffix}"))
    for folder in ("components/prometheus-operator", "monitoring"):
        _render_folder(staging, folder, words)


def _render_folder(staging: Path, folder: str, words: Words) -> None:
    for template in sorted((TEMPLATES / folder).iterdir()):
        _render_to(staging / folder / template.name, f"{folder}/{template.name}", words)


def _render_to(target: Path, template: str, words: Words) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, render(read_template(template), words))


def _manifest(deployed: Deployed, tag: str) -> str:
    content = {
        "kind": CONTENTS.kind,
        "spach_deploy": __version__,
        "bundle": deployed.model.bundle.path.name,
        "model": deployed.title,
        "backend": deployed.model.backend.value,
        "triton_image": deployed.image.reference,
        "image": f"{deployed.image_name}:{tag}",
    }
    return json_text(content) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

"""Which Triton image carries which TensorRT, ONNX Runtime and CUDA (versions.json), and which of them fit a bundle.

A plan loads in the TensorRT that built it and in no other; one that was exported version compatible also in newer ones
of the same major version, where Triton is told to expect it. A graph needs an ONNX Runtime that implements its opset.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spach_deploy.deployment.triton.options import Backend
from spach_deploy.deployment.triton.served import RTX_REASON, ServedModel
from spach_deploy.errors import UsageError
from spach_deploy.specs import Flavour

REPOSITORY = "nvcr.io/nvidia/tritonserver"
GRAPH_ADVICE = "Give --backend onnxruntime, which serves the graph."

_DATA = Path(__file__).with_name("versions.json")


@dataclasses.dataclass(frozen=True)
class TritonImage:
    """NVIDIA's image of a release, and what it carries. `tensorrt` None: not known."""

    release: str
    tensorrt: str | None
    onnxruntime: str
    cuda: str

    @property
    def reference(self) -> str:
        """What a Dockerfile calls it."""
        return f"{REPOSITORY}:{self.release}-py3"

    @property
    def notes(self) -> str:
        """The address of its release notes."""
        page = f"rel-{self.release.replace('.', '-')}.html"
        return f"https://docs.nvidia.com/deeplearning/triton-inference-server/release-notes/{page}"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """All images that are known, oldest first, and the opset that all their ONNX Runtimes implement."""

    images: tuple[TritonImage, ...]
    opset: int
    read: str

    @classmethod
    def parse(cls, content: Any) -> Matrix:
        """The matrix of versions.json."""
        images = (TritonImage(release, **entry) for release, entry in sorted(content["images"].items()))
        return cls(tuple(images), int(content["graph"]["opset"]), str(content["read"]))

    def find(self, release: str) -> TritonImage:
        """The image of a release. UsageError for one that is not known."""
        found = next((image for image in self.images if image.release == release), None)
        if found is None:
            raise UsageError(
                f"--triton-version {release}: what that Triton image carries is not known here.",
                f"Known are {self.images[0].release} to {self.images[-1].release}; --list-versions shows them.",
            )
        return found


@functools.cache
def matrix() -> Matrix:
    """The one that is shipped."""
    return Matrix.parse(json.loads(_DATA.read_text(encoding="utf-8")))


def choose_image(model: ServedModel, release: str | None, known: Matrix | None = None) -> TritonImage:
    """The image of `release`, or the newest that fits. UsageError where none is known or it does not fit `model`."""
    known = known or matrix()
    if release is not None:
        image = known.find(release)
        if reason := misfit(model, image, known):
            raise UsageError(f"--triton-version {release}: {reason}.", _advice(model, known))
        return image
    fitting = fitting_images(model, known)
    if not fitting:
        raise UsageError(f"No known Triton image fits: {misfit(model, known.images[-1], known)}.", GRAPH_ADVICE)
    return fitting[-1]


def fitting_images(model: ServedModel, known: Matrix) -> tuple[TritonImage, ...]:
    """Images that load `model`, oldest first."""
    return tuple(image for image in known.images if not misfit(model, image, known))


def misfit(model: ServedModel, image: TritonImage, known: Matrix) -> str:
    """Why `image` cannot load `model`, without a full stop; empty where it can."""
    if model.backend is not Backend.TENSORRT:
        return _graph_misfit(model, image, known)
    engine = model.bundle.manifest.engine
    built = str(engine.get("version", ""))
    if model.facts.flavour is Flavour.TENSORRT_RTX:
        return f"the engine is TensorRT for RTX {built}, and {RTX_REASON}"
    if image.tensorrt is None:
        return f"which TensorRT that image carries is not known, and the engine needs {built}"
    if not _loads(built, image.tensorrt, is_compatible=is_version_compatible(model)):
        return f"it carries TensorRT {image.tensorrt}, and the engine was built with {built or 'an unknown version'}"
    return ""


def is_version_compatible(model: ServedModel) -> bool:
    """Whether its plan was exported for newer versions of TensorRT too."""
    engine = model.bundle.manifest.engine
    return model.backend is Backend.TENSORRT and bool(engine.get("version_compatible", False))


def _graph_misfit(model: ServedModel, image: TritonImage, known: Matrix) -> str:
    certificate = model.bundle.manifest.content.get("graph", {}).get("certificate", {})
    opset = certificate.get("opset")
    if isinstance(opset, int) and opset > known.opset:
        carried = f"it carries ONNX Runtime {image.onnxruntime}, known to implement opset {known.opset}"
        return f"{carried}, and the graph has opset {opset}"
    return ""


def _loads(built: str, carried: str, *, is_compatible: bool) -> bool:
    """Whether TensorRT `carried` loads a plan of `built`; parts that one of them leaves out are not compared."""
    ours, theirs = _parts(built), _parts(carried)
    if len(ours) < 3 or len(theirs) < 3:
        return False
    if is_compatible:
        return ours[0] == theirs[0] and ours[:3] <= theirs[:3]
    return all(a == b for a, b in zip(ours, theirs, strict=False))


def _parts(version: str) -> tuple[int, ...]:
    """`10.13.2.6` -> (10, 13, 2, 6); up to the first part that is no number."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _advice(model: ServedModel, known: Matrix) -> str:
    releases = listed(image.release for image in fitting_images(model, known))
    return f"It fits {releases}; or give --backend onnxruntime." if releases else GRAPH_ADVICE


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    given = list(words)
    return " and ".join([", ".join(given[:-1]), given[-1]] if len(given) > 1 else given)

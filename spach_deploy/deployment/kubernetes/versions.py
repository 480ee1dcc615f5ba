"""Which of the Triton images that are known (onnx_graph/runtimes.json) fit a bundle.

A plan loads in the TensorRT that built it and in no other; one that was exported version compatible also in newer ones
of the same major version, where Triton is told to expect it. A graph needs an ONNX Runtime that implements its opset.
"""

from __future__ import annotations

from collections.abc import Iterable

from spach_deploy.deployment.triton.options import Backend
from spach_deploy.deployment.triton.served import RTX_REASON, ServedModel, instead_of_plan
from spach_deploy.errors import UsageError
from spach_deploy.onnx_graph.runtimes import Runtimes, TritonImage, runtimes, version_numbers
from spach_deploy.specs import Flavour


def choose_image(model: ServedModel, release: str | None, known: Runtimes | None = None) -> TritonImage:
    """The image of `release`, or the newest that fits. UsageError where none is known or it does not fit `model`."""
    known = known or runtimes()
    if release is not None:
        image = known.image(release)
        if reason := misfit(model, image, known):
            raise UsageError(f"--triton-version {release}: {reason}.", _advice(model, known))
        return image
    fitting = fitting_images(model, known)
    if not fitting:
        raise UsageError(
            f"No known Triton image fits: {misfit(model, known.images[-1], known)}.", _advice(model, known)
        )
    return fitting[-1]


def fitting_images(model: ServedModel, known: Runtimes) -> tuple[TritonImage, ...]:
    """Images that load `model`, oldest first."""
    return tuple(image for image in known.images if not misfit(model, image, known))


def misfit(model: ServedModel, image: TritonImage, known: Runtimes) -> str:
    """Why `image` cannot load `model`, without a full stop; empty where it can."""
    if model.backend is not Backend.TENSORRT:
        return known.misfit(image, model.needs, on_gpu=True)
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


def _loads(built: str, carried: str, *, is_compatible: bool) -> bool:
    """Whether TensorRT `carried` loads a plan of `built`; parts that one of them leaves out are not compared."""
    ours, theirs = version_numbers(built), version_numbers(carried)
    if len(ours) < 3 or len(theirs) < 3:
        return False
    if is_compatible:
        return ours[0] == theirs[0] and ours[:3] <= theirs[:3]
    return all(a == b for a, b in zip(ours, theirs, strict=False))


def _advice(model: ServedModel, known: Runtimes) -> str:
    """What to do instead, but nothing that was asked for already."""
    releases = listed(image.release for image in fitting_images(model, known))
    if model.backend is not Backend.TENSORRT:
        return f"It fits {releases}."  # one at least: no graph comes here that fits none
    instead = instead_of_plan(model.bundle)
    return f"It fits {releases}. {instead}" if releases else instead


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    given = list(words)
    return " and ".join([", ".join(given[:-1]), given[-1]] if len(given) > 1 else given)

"""What serves a repository: the Triton images that load its models, the server's flags, and its shared memory.

A plan loads only in the version of TensorRT that built it. A plan that was exported version compatible also loads in
newer versions of the same major version, with a flag of Triton. A graph needs an ONNX Runtime that implements its
opset. Which image carries what is in graph/runtimes.json.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from spach_deploy.graph.runtimes import Runtimes, TritonImage, version_numbers
from spach_deploy.options.specs import Flavour
from spach_deploy.packaging.triton.config import DATA_TYPES, byte_size
from spach_deploy.packaging.triton.options import Backend, TritonOptions
from spach_deploy.packaging.triton.served_model import RTX_REASON, ServedModel

PILLOW = "11.3.0"
"""A version with wheels for every Python in Triton's images, and with the resize of the versions before it."""

MEBI = 1 << 20
CACHE_BYTES = 1 << 30
"""Size of the response cache in the flags of a server."""

_LEAST_SHM, _STEP_SHM = 128 * MEBI, 64 * MEBI
_BATCHES_IN_SHM = 4


def fitting_images(model: ServedModel, known: Runtimes) -> tuple[TritonImage, ...]:
    """The images that can load `model`, oldest first."""
    return tuple(image for image in known.images if not misfit(model, image, known))


def misfit(model: ServedModel, image: TritonImage, known: Runtimes) -> str:
    """Why `image` cannot load `model`, without a full stop; empty where it can."""
    if model.backend is not Backend.TENSORRT:
        return known.misfit(image, model.needs, on_gpu=not model.on_cpu)
    built = model.bundle.manifest.engine.version
    if model.facts.flavour is Flavour.TENSORRT_RTX:
        return f"the engine is TensorRT for RTX {built}, and {RTX_REASON}"
    if image.tensorrt is None:
        return f"which TensorRT that image carries is not known, and the engine needs {built}"
    if not _loads(built, image.tensorrt, is_compatible=is_version_compatible(model)):
        return f"it carries TensorRT {image.tensorrt}, and the engine was built with {built or 'an unknown version'}"
    return ""


def is_version_compatible(model: ServedModel) -> bool:
    """Whether a plan is served that was exported with --version-compatible."""
    return model.backend is Backend.TENSORRT and model.bundle.manifest.engine.version_compatible


def _loads(built: str, carried: str, *, is_compatible: bool) -> bool:
    """Whether TensorRT `carried` loads a plan built by `built`; parts that either version lacks are not compared."""
    ours, theirs = version_numbers(built), version_numbers(carried)
    if len(ours) < 3 or len(theirs) < 3:
        return False
    if is_compatible:
        return ours[0] == theirs[0] and ours[:3] <= theirs[:3]
    return all(a == b for a, b in zip(ours, theirs, strict=False))


def server_flags(models: Sequence[ServedModel], options: TritonOptions) -> tuple[str, ...]:
    """The flags of tritonserver without which some of the options, or a model, would not work."""
    flags = []
    if options.response_cache:
        flags.append(f"--cache-config=local,size={CACHE_BYTES}")
    if options.rate_limiter:
        flags.append("--rate-limit=execution_count")
    if any(map(is_version_compatible, models)):
        flags.append("--backend-config=tensorrt,version-compatible=true")
    return tuple(flags)


def shared_memory_bytes(model: ServedModel, processes: int) -> int:
    """Shared memory through which `processes` of Python steps exchange tensors with the server."""
    tensor = model.inputs[0]
    sample = byte_size(DATA_TYPES[tensor.dtype], [size or 1 for size in tensor.shape[1:]]) or 0
    needed = processes * (_STEP_SHM + _BATCHES_IN_SHM * model.batch.max * sample)
    return math.ceil(max(_LEAST_SHM, needed) / (64 * MEBI)) * 64 * MEBI

"""How TensorRT for RTX starts an engine: its runtime cache, CUDA graphs, and specialization for shapes.

A process compiles kernels for its GPU when an engine is first used, unless the engine's context has a runtime cache
that holds them. `StartOptions` has the names of the C++ library's options.

Source: TensorRT for RTX Python API, "IRuntimeConfig", "IRuntimeCache", "CudaGraphStrategy",
"DynamicShapesKernelSpecializationStrategy".
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
from pathlib import Path
from typing import Any

from spach_deploy.common.errors import UnavailableError
from spach_deploy.common.files import Destination, is_own, user_cache
from spach_deploy.runtime.devices import LocalGpu

_FOLDER = "runtime"
_LARGEST_BYTES = 1 << 30


class Specialization(str, enum.Enum):
    """When kernels for the shapes of an input are compiled: meanwhile, before the first answer, or never."""

    LAZY = "lazy"
    EAGER = "eager"
    NONE = "none"


@dataclasses.dataclass(frozen=True)
class StartOptions:
    """`runtime_cache`: keep compiled kernels for later processes, in `runtime_cache_file` or, where that is None, in a
    file for the plan and the GPU in the user's cache folder. `cuda_graphs`: capture the engine as a CUDA graph for each
    batch size and replay it.
    """

    runtime_cache: bool = True
    runtime_cache_file: Path | None = None
    cuda_graphs: bool = False
    specialization: Specialization = Specialization.LAZY


COLD = StartOptions(runtime_cache=False)
"""Every start compiles."""


class RuntimeCache:
    """The kernels that TensorRT for RTX compiled for one engine, in a file.

    The file is replaced in one step, so that a process that reads it while another writes gets one of the two. A file
    of another user, of another GPU or version, or a damaged one is not used; the next `save` replaces it. `problem`
    says why the file was not used or not written, as a sentence; empty where all is well.
    """

    def __init__(self, cache: Any, file: Path) -> None:
        self._cache = cache
        self._file = file
        self._known = b""
        self.problem = ""

    def load(self) -> None:
        """Give the file's kernels to TensorRT, if there are any."""
        try:
            if not self._file.exists():
                return
            if not is_own(self._file):
                self.problem = f"The runtime cache {self._file} is another user's, or others may write it: not read."
                return
            if self._file.stat().st_size > _LARGEST_BYTES:
                self.problem = f"The runtime cache {self._file} is larger than any: not read."
                return
            self._known = self._file.read_bytes()
        except OSError as error:
            self.problem = f"The runtime cache {self._file} cannot be read: {error.strerror}."
            return
        if not self._cache.deserialize(self._known):
            self.problem = f"The runtime cache {self._file} is of another GPU or version, or damaged: not used."

    def save(self) -> None:
        """Write the kernels, unless the file holds them already. A full disk or a folder without access costs nothing
        but the warm start.
        """
        found = bytes(self._cache.serialize())
        if not found or found == self._known:
            return
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another process wrote it in this moment: as good as ours
                Destination.of(self._file).write(lambda file: file.write(found), mode=0o600)
        except OSError as error:
            self.problem = f"The runtime cache {self._file} cannot be written: {error.strerror}."


def cache_file(plan: bytes, gpu: LocalGpu, options: StartOptions) -> Path | None:
    """Where the runtime cache of a plan on a GPU is kept; None without one, also where there is no home directory."""
    if not options.runtime_cache:
        return None
    if options.runtime_cache_file is not None:
        return options.runtime_cache_file
    folder = user_cache()
    name = hashlib.sha256(plan).hexdigest()[:32]
    return None if folder is None else folder / _FOLDER / f"{name}-{gpu.capability}.cache"


def execution_context(
    tensorrt: Any, engine: Any, file: Path | None, options: StartOptions
) -> tuple[Any, RuntimeCache | None]:
    """An execution context of a TensorRT for RTX `engine`, and its runtime cache, which the caller saves at the end.

    UnavailableError where the installed version cannot do what the options ask for.
    """
    config = engine.create_runtime_config()
    cache = None
    if file is not None:
        kernels = config.create_runtime_cache()
        cache = RuntimeCache(kernels, file)
        cache.load()
        config.set_runtime_cache(kernels)
    if options.cuda_graphs:
        config.cuda_graph_strategy = tensorrt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    strategy = tensorrt.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = getattr(strategy, options.specialization.name)
    context = engine.create_execution_context(config)
    if context is None:
        raise UnavailableError("TensorRT for RTX makes no execution context of this engine here.")
    return context, cache

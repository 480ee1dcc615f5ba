"""How long a start may take and how much memory it needs, from the size of what is loaded. Generous on purpose.

A start that takes longer than it may is killed and begins again, for ever; one that is allowed too much costs nothing
where it succeeds. So the figures are those of a slow node: a disk on the network, an image that was just pulled.
"""

from __future__ import annotations

import dataclasses
import math

from spach_deploy.packaging.triton.ensemble import EnsembleStep
from spach_deploy.packaging.triton.options import Backend
from spach_deploy.packaging.triton.served_model import ServedModel
from spach_deploy.packaging.triton.tensors import DATA_TYPES, byte_size

MEBI, GIBI = 1 << 20, 1 << 30

SERVER_SECONDS = 180
"""For the server's process, some 2 GB of CUDA's libraries from a cold disk, the CUDA context and warm-up."""

BYTES_PER_SECOND = 20_000_000
"""Of a plan, read from a cold disk and brought to the GPU."""

GRAPH_FACTOR = 2
"""ONNX Runtime optimizes a graph after it has read it, and looks for the fastest convolutions."""

PROBE_SECONDS = 5

_SERVER_BYTES = 4 * GIBI  # libraries of CUDA, and what their context takes on the host
_COPIES = 3  # of the model in host memory while it is loaded: file, parsed, converted
_STEP_BYTES = GIBI  # a Python process of an ensemble's step, with NumPy and Pillow
_LEAST_SHM, _STEP_SHM = 128 * MEBI, 64 * MEBI
_BATCHES_IN_SHM = 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a pod of one model needs. `artifact_bytes`: of the plan or graph; `instances`: of it on a GPU."""

    artifact_bytes: int
    startup_seconds: int
    memory_bytes: int
    shm_bytes: int
    arithmetic: str

    @property
    def startup_probes(self) -> int:
        """How often the start-up probe may fail."""
        return math.ceil(self.startup_seconds / PROBE_SECONDS)

    @classmethod
    def of(cls, model: ServedModel, steps: tuple[EnsembleStep, ...] = ()) -> Sizes:
        """For `model` with the steps of an ensemble around it."""
        size = sum(version.artifact.stat().st_size for version in model.versions)
        processes = sum(step.source is not None for step in steps)
        shm = _shm_bytes(model, processes)
        seconds, arithmetic = _startup(size, is_graph=model.backend is not Backend.TENSORRT)
        memory = _SERVER_BYTES + _COPIES * size + processes * _STEP_BYTES + shm
        return cls(size, seconds, memory, shm, arithmetic)


def _startup(size: int, *, is_graph: bool) -> tuple[int, str]:
    factor = GRAPH_FACTOR if is_graph else 1
    loading = math.ceil(factor * size / BYTES_PER_SECOND)
    times = f"{factor} x " if is_graph else ""
    rate = f"{BYTES_PER_SECOND // 1_000_000} MB/s"
    seconds = _up_to(SERVER_SECONDS + loading, 2 * PROBE_SECONDS)
    return seconds, f"{SERVER_SECONDS} s + {times}{size / 1e6:.1f} MB at {rate}, rounded up to {seconds} s"


def _shm_bytes(model: ServedModel, processes: int) -> int:
    """Python steps hand tensors to the server through shared memory."""
    tensor = model.inputs[0]
    sample = byte_size(DATA_TYPES[tensor.dtype], [size or 1 for size in tensor.shape[1:]]) or 0
    needed = processes * (_STEP_SHM + _BATCHES_IN_SHM * model.batch.max * sample)
    return _up_to(max(_LEAST_SHM, needed), 64 * MEBI)


def _up_to(value: int, step: int) -> int:
    return math.ceil(value / step) * step


def quantity(size: int) -> str:
    """Bytes as Kubernetes writes them, rounded up: whole gibibytes from 4 of them, mebibytes below."""
    return f"{math.ceil(size / GIBI)}Gi" if size >= 4 * GIBI else f"{math.ceil(size / MEBI)}Mi"

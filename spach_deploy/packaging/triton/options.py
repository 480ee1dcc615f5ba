"""Options of a Triton model repository, as frozen objects."""

from __future__ import annotations

import dataclasses
import enum
import re
from pathlib import Path

from spach_deploy.common.errors import UsageError

KIND_AUTO, KIND_GPU, KIND_CPU, KIND_MODEL = range(4)
"""Triton's numbers for the kind of an instance group."""


class Backend(str, enum.Enum):
    """The Triton backend that runs a model. `auto`: TensorRT where Triton can load the bundle's plan."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    ONNXRUNTIME = "onnxruntime"

    @property
    def platform(self) -> str:
        """Triton's `platform` of the backend."""
        return {"tensorrt": "tensorrt_plan", "onnxruntime": "onnxruntime_onnx"}[self.value]

    @property
    def file_name(self) -> str:
        """The file that the backend loads by default."""
        return {"tensorrt": "model.plan", "onnxruntime": "model.onnx"}[self.value]


class Device(str, enum.Enum):
    """Where a model's instances run. `auto`: on GPUs if the server has any, else on the CPU."""

    AUTO = "auto"
    GPU = "gpu"
    CPU = "cpu"


class Accelerator(str, enum.Enum):
    """A provider by which Triton's ONNX Runtime backend runs a graph on a GPU, before its own CUDA kernels."""

    TENSORRT = "tensorrt"


class EnsembleInput(str, enum.Enum):
    """What a client of the ensemble sends: the bytes of an image file, or RGB pixels in the model's input size."""

    BYTES = "bytes"
    PIXELS = "pixels"


@dataclasses.dataclass(frozen=True)
class Instances:
    """Instances of a model. `count`: on each GPU; `gpus` empty: on all GPUs; `device` None: as the backend needs."""

    count: int = 1
    device: Device | None = None
    gpus: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"--instances {self.count} serves nothing.", "Give a number from 1.")
        if self.gpus and self.device is Device.CPU:
            raise UsageError("--gpus contradicts --device cpu.", "Leave one of them out.")


@dataclasses.dataclass(frozen=True)
class VersionPolicy:
    """Which versions are served: the `latest` N, `all`, or `specific` ones."""

    latest: int | None = None
    specific: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> VersionPolicy:
        """`latest`, `latest:N`, `all` or `specific:1,3`. UsageError for anything else."""
        if text == "all":
            return cls()
        if match := re.fullmatch(r"latest(?::([1-9]\d{0,5}))?", text):
            return cls(latest=int(match[1] or 1))
        if match := re.fullmatch(r"specific:([1-9]\d{0,8}(?:,[1-9]\d{0,8})*)", text):
            return cls(specific=tuple(int(number) for number in match[1].split(",")))
        raise UsageError(f"--version-policy {text!r} is none.", "Give latest, latest:N, all or specific:1,3.")

    def serves(self, versions: tuple[int, ...]) -> tuple[int, ...]:
        """The subset of `versions` that is served."""
        if self.specific:
            return tuple(version for version in versions if version in self.specific)
        return versions if self.latest is None else tuple(sorted(versions)[-self.latest :])


@dataclasses.dataclass(frozen=True)
class Batching:
    """Whether the server joins requests to batches, and how long a request may wait for others, in microseconds."""

    dynamic: bool = True
    queue_delay_us: int = 500


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Steps around the model, so that a client sends an image and gets its `top_k` best classes with labels.

    `top_k` None: 5, or all where there are fewer.
    """

    input: EnsembleInput = EnsembleInput.BYTES
    top_k: int | None = None


@dataclasses.dataclass(frozen=True)
class TritonOptions:
    """All options of `spach-package triton`. `force`: accept files that no known Triton image can load.

    `engine_cache`: folder on the server, in which the accelerator keeps its engines.
    """

    backend: Backend = Backend.AUTO
    accelerator: Accelerator | None = None
    engine_cache: str | None = None
    force: bool = False
    instances: Instances = Instances()
    batching: Batching = Batching()
    version_policy: VersionPolicy | None = None
    response_cache: bool = False
    warm_up: bool = True
    labels: Path | None = None
    ensemble: Ensemble | None = None

    def __post_init__(self) -> None:
        if self.engine_cache is not None and self.accelerator is None:
            raise UsageError("--engine-cache needs --accelerator tensorrt.", "Give both, or leave it out.")
        if self.accelerator is None:
            return
        if self.backend is Backend.TENSORRT:
            raise UsageError(
                "--accelerator is of ONNX Runtime, and --backend tensorrt serves a plan.", "Leave one of them out."
            )
        if self.instances.device is Device.CPU:
            raise UsageError("--accelerator tensorrt runs on GPUs alone.", "Leave --device cpu out.")

"""Options of a Triton model repository, as frozen objects."""

from __future__ import annotations

import dataclasses
import enum
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from spach_deploy.common.errors import UsageError
from spach_deploy.options.command_line import words_of
from spach_deploy.options.table import TRITON, options_of

KIND_AUTO, KIND_GPU, KIND_CPU, KIND_MODEL = range(4)
"""Triton's numbers for the kind of an instance group."""


MOUNT = PurePosixPath("/models")
"""Where a server has the repository, read-only."""


def is_mounted_over(folder: str) -> bool:
    """Whether a folder on the server is in the repository that is mounted there."""
    path = PurePosixPath(posixpath.normpath(folder))
    return MOUNT in (path, *path.parents)


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


PREPROCESS_INSTANCES = 4
"""Instances of a step that decodes pictures, which is a process each, of one core. A picture takes about 8 ms of it
(benchmarks/preprocess_instances.py), so that one instance alone would leave a GPU waiting. Four use four cores, which
the smallest servers with a GPU have; more than there are cores take memory, about 25 MB each, and no more time."""

_MODEL = r"(?:([^:=]+):)?"
"""A model's name before a setting that is for it alone."""


@dataclasses.dataclass(frozen=True)
class ModelNumber:
    """A number for one model of the repository, an ensemble's step or a served model. `model` None: for every served
    model, steps left out."""

    value: int
    model: str | None = None

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{f'{self.model}:' if self.model else ''}{self.value}"

    @classmethod
    def parse(cls, text: str, option: str, failure: str) -> ModelNumber:
        """Parse `N` or `MODEL:N`, N from 1. UsageError for anything else, with `failure` at the end of its sentence."""
        match = re.fullmatch(rf"{_MODEL}([1-9]\d{{0,5}})", text, re.ASCII)
        if match is None:
            raise UsageError(f"{option} {text} {failure}.", "Give a number from 1, for one model MODEL:N.")
        return cls(int(match[2]), match[1])


@dataclasses.dataclass(frozen=True)
class Instances:
    """Instances of a model. `count`: on each GPU; `gpus` empty: on all GPUs; `device` None: as the backend needs.

    `named`: other counts, of the models that they name.
    """

    count: int = 1
    device: Device | None = None
    gpus: tuple[int, ...] = ()
    named: tuple[ModelNumber, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"--instances {self.count} serves nothing.", "Give a number from 1.")
        if self.gpus and self.device is Device.CPU:
            raise UsageError("--gpus contradicts --device cpu.", "Leave one of them out.")

    @classmethod
    def parse(cls, texts: Iterable[str], device: Device | None = None, gpus: tuple[int, ...] = ()) -> Instances:
        """Parse values of --instances. UsageError for one that is no number from 1."""
        given = [ModelNumber.parse(text, "--instances", "serves nothing") for text in texts]
        counts = [number.value for number in given if number.model is None]
        return cls(counts[-1] if counts else 1, device, gpus, tuple(n for n in given if n.model is not None))

    def count_of(self, model: str, default: int) -> int:
        """Instances of a model; `default` where none are given for it by name."""
        return next((number.value for number in reversed(self.named) if number.model == model), default)


@dataclasses.dataclass(frozen=True)
class Resource:
    """What an instance must get of Triton's rate limiter before it runs. `is_global`: the server has one stock of it,
    not one for each device. `model`: as in `ModelNumber`."""

    name: str
    count: int
    is_global: bool = False
    model: str | None = None

    def __str__(self) -> str:
        """As `parse` reads it."""
        model, end = f"{self.model}:" if self.model else "", ":global" if self.is_global else ""
        return f"{model}{self.name}={self.count}{end}"

    @classmethod
    def parse(cls, text: str) -> Resource:
        """Parse `NAME=COUNT`, `MODEL:NAME=COUNT`, either with `:global` behind it. UsageError for anything else."""
        match = re.fullmatch(rf"{_MODEL}([A-Za-z0-9_.-]+)=([1-9]\d{{0,8}})(:global)?", text, re.ASCII)
        if match is None:
            raise UsageError(
                f"--rate-limit-resource {text!r} is no resource.",
                "Give NAME=COUNT, such as gpu=1, for one model MODEL:NAME=COUNT; :global behind it shares it.",
            )
        return cls(match[2], int(match[3]), match[4] is not None, match[1])


@dataclasses.dataclass(frozen=True)
class RateLimiter:
    """What Triton's rate limiter is told: resources, and priorities, where 2 gets half as many turns as 1."""

    resources: tuple[Resource, ...] = ()
    priorities: tuple[ModelNumber, ...] = ()

    def __post_init__(self) -> None:
        kinds: dict[str, bool] = {}
        for resource in self.resources:
            if kinds.setdefault(resource.name, resource.is_global) is not resource.is_global:
                raise UsageError(
                    f"--rate-limit-resource: {resource.name} is global for one model and not for another.",
                    "Triton takes a resource as one of the two: give :global to all of them, or to none.",
                )
        named = [(resource.model, resource.name) for resource in self.resources]
        if twice := next((pair[1] for pair in named if named.count(pair) > 1), None):
            raise UsageError(f"--rate-limit-resource {twice} is given twice for a model.", "Give it once.")

    @classmethod
    def parse(cls, resources: Iterable[str], priorities: Iterable[str]) -> RateLimiter:
        """Parse values of --rate-limit-resource and --rate-limit-priority. UsageError for one that cannot be read."""
        option = "--rate-limit-priority"
        return cls(
            tuple(map(Resource.parse, resources)),
            tuple(ModelNumber.parse(text, option, "is no priority") for text in priorities),
        )

    def __bool__(self) -> bool:
        return bool(self.resources or self.priorities)

    def resources_of(self, model: str, *, is_step: bool) -> tuple[Resource, ...]:
        """The resources that a model needs: those for it by name win over those for every served model."""
        general = {r.name: r for r in self.resources if r.model is None and not is_step}
        return tuple({**general, **{r.name: r for r in self.resources if r.model == model}}.values())

    def priority_of(self, model: str, *, is_step: bool) -> int | None:
        """The priority of a model; None where none is given for it."""
        named = [p.value for p in self.priorities if p.model == model]
        general = [p.value for p in self.priorities if p.model is None and not is_step]
        return next(reversed(named or general), None)


@dataclasses.dataclass(frozen=True)
class VersionPolicy:
    """Which versions are served: the `latest` N, `all`, or `specific` ones."""

    latest: int | None = None
    specific: tuple[int, ...] = ()

    def __str__(self) -> str:
        """As `parse` reads it."""
        if self.specific:
            return f"specific:{','.join(map(str, self.specific))}"
        return "all" if self.latest is None else f"latest:{self.latest}"

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

    `engine_cache`: folder on the server, in which each model gets a folder for the engines of the accelerator.
    """

    backend: Backend = Backend.AUTO
    accelerator: Accelerator | None = None
    engine_cache: str | None = None
    force: bool = False
    instances: Instances = Instances()
    rate_limiter: RateLimiter = RateLimiter()
    batching: Batching = Batching()
    version_policy: VersionPolicy | None = None
    response_cache: bool = False
    warm_up: bool = True
    labels: Path | None = None
    ensemble: Ensemble | None = None

    def __post_init__(self) -> None:
        if self.engine_cache is not None and self.accelerator is None:
            raise UsageError("--engine-cache needs --accelerator tensorrt.", "Give both, or leave it out.")
        if self.engine_cache is not None and not re.fullmatch(r"/[^:\0-\x1f]*", self.engine_cache):
            raise UsageError(
                f"--engine-cache {self.engine_cache!r} is no folder of a server.",
                "Give an absolute path, such as /engines.",
            )
        if self.engine_cache is not None and is_mounted_over(self.engine_cache):
            raise UsageError(
                f"--engine-cache {self.engine_cache} is below {MOUNT}, where the server has the repository, read-only.",
                "Give a folder elsewhere.",
            )
        if self.accelerator is None:
            return
        if self.backend is Backend.TENSORRT:
            raise UsageError(
                "--accelerator is of ONNX Runtime, and --backend tensorrt serves a plan.", "Leave one of them out."
            )
        if self.instances.device is Device.CPU:
            raise UsageError("--accelerator tensorrt runs on GPUs alone.", "Leave --device cpu out.")

    def for_cpu(self) -> TritonOptions:
        """These options for bundles of --target cpu: instances run on the CPU unless an option says where."""
        instances = self.instances
        if self.accelerator is not None or instances.device is not None or instances.gpus:
            return self
        return dataclasses.replace(self, instances=dataclasses.replace(instances, device=Device.CPU))

    @property
    def named_models(self) -> tuple[tuple[str, str], ...]:
        """The models that options name, each with its option."""
        numbers = [("--instances", number.model) for number in self.instances.named]
        numbers += [("--rate-limit-resource", resource.model) for resource in self.rate_limiter.resources]
        numbers += [("--rate-limit-priority", number.model) for number in self.rate_limiter.priorities]
        return tuple((option, model) for option, model in numbers if model is not None)

    def words(self) -> list[str]:
        """The words of spach-package triton that give these options; what is as by default is left out."""
        instances, limiter, ensemble = self.instances, self.rate_limiter, self.ensemble
        counts = [*([str(instances.count)] if instances.count != 1 else []), *map(str, instances.named)]
        given = {
            "backend": self.backend,
            "accelerator": self.accelerator,
            "engine_cache": self.engine_cache,
            "force": self.force,
            "instances": counts,
            "rate_limit_resource": limiter.resources,
            "rate_limit_priority": limiter.priorities,
            "device": instances.device,
            "gpus": instances.gpus,
            "no_dynamic_batching": not self.batching.dynamic,
            "queue_delay_us": self.batching.queue_delay_us,
            "version_policy": self.version_policy,
            "response_cache": self.response_cache,
            "no_warm_up": not self.warm_up,
            "labels": self.labels,
            "ensemble": ensemble is not None,
            "ensemble_input": ensemble.input if ensemble is not None and ensemble.input is not Ensemble.input else None,
            "top_k": ensemble.top_k if ensemble is not None else None,
        }
        options = {option.key: option for option in options_of(TRITON)}
        chosen = {
            key: value for key, value in given.items() if value not in (None, False, [], (), options[key].default)
        }
        return [word for key, value in chosen.items() for word in words_of(options[key], value)]

"""Checks and estimates before an export: `refuse_early`, and spach-export --dry-run.

PyTorch is imported only to read a checkpoint, so that a mistyped name is refused at once. `pipeline.export` makes the
same checks again, for callers other than the command.

Estimates of time and memory are linear fits to exports of ms_trans_xxs and ms_hybrid_s on two cores of a server
(`_SECONDS`, `_BASE_BYTES`, `_BYTES_PER_PARAMETER`). More cores take less time; the proportions hold.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.bundle.store import check_target, default_directory
from spach_deploy.common.errors import SpachError
from spach_deploy.common.files import Destination
from spach_deploy.common.machine import available_threads, find_memory
from spach_deploy.engine.flavours import EngineFlavour, choose_flavour
from spach_deploy.models.hyperparameters import with_hyperparameters
from spach_deploy.models.registry import check_spec, known_name, model_size, requested
from spach_deploy.options.quantization import check_quantization
from spach_deploy.options.specs import ExportOptions, ModelSpec, Precision, sides
from spach_deploy.pipeline.cache import ExportCache

if TYPE_CHECKING:
    from spach_deploy.models.checkpoint import LoadedModel

MEASURED_CORES = 2

_RANGES, _VALIDATION, _ENGINE = "measure ranges", "validate the graph", "build the engine, alongside"

_SECONDS: dict[str, tuple[float, float]] = {
    "load PyTorch and the model": (1.8, 0.03),
    "reference, bounds, alongside": (0.5, 0.55),
    "rewrite the model": (0.1, 0.07),
    "export the graph": (1.5, 0.03),
    "calibrate": (1.0, 0.028),
    "give the graph its form": (0.1, 0.06),
    _RANGES: (0.2, 0.33),
    _VALIDATION: (0.4, 0.29),
    _ENGINE: (2.0, 0.36),
    "write the bundle": (0.4, 0.02),
}
"""For each step: seconds, and seconds per billion multiply-adds (for calibration, of each image)."""

_BATCH_SECONDS = 0.0155
"""Seconds per billion multiply-adds for an image of the `opt` and `max` batches, which are validated too."""

_BASE_BYTES, _BYTES_PER_PARAMETER = 1.2e9, 37.0
"""Memory of all processes: constant for Python, PyTorch and the compiler; per parameter for weights, graphs, engine."""

_WEIGHT_BYTES = {Precision.FP32: 4.0, Precision.FP16: 2.0, Precision.BF16: 2.0, Precision.INT8: 1.3, Precision.FP8: 1.3}
"""Bytes of a weight in an engine plan."""

_GOLDEN_IMAGES = 8
_UNKNOWN = "told by the checkpoint"


@dataclasses.dataclass(frozen=True)
class EstimatedStep:
    """A step that would run. `seconds` None: the model is not known yet."""

    name: str
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What an export would do. `refusals`: the errors that would stop it; `exit_code` is that of the first.

    `facts`: lines of the plan, by name; `notes`: how the checkpoint was read. `is_reused`: the bundle would come from
    the cache. `seconds`, `memory_bytes`, `disk_bytes`: estimates, None where the model is not known yet.
    `free_memory_bytes`: None where the system does not tell.
    """

    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    steps: tuple[EstimatedStep, ...]
    is_reused: bool
    seconds: float | None
    memory_bytes: float | None
    disk_bytes: float | None
    free_memory_bytes: int | None
    free_disk_bytes: int
    refusals: tuple[SpachError, ...]

    @property
    def exit_code(self) -> int:
        """0 where the export would run, else the exit code of the first refusal."""
        return self.refusals[0].exit_code if self.refusals else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        fields = dataclasses.asdict(dataclasses.replace(self, refusals=()))
        refusals = [
            {"message": error.message, "hint": error.hint, "exit_code": error.exit_code} for error in self.refusals
        ]
        return {**fields, "facts": dict(self.facts), "refusals": refusals, "exit_code": self.exit_code}


@dataclasses.dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint shows: the model with its name, image size and classes filled in, and notes on the reading.

    `loaded`: a module of the user's own, whose outputs no table has.
    """

    model: ModelSpec
    notes: tuple[str, ...]
    loaded: LoadedModel | None = None


def read_facts(model: ModelSpec) -> CheckpointFacts:
    """Load the checkpoint, or make the user's module, as an export would. Raises what `own_module.load` raises."""
    from spach_deploy.models.hyperparameters import lines
    from spach_deploy.models.own_module import load

    loaded = load(model)
    if model.module is not None:
        return CheckpointFacts(model, (*loaded.notes, *lines(loaded.settings)), loaded)
    complete = dataclasses.replace(
        model,
        name=loaded.name,
        architecture=loaded.architecture,
        image_size=loaded.image_size,
        num_classes=loaded.num_classes,
    )
    return CheckpointFacts(complete, (*loaded.notes, *lines(loaded.settings)))


ReadFacts = Callable[[ModelSpec], CheckpointFacts]


def dry_run(options: ExportOptions, *, is_cached: bool = True, read: ReadFacts | None = read_facts) -> DryRun:
    """Collect everything that an export with `options` would refuse, and estimate what it would take.

    `read` reads a checkpoint, for which PyTorch is imported; None leaves checkpoints unread. `is_cached`: look in the
    cache of finished exports.
    """
    refusals: list[SpachError] = []
    given = options
    options, notes = _with_checkpoint_facts(given, read, refusals)
    flavour = _checked(options, refusals)
    images = _counted(options.images, refusals)
    calibration = _counted(options.quantization.calibration, refusals)
    macs, parameters, values = _model(options)
    target = _target(options)
    is_reused = _is_reused(given, is_cached=is_cached) if not refusals else False
    memory = find_memory()
    steps = () if is_reused else tuple(_steps(options, flavour is not None, calibration, macs))
    return DryRun(
        facts=tuple(_facts(options, flavour, images, calibration, target)),
        notes=notes,
        steps=steps,
        is_reused=is_reused,
        seconds=1.0 if is_reused else _total_seconds(steps, options) if macs is not None else None,
        memory_bytes=None if parameters is None else _BASE_BYTES + _BYTES_PER_PARAMETER * parameters,
        disk_bytes=None if parameters is None else _disk(options, flavour is not None, parameters, values),
        free_memory_bytes=None if memory is None else memory.available_bytes,
        free_disk_bytes=shutil.disk_usage(_existing(target or Path.cwd())).free,
        refusals=tuple(refusals),
    )


def refuse_early(options: ExportOptions) -> Destination | None:
    """Raise the SpachError that `pipeline.export` would raise for model, options, engine or target.

    Returns the bundle's destination; None where the checkpoint has yet to tell which model it is.
    """
    check_spec(options.model)
    check_quantization(options)
    _check_opset(options)
    _flavour(options)
    return _destination(options)


def target_directory(options: ExportOptions) -> Path | None:
    """The path of the bundle; None where the checkpoint has yet to tell which model it is."""
    name = None if options.output is not None else known_name(options.model)
    return options.output if name is None else default_directory(name, options.precision.value)


def _flavour(options: ExportOptions) -> EngineFlavour | None:
    """The TensorRT flavour that would build the engine; raises where it cannot honour the options."""
    flavour = choose_flavour(options.engine.flavour)
    if flavour is not None:
        resolved = flavour.resolve(options.engine, options.precision)
        if options.precision.is_quantized:
            flavour.resolve(resolved, options.rest)
    return flavour


def _destination(options: ExportOptions) -> Destination | None:
    target = target_directory(options)
    return None if target is None else check_target(target, overwrite=options.overwrite)


def _with_checkpoint_facts(
    options: ExportOptions, read: ReadFacts | None, refusals: list[SpachError]
) -> tuple[ExportOptions, tuple[str, ...]]:
    """The options completed from the checkpoint, and notes on it; unchanged where no checkpoint can be read."""
    try:
        check_spec(options.model)
        if (options.model.checkpoint is None and options.model.module is None) or read is None:
            _check_outputs(options)
            return options, ()
        facts = read(options.model)
        _check_outputs(dataclasses.replace(options, model=facts.model), facts.loaded)
    except SpachError as error:
        refusals.append(error)
        return options, ()
    return dataclasses.replace(options, model=facts.model), facts.notes


def _check_outputs(options: ExportOptions, own: LoadedModel | None = None) -> None:
    """UsageError for outputs that the model, or the user's `own` module, cannot give, and for hyperparameters that the
    model cannot have.
    """
    from spach_deploy.bundle.outputs import chosen_outputs
    from spach_deploy.graph.interface import check_outputs

    if own is not None:
        from spach_deploy.models.own_module import OwnForward, choose_outputs

        if isinstance(own.model, OwnForward):
            choose_outputs(own.model, options.outputs)
        check_outputs(options.outputs, own.num_classes)
    if (architecture := requested(options.model)) is not None:
        with_hyperparameters(architecture, options.model.hyperparameters)
        stages = [(dim, *grid) for dim, grid in zip(architecture.stage_dims, architecture.grids, strict=True)]
        chosen_outputs(options.outputs, architecture.classes, stages)
        check_outputs(options.outputs, architecture.classes)


def _checked(options: ExportOptions, refusals: list[SpachError]) -> EngineFlavour | None:
    """The flavour that would build the engine; errors of quantization, opset, engine and target go to `refusals`."""
    _collected(lambda: check_quantization(options), refusals)
    _collected(lambda: _check_opset(options), refusals)
    if _target(options) is not None:  # an unknown model has been refused already
        _collected(lambda: _destination(options), refusals)
    if options.answers is not None:
        from spach_deploy.validation.user_answers import read_answers

        _collected(functools.partial(read_answers, options.answers), refusals)
    flavours: list[EngineFlavour | None] = []
    _collected(lambda: flavours.append(_flavour(options)), refusals)
    return flavours[0] if flavours else None


def _check_opset(options: ExportOptions) -> None:
    if options.opset is not None:
        from spach_deploy.graph.opset import check_opset

        check_opset(options)


def _collected(check: Callable[[], object], refusals: list[SpachError]) -> None:
    try:
        check()
    except SpachError as error:
        refusals.append(error)


def _counted(path: Path | None, refusals: list[SpachError]) -> int | None:
    """The number of images at a path; None where there is no path, or the number is not known before reading."""
    if path is None or path.suffix == ".json":
        return None
    from spach_deploy.data.readers import open_images

    try:
        return open_images(path).count
    except SpachError as error:
        refusals.append(error)
        return None


def _model(options: ExportOptions) -> tuple[float | None, float | None, int]:
    """Billions of multiply-adds, number of parameters, and of values in an image; None where the checkpoint decides."""
    size = options.model.image_size or 224
    values = 3 * math.prod(sides(size))
    try:
        architecture = requested(options.model)
        if architecture is None:
            return None, None, values
        counted = model_size(architecture)
        return counted.macs / 1e9, counted.parameters, architecture.channels * math.prod(architecture.image_size)
    except (SpachError, KeyError):
        return None, None, values


def _target(options: ExportOptions) -> Path | None:
    try:
        return target_directory(options)
    except SpachError:
        return None


def _is_reused(options: ExportOptions, *, is_cached: bool) -> bool:
    cache = ExportCache.of(options, is_used=is_cached)
    return cache.store is not None and cache.key in {entry.key for entry in cache.store.entries()}


def _steps(options: ExportOptions, has_engine: bool, images: int | None, macs: float | None) -> Iterator[EstimatedStep]:
    cores = available_threads()
    for name, (base, slope) in _SECONDS.items():
        if name == "calibrate" and not options.precision.is_quantized:
            continue
        if "engine" in name and not has_engine:
            continue
        times = images or 0 if name == "calibrate" else 1
        if name == _VALIDATION:
            slope += _BATCH_SECONDS * sum({options.engine.batch.opt, options.engine.batch.max})
        yield EstimatedStep(name, None if macs is None else base + slope * macs * times * MEASURED_CORES / cores)


def _total_seconds(steps: tuple[EstimatedStep, ...], options: ExportOptions) -> float:
    """Wall time: the steps one after another, and what is left of the engine build when they end."""
    seconds = {step.name: step.seconds or 0.0 for step in steps}
    alongside = seconds[_VALIDATION] + (0.0 if options.precision.is_quantized else seconds[_RANGES])
    left = max(0.0, seconds.get(_ENGINE, 0.0) - alongside)
    return left + sum(taken for name, taken in seconds.items() if "alongside" not in name)


def _disk(options: ExportOptions, has_engine: bool, parameters: float, values: int) -> float:
    graph = parameters * (4.0 if options.rest is Precision.FP32 else 2.0)
    plan = parameters * _WEIGHT_BYTES[options.precision] if has_engine else 0.0
    return graph + plan + _GOLDEN_IMAGES * values * 4 + 1e6


def _facts(
    options: ExportOptions,
    flavour: EngineFlavour | None,
    images: int | None,
    calibration: int | None,
    target: Path | None,
) -> Iterator[tuple[str, str]]:
    described = options.model.architecture is not None and options.model.name is None
    named = options.model.name or options.model.module
    yield "model", named or (f"as in {options.model.architecture}" if described else _UNKNOWN)
    without = "demo weights" if options.model.module is None else "those that your code makes"
    yield "weights", str(options.model.checkpoint or without)
    yield "precision", options.precision.value
    yield "opset", str(options.graph_opset)
    yield "engine", "none" if flavour is None else flavour.flavour.value
    yield "images", _number(options.images, images, f"the {_GOLDEN_IMAGES} built-in photographs")
    if options.precision.is_quantized:
        yield "calibration", _number(options.quantization.calibration, calibration, "none")
    yield "bundle", f"{target}{' (replaced)' if target is not None and target.exists() else ''}" if target else _UNKNOWN


def _number(path: Path | None, count: int | None, otherwise: str) -> str:
    if path is None:
        return otherwise
    return f"{path}" if count is None else f"{count:,} in {path}"


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)

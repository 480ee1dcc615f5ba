"""Planning a zoo: the exports for models x precisions x groups of GPUs, with options, checkpoints and estimates."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spach_deploy.common.errors import CheckpointError, ModelError, SpachError, UsageError
from spach_deploy.common.files import Destination
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.models.registry import resolve
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.quantization import CALIBRATION_SUFFIX
from spach_deploy.options.recipe import value_of
from spach_deploy.options.specs import ExportOptions, Precision
from spach_deploy.options.table import filling
from spach_deploy.pipeline.estimate import DryRun, dry_run, read_facts

_SHOWN = 3

_MEMORY_MARGIN = 1.5
"""Factor on the memory estimate, which does not cover every peak of an export with an engine build at the same time."""


@dataclasses.dataclass(frozen=True)
class ZooEntry:
    """One bundle of the zoo. `gpus`: as for --gpu, such as `sm86,sm89`; None for the engine's default."""

    model: str
    precision: Precision
    gpus: str | None

    @property
    def name(self) -> str:
        """The bundle's directory: `ms_conv_s-fp16-sm89`, or `ms_conv_s-fp16` where no GPU was named."""
        gpus = () if self.gpus is None else parse_gpus(self.gpus)
        return "-".join([self.model, self.precision.value, *map(str, gpus)])


@dataclasses.dataclass(frozen=True)
class Build:
    """An export to run, with the estimates of `pipeline.estimate` for it.

    `destination`: where its bundle goes, with the content that may be replaced; None until that was looked at.
    """

    choice: ZooEntry
    options: ExportOptions
    seconds: float
    memory_bytes: float
    disk_bytes: float
    destination: Destination | None = None

    @property
    def name(self) -> str:
        """The bundle's directory."""
        return self.choice.name


def choices(models: str, precisions: Sequence[str], gpus: str | None) -> tuple[ZooEntry, ...]:
    """All combinations, models first. Raises UsageError for an unknown model, precision or GPU.

    `models`: names and fnmatch patterns, separated by commas. `gpus`: separated by commas, each for a bundle of its
    own; `+` joins GPUs that share a bundle (`sm86+sm89,sm120` gives two bundles).
    """
    axes = (models_matching(models), _precisions(precisions), gpu_groups(gpus))
    return tuple(ZooEntry(*each) for each in itertools.product(*axes))


def models_matching(patterns: str) -> tuple[str, ...]:
    """Names of models in the order of `ARCHITECTURES`, each once. ModelError for a pattern that matches none."""
    names: set[str] = set()
    for pattern in _parts(patterns, "--zoo names no model.", "Give --zoo 'ms_*', or names with commas between."):
        names.update(_matching(pattern))
    return tuple(name for name in ARCHITECTURES if name in names)


def _matching(pattern: str) -> list[str]:
    if not any(sign in pattern for sign in "*?["):
        return [resolve(pattern)]
    matching = fnmatch.filter(ARCHITECTURES, pattern)
    if not matching:
        raise ModelError(f"--zoo {pattern!r} matches no model.", "spach-export --list shows their names.")
    return matching


def _precisions(values: Sequence[str]) -> tuple[Precision, ...]:
    known = [precision.value for precision in Precision]
    for value in values:
        if value not in known:
            raise UsageError(f"--precision {value!r} is unknown.", f"One or more of {', '.join(known)}.")
    return tuple(map(Precision, dict.fromkeys(values)))


def gpu_groups(text: str | None) -> tuple[str | None, ...]:
    """The GPUs of each bundle, as for --gpu; one None where none was named."""
    if text is None:
        return (None,)
    parts = _parts(text, "--gpu names no GPU.", "Give --gpu sm86,sm89 or card names such as rtx4090.")
    groups = [",".join(map(str, parse_gpus(part.replace("+", ",")))) for part in parts]
    return tuple(dict.fromkeys(groups))


def _parts(text: str, nothing: str, hint: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError(nothing, hint)
    return parts


def build_matrix(
    chosen: Sequence[ZooEntry], options_of: Callable[[ZooEntry], ExportOptions], *, reads_checkpoints: bool = False
) -> tuple[Build, ...]:
    """Plan every export, with the checks of --dry-run. Raises the first error, with the names of the refused bundles.

    `reads_checkpoints`: read each checkpoint once for the estimates; otherwise checkpoints are left to the exports.
    """
    builds, refused = [], []
    read = functools.cache(read_facts) if reads_checkpoints else None
    for choice in chosen:
        options = options_of(choice)
        _check_shared(options, len(chosen))
        found = dry_run(dataclasses.replace(options, overwrite=True), is_cached=False, read=read)
        refused += [(choice.name, error) for error in found.refusals[:1]]
        builds.append(_build(choice, options, found))
    if refused:
        raise _refusal(refused, len(chosen))
    return tuple(builds)


def _build(choice: ZooEntry, options: ExportOptions, found: DryRun) -> Build:
    memory = _MEMORY_MARGIN * (found.memory_bytes or 0.0)
    return Build(choice, options, found.seconds or 0.0, memory, found.disk_bytes or 0.0)


def _check_shared(options: ExportOptions, count: int) -> None:
    """UsageError for files that belong to one export and cannot serve several."""
    calibration = options.quantization.calibration
    for option in filling():
        if option.zoo_refusal and (value := value_of(options, option.field)) is not None:
            raise UsageError(option.zoo_refusal.format(flag=option.flag, value=value), "Leave it out.")
    if count > 1 and calibration is not None and calibration.suffix == CALIBRATION_SUFFIX:
        raise UsageError(
            f"{calibration} is the calibration of one model and precision, and --zoo makes {count} bundles.",
            "Give --calibration a folder of images.",
        )


def _refusal(refused: list[tuple[str, SpachError]], total: int) -> SpachError:
    """The first error; where not all bundles are refused, with the names of those that are."""
    error = refused[0][1]
    if len(refused) < total:
        error.message = f"{', '.join(_named([name for name, _ in refused]))}: {error.message}"
    return error


def _named(names: Sequence[str]) -> Iterator[str]:
    yield from names[:_SHOWN]
    if len(names) > _SHOWN:
        yield f"and {len(names) - _SHOWN} more"


SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".safetensors.index.json")


def checkpoint_of(model: str, given: Path | None, *, is_alone: bool) -> Path | None:
    """The checkpoint of `model`: the file `given` where it is the only model, else MODEL.pth or spach_MODEL.pth (or
    another of `SUFFIXES`) in the folder `given`.

    Raises UsageError for one file and several models, CheckpointError for a folder without such a file, or with two.
    """
    if given is None or (is_alone and not given.is_dir()):
        return given
    if not given.is_dir():
        raise UsageError(
            f"--checkpoint {given} is one file, and --zoo names several models.",
            "Give a folder with a checkpoint for each: ms_hybrid_s.pth or spach_ms_hybrid_s.pth.",
        )
    names = [f"{stem}{suffix}" for stem in (model, f"spach_{model}") for suffix in SUFFIXES]
    files = [given / name for name in names if (given / name).is_file()]
    if len(files) != 1:
        what = "no checkpoint" if not files else f"{len(files)} checkpoints ({', '.join(file.name for file in files)})"
        raise CheckpointError(f"{given} holds {what} of {model}.", f"Put one there, such as {model}.pth.")
    return files[0]

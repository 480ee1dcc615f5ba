"""From what a checkpoint file holds to the state dict in it, saying each step.

Training code saves {"model": ..., "model_ema": ..., "optimizer": ..., "args": ...}; others save a bare state
dict, or one under a name of their own; wrappers such as DistributedDataParallel, torch.compile and FSDP put parts into
the names, and modules that hold the model a prefix before them (`model.`, `backbone.`). Where the stem is tells where a
model is: every model has one.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spach_deploy.common.errors import CheckpointError
from spach_deploy.models.published import CONFIGS
from spach_deploy.models.shapes import state_shapes
from spach_deploy.options.command_line import quoted
from spach_deploy.options.specs import WeightSource

_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module")
_ARGS_KEYS = (  # training scripts; PyTorch Lightning; timm, and others' names for the constructor's arguments
    *("args", "hyper_parameters", "hparams", "config", "cfg", "opt"),
    *("model_kwargs", "model_args", "arch_kwargs"),
)
_CONSTRUCTOR_KEYS = ("model_kwargs", "model_args", "arch_kwargs", "model")  # within these
_EMA_KEYS = ("model_ema", "state_dict_ema", "ema", "ema_model", "ema_state_dict", "model_ema_state_dict")
_WRAPPER_NAMES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""DistributedDataParallel, DataParallel and AveragedModel; torch.compile; FSDP; activation checkpointing."""

_STEMS = ("stem.proj.weight", "stem.proj.0.weight")
_AVERAGED = "n_averaged"  # of torch.optim.swa_utils.AveragedModel: how many models its weights are the average of
_SHOWN = 8
_LONGEST = 100
_DEPTH = 8
_MAPPINGS = 10_000  # looked at in one file; an optimizer has one a parameter
_REPEATED_BYTES = 1_000_000  # such as a LayerScale of one value for all channels


@dataclasses.dataclass(frozen=True)
class StateDict:
    """Tensors by name, the file's `args` (empty when it has none), and notes on what was done to get here."""

    tensors: dict[str, Tensor]
    args: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Place:
    """Where a model is in the file: keys that lead to the mapping which holds it, and the prefix of its names there."""

    path: tuple[str, ...]
    prefix: str
    found: Mapping[Any, Any]

    @property
    def label(self) -> str:
        """Path and prefix as one."""
        return "".join(f"{key}." for key in self.path) + self.prefix

    @property
    def is_averaged(self) -> bool:
        """Whether it is a moving average of the weights, by its name."""
        return any(part in _EMA_KEYS for part in self.label.split("."))

    @property
    def is_usual(self) -> bool:
        """Whether training code has a name for this place."""
        return not self.prefix and all(key in _MODEL_KEYS + _EMA_KEYS for key in self.path)


def state_dict_from_content(content: Any, weights: WeightSource, ignore: Sequence[str] = ()) -> StateDict:
    """The state dict of `weights` in `content`, as `read_checkpoint` returns it, less what `ignore` names.

    `ignore`: patterns of names, as fnmatch reads them, with or without what is removed from the names here.
    CheckpointError when there is none or more than one, when tensors stand beside it, or when two names become one.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"The checkpoint holds a {type(content).__name__}, not named tensors.",
            "Save a state dict: torch.save(model.state_dict(), 'weights.pth').",
        )
    places = list(_places(content))
    skipped = {place.label: pattern for place in places if (pattern := _skipping(place, ignore))}
    place = _chosen([place for place in places if place.label not in skipped], content, weights)
    tensors = {str(name): value for name, value in place.found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"The checkpoint holds no tensors: {_holds(place.found)}.", "Give one that holds weights."
        )
    _check_values(tensors)
    others = [other for other in places if other.path == place.path and other is not place]
    names = _Names.of(tensors, place, others, ignore)
    if not names.plain:
        raise CheckpointError(f"{_options(ignore)} leaves nothing of the checkpoint.", "Name the other tensors alone.")
    notes = [f"unwrapped {' > '.join(place.path)}"] if place.path else []
    notes += [*names.notes, *_note_ignored(names.ignored, skipped, ignore)]
    notes += [*_note_others(place.found, is_top=not place.path), *_note_averaged(places, place)]
    return StateDict(names.plain, _args(content), tuple(notes))


def shown(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(name[:_LONGEST] for name in listed[:_SHOWN]) + more


def _places(content: Mapping[Any, Any]) -> Iterator[_Place]:
    """Every model in a file, by its stem: outer ones first. At most `_MAPPINGS` mappings are looked at."""
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    for path, found in waiting:
        names = [_unwrapped(name) for name, value in found.items() if isinstance(name, str) and _is_tensor(value)]
        stems = [(name, stem) for name in names for stem in _STEMS if f".{name}".endswith(f".{stem}")]
        yield from (_Place(path, name.removesuffix(stem), found) for name, stem in dict.fromkeys(stems))
        if len(path) < _DEPTH:  # a pickle can hold a dictionary that holds itself
            inner = [(key, value) for key, value in found.items() if isinstance(key, str) and _is_mapping(value)]
            waiting += [((*path, key), value) for key, value in inner[: _MAPPINGS - len(waiting)]]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _skipping(place: _Place, ignore: Sequence[str]) -> str | None:
    """The pattern that leaves a whole model out."""
    stems = [f"{place.label}{stem}" for stem in _STEMS]
    return next((pattern for pattern in ignore if any(fnmatch.fnmatchcase(stem, pattern) for stem in stems)), None)


def _chosen(places: Sequence[_Place], content: Mapping[Any, Any], weights: WeightSource) -> _Place:
    """The model that was asked for; where there is no stem, the mapping that training code would have put it in."""
    is_averaged = weights is WeightSource.EMA
    wanted = [place for place in places if place.is_averaged == is_averaged]
    if is_averaged and not wanted:
        raise CheckpointError(
            f"The checkpoint holds no moving average of its weights (model_ema): {_holds(content)}.",
            "Leave --weights ema out.",
        )
    if places and not wanted:
        raise CheckpointError(
            f"The checkpoint holds no model weights, only their moving average: {_holds(content)}.",
            "Take that with --weights ema.",
        )
    if not wanted:
        return _descended(content)
    if usual := [place for place in wanted if place.is_usual]:
        return min(usual, key=lambda place: [(_MODEL_KEYS + _EMA_KEYS).index(key) for key in place.path])
    if len(wanted) > 1:
        raise _several(wanted)
    return wanted[0]


def _several(places: Sequence[_Place]) -> CheckpointError:
    labels = [place.label.rstrip(".") for place in places]
    return CheckpointError(
        f"The checkpoint holds {len(places)} models: {shown(labels)}.",
        f"Leave out all but one, such as with {_options([labels[-1] + '.*'])}.",
    )


def _descended(content: Mapping[Any, Any]) -> _Place:
    """The innermost mapping under the names that training code gives to weights."""
    path: tuple[str, ...] = ()
    while len(path) < _DEPTH:
        key = next((key for key in _MODEL_KEYS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        content, path = content[key], (*path, key)
    return _Place(path, "", content)


def _holds(content: Mapping[Any, Any]) -> str:
    """What is there, for an error."""
    return f"it holds {shown(map(str, content))}" if content else "it holds nothing"


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors without values, or of more than the file holds: a stride of zero makes terabytes of one number."""
    if nested := [name for name, tensor in tensors.items() if tensor.is_nested]:
        raise CheckpointError(
            f"The checkpoint holds {len(nested)} nested tensors, which have no shape: {shown(nested)}.",
            "Save the weights as plain tensors.",
        )

    def is_short(tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            return False  # refused by its kind, where the model has it
        return tensor.numel() * tensor.element_size() > max(_REPEATED_BYTES, tensor.untyped_storage().nbytes())

    if not any(tensor.numel() for tensor in tensors.values()):
        raise CheckpointError(
            "The checkpoint's tensors are all empty, as where each process of a training kept its own part.",
            "Join the parts where they are: with DeepSpeed, by its zero_to_fp32.py.",
        )
    if short := [name for name, tensor in tensors.items() if is_short(tensor)]:
        raise CheckpointError(
            f"The checkpoint holds one value for many in {len(short)} tensors: {shown(short)}.",
            "Save them with .contiguous().",
        )


def _unwrapped(name: str) -> str:
    """A name without the parts that wrappers put into it; no module of ours is called like one."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)


@dataclasses.dataclass(frozen=True)
class _Names:
    """Tensors by the model's own names, notes on what was removed, and the pattern of each that was ignored."""

    plain: dict[str, Tensor]
    notes: tuple[str, ...]
    ignored: Mapping[str, str]

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], place: _Place, others: Sequence[_Place], ignore: Sequence[str]
    ) -> _Names:
        """Of the model at `place`, among `others` in the same mapping."""
        ignored = {name: pattern for name in tensors if (pattern := _matching(name, place, ignore))}
        _check_ignored(ignored, place)
        rest = [name for name in tensors if name not in ignored and not _is_of_other(name, place, others)]
        averages = [name for name in rest if _is_average(name, tensors[name])]
        chosen = [name for name in rest if name not in averages]
        if outside := [name for name in chosen if not _is_under(name, place)]:
            raise _beside(outside, chosen, place)
        notes = [*_note_wrappers(chosen), *([f"removed the prefix `{place.prefix}`"] if place.prefix else [])]
        notes += [f"dropped {name}: {int(tensors[name])} models were averaged" for name in averages]
        return cls(_renamed(chosen, tensors, place), tuple(notes), ignored)


def _matching(name: str, place: _Place, ignore: Sequence[str]) -> str | None:
    """The pattern that a tensor's name matches in one of its forms."""
    forms = ("".join(f"{key}." for key in place.path) + name, name, _unwrapped(name), _plain(name, place))
    return next((pattern for pattern in ignore if any(fnmatch.fnmatchcase(form, pattern) for form in forms)), None)


def _check_ignored(ignored: Mapping[str, str], place: _Place) -> None:
    """Refuse patterns of what a model has under such a name: dropped, it would be said to be missing."""
    known = {name for config in CONFIGS.values() for name in state_shapes(config)} if ignored else set()
    wrong = [name for name in ignored if _is_under(name, place) and _plain(name, place) in known]
    if wrong:
        raise CheckpointError(
            f"{_options([ignored[wrong[0]]])} would drop {len(wrong)} tensors of the model: {shown(wrong)}.",
            "Name the others alone.",
        )


def _is_under(name: str, place: _Place) -> bool:
    return _unwrapped(name).startswith(place.prefix)


def _plain(name: str, place: _Place) -> str:
    return _unwrapped(name).removeprefix(place.prefix)


def _is_average(name: str, tensor: Tensor) -> bool:
    return name.rpartition(".")[2] == _AVERAGED and tensor.ndim == 0 and tensor.dtype == torch.int64


def _is_of_other(name: str, place: _Place, others: Sequence[_Place]) -> bool:
    """Whether a tensor is of a moving average that was not asked for, or of the model beside one that was."""
    plain = _unwrapped(name)
    if place.is_averaged:
        return not plain.startswith(place.prefix)
    return any(other.is_averaged and plain.startswith(other.prefix) for other in others)


def _beside(outside: Sequence[str], chosen: Sequence[str], place: _Place) -> CheckpointError:
    inside = [name for name in chosen if name not in outside]
    has_head = any(_unwrapped(name) == f"{place.prefix}head.weight" for name in inside)
    drop = f"Drop them with {ignoring(outside, inside)}."
    return CheckpointError(
        f"The model's names begin with {place.prefix}, and those of {len(outside)} tensors do not: {shown(outside)}.",
        drop if has_head else f"The head must have that prefix too: save both as one state dict. {drop}",
    )


def ignoring(names: Iterable[str], needed: Iterable[str]) -> str:
    """The options that drop tensors of these names and none of `needed`."""
    kept = [*needed]

    def pattern(name: str) -> str:
        parts = name.split(".")
        starts = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
        start = next((start for start in starts if not any(other.startswith(start) for other in kept)), None)
        return glob.escape(name) if start is None else f"{glob.escape(start)}*"

    return _options(list(dict.fromkeys(map(pattern, names))))


def _options(patterns: Sequence[str]) -> str:
    return " ".join(f"--ignore {quoted(pattern)}" for pattern in patterns[:_SHOWN]) + " ..." * (len(patterns) > _SHOWN)


def _renamed(chosen: Iterable[str], tensors: Mapping[str, Tensor], place: _Place) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name in chosen:
        plain = _plain(name, place)
        if plain in renamed:
            raise CheckpointError(
                f"The checkpoint holds {plain} twice, with and without a wrapper's prefix.",
                "Save the state dict of one model.",
            )
        renamed[plain] = tensors[name]
    return renamed


def _note_wrappers(names: Sequence[str]) -> list[str]:
    changed = [name for name in names if _unwrapped(name) != name]
    used = [wrapper for wrapper in _WRAPPER_NAMES if any(wrapper in name.split(".") for name in changed)]
    removed = " and ".join(f"`{wrapper}.`" for wrapper in used)
    return [f"removed {removed} from {len(changed)} names"] if changed else []


def _note_ignored(ignored: Mapping[str, str], skipped: Mapping[str, str], ignore: Sequence[str]) -> Iterator[str]:
    for pattern in dict.fromkeys(ignore):
        names = [name for name, matched in ignored.items() if matched == pattern]
        models = [label for label, matched in skipped.items() if matched == pattern]
        dropped = [f"dropped {shown(names)}"] if names else []
        dropped += [f"left out what is under {shown(models)}"] if models and not names else []
        yield f"{_options([pattern])} {' and '.join(dropped) or 'matched no tensor'}"


def _note_averaged(places: Iterable[_Place], place: _Place) -> list[str]:
    """That there are averaged weights, where others were taken."""
    labels = [other.label.rstrip(".") for other in places if other.is_averaged and not place.is_averaged]
    return [f"averaged weights are in the file too ({shown(labels)}): --weights ema takes them"] if labels else []


def _note_others(found: Mapping[Any, Any], is_top: bool) -> list[str]:
    """Entries among the tensors that are none; beside `args` at the top they are not worth a word."""
    others = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    others = [name for name in others if not (is_top and name == "args")]
    return [f"left out {len(others)} entries that are not tensors: {shown(others)}"] if others else []


def _args(content: Mapping[Any, Any]) -> dict[str, Any]:
    """What the training code was told, wherever it kept that; of entries with one name the first counts.

    What is said of the model itself, where that is a mapping of its own, comes first; there `eps` is LayerNorm's.
    """
    found: dict[str, Any] = {}
    for key in _ARGS_KEYS:
        found = {**_entries(content.get(key)), **found}
    for key in _CONSTRUCTOR_KEYS:
        own = _entries(found.get(key))
        if "eps" in own:
            own = {"norm_eps": own.pop("eps"), **own}
        found = {**found, **own}
    beside = {str(key): value for key, value in content.items() if isinstance(value, bool | int | float | str)}
    found = {**beside, **found}
    return {key: value for key, value in found.items() if not isinstance(value, Mapping)}


def _entries(value: Any) -> dict[str, Any]:
    entries = vars(value) if isinstance(value, argparse.Namespace) else value
    return {str(key): entry for key, entry in entries.items()} if isinstance(entries, Mapping) else {}

"""Find the state dict of a SPACH model in the content of a checkpoint file, with a note on every step.

Training code saves {"model": ..., "model_ema": ..., "optimizer": ..., "args": ...}. Other code saves a bare state dict,
or one under another key. Wrappers such as DistributedDataParallel, torch.compile and FSDP add parts to tensors' names,
and modules that contain the model add a prefix (`model.`, `backbone.`). A model is found by the name of its stem's
weight, because every SPACH model has a stem.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spach_deploy.common.errors import CheckpointError
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
"""Parts of names by DistributedDataParallel, DataParallel and AveragedModel; torch.compile; FSDP; checkpointing."""

STEMS = ("stem.proj.weight", "stem.proj.0.weight")
_OWN_NAME = re.compile(
    r"(stem\.proj(\.\d+)?|norm[12]|head)\.\w+"
    r"|(blocks|layer\d+)\.\d+\.(gamma_1|(norm[12]|(channel|spatial)_func\.\w+|cpe_net\.net\.1|net\.1\.[01])\.\w+)"
)
"""Names of the model's own tensors."""
_AVERAGED = "n_averaged"  # of torch.optim.swa_utils.AveragedModel: how many models its weights are the average of
_SHOWN = 8
_LONGEST = 100
_DEPTH = 8
_MAPPINGS = 10_000  # searched in one file at most; an optimizer has one for each parameter
_REPEATED_BYTES = 1_000_000  # a repeated value may have, such as a LayerScale of one value for all channels


@dataclasses.dataclass(frozen=True)
class StateDict:
    """Tensors by the model's own names, the file's `args` (empty without any), and notes on how they were found."""

    tensors: dict[str, Tensor]
    args: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Place:
    """Where a model is in the file. `path`: keys that lead to the mapping `found`. `prefix`: of its names in that."""

    path: tuple[str, ...]
    prefix: str
    found: Mapping[Any, Any]

    @property
    def label(self) -> str:
        """Path and prefix in one string."""
        return "".join(f"{key}." for key in self.path) + self.prefix

    @property
    def is_averaged(self) -> bool:
        """Whether it is a moving average of the weights, by its name."""
        return any(part in _EMA_KEYS for part in self.label.split("."))

    @property
    def is_usual(self) -> bool:
        """Whether the path is one that training code uses."""
        return not self.prefix and all(key in _MODEL_KEYS + _EMA_KEYS for key in self.path)


def state_dict_from_content(
    content: Any, weights: WeightSource, ignore: Sequence[str] = (), stems: Sequence[str] = STEMS
) -> StateDict:
    """The state dict of `weights` in `content`, the result of `read_checkpoint`, without what `ignore` names.

    `ignore`: patterns of names as fnmatch reads them, of full names or of names without wrappers and prefix. `stems`:
    names of tensors by one of which a model is found. Raises
    CheckpointError when there is no state dict or more than one, when the same mapping has other tensors, or when two
    names become the same.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"The checkpoint holds a {type(content).__name__}, not named tensors.",
            "Save a state dict: torch.save(model.state_dict(), 'weights.pth').",
        )
    places = list(_places(content, stems))
    skipped = {place.label: pattern for place in places if (pattern := _skipping(place, ignore, stems))}
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
    """The first names, and how many more there are, for a message."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(name[:_LONGEST] for name in listed[:_SHOWN]) + more


def _places(content: Mapping[Any, Any], by: Sequence[str]) -> Iterator[_Place]:
    """Every model in a file, found by its stem, outermost first. At most `_MAPPINGS` mappings are searched."""
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    for path, found in waiting:
        names = [_unwrapped(name) for name, value in found.items() if isinstance(name, str) and _is_tensor(value)]
        stems = [(name, stem) for name in names for stem in by if f".{name}".endswith(f".{stem}")]
        yield from (_Place(path, name.removesuffix(stem), found) for name, stem in dict.fromkeys(stems))
        if len(path) < _DEPTH:  # a dictionary in a pickle can contain itself
            inner = [(key, value) for key, value in found.items() if isinstance(key, str) and _is_mapping(value)]
            waiting += [((*path, key), value) for key, value in inner[: _MAPPINGS - len(waiting)]]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _skipping(place: _Place, ignore: Sequence[str], by: Sequence[str]) -> str | None:
    """The pattern of `ignore` that excludes the whole model at `place`; None without one."""
    stems = [f"{place.label}{stem}" for stem in by]
    return next((pattern for pattern in ignore if any(fnmatch.fnmatchcase(stem, pattern) for stem in stems)), None)


def _chosen(places: Sequence[_Place], content: Mapping[Any, Any], weights: WeightSource) -> _Place:
    """The place of the requested model; without any stem, the mapping where training code saves weights."""
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
    """The innermost mapping under the keys that training code uses for weights."""
    path: tuple[str, ...] = ()
    while len(path) < _DEPTH:
        key = next((key for key in _MODEL_KEYS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        content, path = content[key], (*path, key)
    return _Place(path, "", content)


def _holds(content: Mapping[Any, Any]) -> str:
    """What a mapping contains, for a message."""
    return f"it holds {shown(map(str, content))}" if content else "it holds nothing"


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError for tensors without values, or larger than their storage: with a stride of zero one number can
    be terabytes.
    """
    if nested := [name for name, tensor in tensors.items() if tensor.is_nested]:
        raise CheckpointError(
            f"The checkpoint holds {len(nested)} nested tensors, which have no shape: {shown(nested)}.",
            "Save the weights as plain tensors.",
        )

    def is_short(tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            return False  # refused later for its kind, if the model has such a tensor
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
    """`name` without the parts that wrappers add; no module of SPACH has such a name."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)


@dataclasses.dataclass(frozen=True)
class _Names:
    """Tensors by the model's own names (`plain`), notes on removed parts, and by ignored name the
    pattern that did it.
    """

    plain: dict[str, Tensor]
    notes: tuple[str, ...]
    ignored: Mapping[str, str]

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], place: _Place, others: Sequence[_Place], ignore: Sequence[str]
    ) -> _Names:
        """The names of the model at `place`; `others` are models in the same mapping."""
        ignored = {name: pattern for name in tensors if (pattern := _matching(name, place, ignore))}
        _check_ignored(ignored, place)
        rest = [name for name in tensors if name not in ignored and not _is_of_other(name, place, others)]
        averages = [name for name in rest if _is_average(name, tensors[name])]
        chosen = [name for name in rest if name not in averages]
        if outside := [name for name in chosen if not _is_under(name, place)]:
            raise _other_tensors(outside, chosen, place)
        notes = [*_note_wrappers(chosen), *([f"removed the prefix `{place.prefix}`"] if place.prefix else [])]
        notes += [f"dropped {name}: {int(tensors[name])} models were averaged" for name in averages]
        return cls(_renamed(chosen, tensors, place), tuple(notes), ignored)


def _matching(name: str, place: _Place, ignore: Sequence[str]) -> str | None:
    """The pattern of `ignore` that a tensor's name matches, in full or without wrappers and prefix;
    None without one.
    """
    forms = ("".join(f"{key}." for key in place.path) + name, name, _unwrapped(name), _plain(name, place))
    return next((pattern for pattern in ignore if any(fnmatch.fnmatchcase(form, pattern) for form in forms)), None)


def _check_ignored(ignored: Mapping[str, str], place: _Place) -> None:
    """CheckpointError for patterns that match tensors of the model itself, which would be missing."""
    wrong = [name for name in ignored if _is_under(name, place) and _OWN_NAME.fullmatch(_plain(name, place))]
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
    """Whether a tensor belongs to another model than the one at `place`: to the averaged model, or to its average."""
    plain = _unwrapped(name)
    if place.is_averaged:
        return not plain.startswith(place.prefix)
    return any(other.is_averaged and plain.startswith(other.prefix) for other in others)


def _other_tensors(outside: Sequence[str], chosen: Sequence[str], place: _Place) -> CheckpointError:
    inside = [name for name in chosen if name not in outside]
    has_head = any(_unwrapped(name) == f"{place.prefix}head.weight" for name in inside)
    drop = f"Drop them with {ignoring(outside, inside)}."
    return CheckpointError(
        f"The model's names begin with {place.prefix}, and those of {len(outside)} tensors do not: {shown(outside)}.",
        drop if has_head else f"The head must have that prefix too: save both as one state dict. {drop}",
    )


def ignoring(names: Iterable[str], needed: Iterable[str]) -> str:
    """Command-line options that ignore the tensors `names` and none of `needed`."""
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
    """A note that the file also has averaged weights, if others were taken."""
    labels = [other.label.rstrip(".") for other in places if other.is_averaged and not place.is_averaged]
    return [f"averaged weights are in the file too ({shown(labels)}): --weights ema takes them"] if labels else []


def _note_others(found: Mapping[Any, Any], is_top: bool) -> list[str]:
    """A note on entries that are no tensors. At the top of a file `args` needs no note."""
    others = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    others = [name for name in others if not (is_top and name == "args")]
    return [f"left out {len(others)} entries that are not tensors: {shown(others)}"] if others else []


def _args(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Arguments of the training code, from all keys under which such code saves them; the first of a name counts.

    Arguments of the model's constructor, if they are in a mapping of their own, come first; `eps` there is LayerNorm's.
    """
    found: dict[str, Any] = {}
    for key in _ARGS_KEYS:
        found = {**_entries(content.get(key)), **found}
    for key in _CONSTRUCTOR_KEYS:
        own = _entries(found.get(key))
        if "eps" in own:
            own = {"norm_eps": own.pop("eps"), **own}
        found = {**found, **own}
    scalars = {str(key): value for key, value in content.items() if isinstance(value, bool | int | float | str)}
    found = {**scalars, **found}
    return {key: value for key, value in found.items() if not isinstance(value, Mapping)}


def _entries(value: Any) -> dict[str, Any]:
    entries = vars(value) if isinstance(value, argparse.Namespace) else value
    return {str(key): entry for key, entry in entries.items()} if isinstance(entries, Mapping) else {}

"""From what a checkpoint file holds to the state dict in it, saying each step.

Training code saves {"model": ..., "model_ema": ..., "optimizer": ..., "args": ...}; others save a bare state
dict, or one under `state_dict`; wrappers such as DistributedDataParallel and torch.compile prefix the names.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from spach_deploy.errors import CheckpointError
from spach_deploy.specs import WeightSource

_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module")
_EMA_KEYS = ("model_ema", "state_dict_ema")
_WRAPPER_NAMES = ("module", "_orig_mod")  # DistributedDataParallel and DataParallel; torch.compile
_SHOWN = 8
_DEPTH = 8
_REPEATED_BYTES = 1_000_000  # such as a LayerScale of one value for all channels


@dataclasses.dataclass(frozen=True)
class StateDict:
    """Tensors by name, the file's `args` (empty when it has none), and notes on what was done to get here."""

    tensors: dict[str, Tensor]
    args: Mapping[str, Any]
    notes: tuple[str, ...]


def state_dict_from_content(content: Any, weights: WeightSource) -> StateDict:
    """The state dict of `weights` in `content`, as `read_checkpoint` returns it.

    CheckpointError when there is none, or when two names become one.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"The checkpoint holds a {type(content).__name__}, not named tensors.",
            "Save a state dict: torch.save(model.state_dict(), 'weights.pth').",
        )
    found, path = _descend(content, weights)
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"The checkpoint holds no tensors: {_holds(found)}.", "Give one that holds weights.")
    _check_values(tensors)
    stripped = _strip_wrappers(tensors)
    notes = [f"unwrapped {' > '.join(path)}"] if path else []
    notes += _note_names(tensors, stripped) + _note_others(found, is_top=not path)
    return StateDict(stripped, _args(content), tuple(notes))


def shown(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _descend(content: Mapping[Any, Any], weights: WeightSource) -> tuple[Mapping[Any, Any], list[str]]:
    """The innermost mapping that holds the weights asked for, and the keys that lead to it."""
    path: list[str] = []
    if weights is WeightSource.EMA:
        content, path = _ema(content)
    elif _holds_only_ema(content):
        raise CheckpointError(
            f"The checkpoint holds no model weights, only their moving average: {_holds(content)}.",
            "Take that with --weights ema.",
        )
    while len(path) < _DEPTH:  # a pickle can hold a dictionary that holds itself
        key = next((key for key in _MODEL_KEYS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        content, path = content[key], [*path, key]
    return content, path


def _ema(content: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], list[str]]:
    for key in _EMA_KEYS:
        if isinstance(content.get(key), Mapping):
            return content[key], [key]
    raise CheckpointError(
        f"The checkpoint holds no moving average of its weights (model_ema): {_holds(content)}.",
        "Leave --weights ema out.",
    )


def _holds_only_ema(content: Mapping[Any, Any]) -> bool:
    has_model = any(isinstance(content.get(key), Mapping) for key in _MODEL_KEYS)
    has_tensors = any(isinstance(value, Tensor) for value in content.values())
    return not (has_model or has_tensors) and any(isinstance(content.get(key), Mapping) for key in _EMA_KEYS)


def _holds(content: Mapping[Any, Any]) -> str:
    """What is there, for an error."""
    return f"it holds {shown(map(str, content))}" if content else "it holds nothing"


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of more values than the file holds for them: a stride of zero makes terabytes of one number."""

    def is_short(tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            return False  # refused by its kind, where the model has it
        return tensor.numel() * tensor.element_size() > max(_REPEATED_BYTES, tensor.untyped_storage().nbytes())

    if short := [name for name, tensor in tensors.items() if is_short(tensor)]:
        raise CheckpointError(
            f"The checkpoint holds one value for many in {len(short)} tensors: {shown(short)}.",
            "Save them with .contiguous().",
        )


def _strip_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the path parts of wrappers; no module of ours is called like one."""
    stripped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)
        if plain in stripped:
            raise CheckpointError(
                f"The checkpoint holds {plain} twice, with and without a wrapper's prefix.",
                "Save the state dict of one model.",
            )
        stripped[plain] = tensor
    return stripped


def _note_names(tensors: Mapping[str, Tensor], stripped: Mapping[str, Tensor]) -> list[str]:
    changed = [name for name in tensors if name not in stripped]
    used = [wrapper for wrapper in _WRAPPER_NAMES if any(wrapper in name.split(".") for name in changed)]
    removed = " and ".join(f"`{wrapper}.`" for wrapper in used)
    return [f"removed {removed} from {len(changed)} names"] if changed else []


def _note_others(found: Mapping[Any, Any], is_top: bool) -> list[str]:
    """Entries among the tensors that are none; beside `args` at the top they are not worth a word."""
    others = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    others = [name for name in others if not (is_top and name == "args")]
    return [f"left out {len(others)} entries that are not tensors: {shown(others)}"] if others else []


def _args(content: Mapping[Any, Any]) -> dict[str, Any]:
    args = content.get("args")
    if isinstance(args, argparse.Namespace):
        return dict(vars(args))
    return {str(key): value for key, value in args.items()} if isinstance(args, Mapping) else {}

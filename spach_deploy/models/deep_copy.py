"""Deep copies of modules of the user's own, which may hold what cannot be copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def deep_copied(module: ModuleT, made: Mapping[int, Tensor] | None = None) -> ModuleT:
    """A deep copy of `module`. Tensors of the ids in `made` become those; attributes that cannot be copied, such as a
    lock or an open file, are shared.
    """
    replaced: dict[int, Any] = dict(made or {})
    try:
        return copy.deepcopy(module, dict(replaced))
    except Exception:  # the user's attributes raise what they like
        shared = {id(value): value for value in _not_copied(module, replaced)}
        return copy.deepcopy(module, {**replaced, **shared})


def _not_copied(module: nn.Module, replaced: Mapping[int, Any]) -> Iterator[Any]:
    """The attributes of `module` and its parts, other than tensors and modules in them, that cannot be copied."""
    for part in module.modules():
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value, dict(replaced))
            except Exception:  # as above
                yield value

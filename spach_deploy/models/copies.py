"""Copies of modules that share their tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def own(module: ModuleT) -> ModuleT:
    """A copy of `module` and its submodules that shares the parameter tensors; shared submodules stay shared."""
    return _own(module, {})  # type: ignore[return-value]


def _own(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:
        copied = copy.copy(module)
        copied._parameters = dict(module._parameters)
        copied._buffers = dict(module._buffers)
        copied._forward_hooks = OrderedDict(module._forward_hooks)
        done[id(module)] = copied
        copied._modules = {
            name: None if child is None else _own(child, done) for name, child in module._modules.items()
        }
    return done[id(module)]

"""What a rewrite is, and how it is proven.

A rewrite is a function that changes a model in place and returns an `Outcome`: what it changed, how far each changed
module is from the one it replaced (in FP64, on random tokens), and why it left the others alone.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from spach_deploy.common.errors import RewriteError
from spach_deploy.common.metrics import relative_l2

FP64_LIMIT = 1e-12
"""Relative L2 that exact algebra keeps in FP64: some thousand roundings of 1.1e-16."""

FP32_LIMIT = 1e-6
"""The same for a change of layout, which is no arithmetic and is proven in FP32, where convolutions are fast."""

_PROBE_SEED = 20_210_831

StaticT = TypeVar("StaticT", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Change:
    """One changed module. `error` is the relative L2 between old and new, in FP64 unless only the layout changed."""

    module: str
    error: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one rewrite did."""

    changes: tuple[Change, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """Largest FP64 error of all changes, 0 without any."""
        return max((change.error for change in self.changes), default=0.0)


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A named rewrite. `apply` changes the model in place."""

    name: str
    summary: str
    apply: Callable[[nn.Module], Outcome]


def modules_of(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module of a kind; a shared module is met at each of its paths."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            yield path, module


@functools.lru_cache(maxsize=4)
def probe(*shape: int) -> Tensor:
    """Random normal tokens, float64, the same ones every time; not to be changed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(_PROBE_SEED), dtype=torch.float64)


def prove_layout(
    rewrite: str, path: str, old: Callable[[Tensor], Tensor], new: Callable[[Tensor], Tensor], x: Tensor
) -> Change:
    """`prove` for modules that differ in layout alone: on the modules themselves, in FP32."""
    return prove(rewrite, path, old, new, x.float(), FP32_LIMIT)


def double(module: StaticT) -> StaticT:
    """A copy of `module` in FP64: weights are folded there and rounded to FP32 once."""
    made: dict[int, Tensor] = {id(buffer): buffer.double() for buffer in module.buffers() if buffer.is_floating_point()}
    for parameter in module.parameters():
        made[id(parameter)] = nn.Parameter(parameter.detach().double(), requires_grad=False)
    return copy.deepcopy(module, made)


def with_parameters(module: StaticT, values: Mapping[str, Tensor]) -> StaticT:
    """A copy of `module` with these parameters, by path; it shares the others."""
    twin = own(module)
    for path, value in values.items():
        where, _, name = path.rpartition(".")
        twin.get_submodule(where)._parameters[name] = nn.Parameter(value, requires_grad=False)
    return twin


def prove(
    rewrite: str,
    path: str,
    old: Callable[[Tensor], Tensor],
    new: Callable[[Tensor], Tensor],
    x: Tensor,
    limit: float = FP64_LIMIT,
) -> Change:
    """Compare old and new on `x`, in FP64 as it is; RewriteError when they differ by more than rounding."""
    with torch.no_grad():
        expected = old(x)
        error = relative_l2(new(x).numpy(), expected.numpy())
    if not error <= limit:
        raise RewriteError(
            f"Rewrite {rewrite} changes what {path} computes: relative L2 {error:.1e}, at most {limit:.0e} is"
            " rounding.",
            f"Export with --no-rewrite {rewrite} and report this.",
        )
    return Change(path, error)


def set_parameter(owner: nn.Module, name: str, value: Tensor) -> None:
    """Give `owner` a new float32 parameter of its own; the old one, which others may share, stays as it is."""
    setattr(owner, name, nn.Parameter(value.detach().float().contiguous(), requires_grad=False))


def own(module: StaticT) -> StaticT:
    """A copy of `module` with modules of its own and the same parameter tensors; shared modules stay shared."""
    return _own(module, {})  # type: ignore[return-value]


def _own(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:
        twin = copy.copy(module)
        twin._parameters = dict(module._parameters)
        twin._buffers = dict(module._buffers)
        twin._forward_hooks = OrderedDict(module._forward_hooks)
        done[id(module)] = twin
        twin._modules = {name: None if child is None else _own(child, done) for name, child in module._modules.items()}
    return done[id(module)]

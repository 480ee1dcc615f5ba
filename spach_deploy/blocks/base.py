"""Base of all rewrites: their record (`Rewrite`, `Outcome`) and the comparison of old and new module (`prove`).

A rewrite is a function that changes a model in place, given the graph's form, and returns an `Outcome`: which modules
it changed, how far each is from the one it replaced (in FP64, on random tokens), and why it skipped others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from spach_deploy.common.errors import RewriteError
from spach_deploy.common.metrics import relative_l2
from spach_deploy.models.deep_copy import deep_copied
from spach_deploy.models.own_module import own as own

FP64_LIMIT = 1e-12
"""Largest relative L2 in FP64 of an exact rewrite: some thousand roundings of 1.1e-16."""

FP32_LIMIT = 1e-6
"""Largest relative L2 in FP32 of a rewrite that only changes layout, compared in FP32 because convolutions are fast."""

_PROBE_SEED = 20_210_831

StaticT = TypeVar("StaticT", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class GraphForm:
    """What the graph will go through, which decides whether a rewrite pays: the passes `shift_depthwise` and
    `tokens_first`, and quantization of some layers to eight bits. `in_float`: modules that stay in floating point in a
    model that is quantized, as far as that is known.
    """

    is_shifted: bool = True
    is_tokens_first: bool = True
    is_quantized: bool = False
    in_float: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Change:
    """One changed module. `error` is the relative L2 between old and new, in FP64 unless only the layout changed."""

    module: str
    error: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one rewrite did. `skipped`: a sentence for each module, or for the model, that it left as it was."""

    changes: tuple[Change, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """Largest FP64 error of all changes, 0 without any."""
        return max((change.error for change in self.changes), default=0.0)


def joined(outcomes: Iterable[Outcome]) -> Outcome:
    """Several outcomes of one rewrite as one."""
    found = tuple(outcomes)
    changes = tuple(change for outcome in found for change in outcome.changes)
    return Outcome(changes, tuple(reason for outcome in found for reason in outcome.skipped))


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A rewrite with its name (for `--no-rewrite`) and one line for `--list-rewrites`. `apply` works in place."""

    name: str
    summary: str
    apply: Callable[[nn.Module, GraphForm], Outcome]


def modules_of(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module of a class; a shared module comes once for each of its paths."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            yield path, module


@functools.lru_cache(maxsize=4)
def probe(*shape: int) -> Tensor:
    """Random normal numbers of this shape, float64, the same ones every time. Cached: do not change them in place."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(_PROBE_SEED), dtype=torch.float64)


def prove_layout(
    rewrite: str, path: str, old: Callable[[Tensor], Tensor], new: Callable[[Tensor], Tensor], x: Tensor
) -> Change:
    """`prove` in FP32, for modules that differ in layout alone, within `FP32_LIMIT`."""
    return prove(rewrite, path, old, new, x.float(), FP32_LIMIT)


def double(module: StaticT) -> StaticT:
    """A copy of `module` in FP64, in which weights are folded before they are rounded to FP32 once."""
    made: dict[int, Tensor] = {id(buffer): buffer.double() for buffer in module.buffers() if buffer.is_floating_point()}
    for parameter in module.parameters():
        made[id(parameter)] = nn.Parameter(parameter.detach().double(), requires_grad=False)
    return deep_copied(module, made)


def with_parameters(module: StaticT, values: Mapping[str, Tensor]) -> StaticT:
    """A copy of `module` with other parameters `values`, by path; it shares the tensors of all others."""
    copied = own(module)
    for path, value in values.items():
        where, _, name = path.rpartition(".")
        copied.get_submodule(where)._parameters[name] = nn.Parameter(value, requires_grad=False)
    return copied


def prove(
    rewrite: str,
    path: str,
    old: Callable[[Tensor], Tensor],
    new: Callable[[Tensor], Tensor],
    x: Tensor,
    limit: float = FP64_LIMIT,
) -> Change:
    """Compare old and new on `x`, in the precision of `x`. RewriteError when their relative L2 is above `limit`.

    `rewrite` and `path` (of the module) are for the message and the returned `Change`.
    """
    with torch.no_grad():
        expected = old(x)
        error = relative_l2(new(x).numpy(), expected.numpy())
    if not error <= limit:
        raise RewriteError(
            f"Rewrite {rewrite} changes what {path} computes: relative L2 {error:.1e}, at most {limit:.0e} is"
            " rounding.",
            "Report this." if rewrite == "static_reshapes" else f"Export with --no-rewrite {rewrite} and report this.",
        )
    return Change(path, error)


def set_parameter(owner: nn.Module, name: str, value: Tensor) -> None:
    """Set a new parameter, `value` as float32, on `owner`. The old one is not changed: other modules may share it."""
    setattr(owner, name, nn.Parameter(value.detach().float().contiguous(), requires_grad=False))


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes of a module's input and output in an example run, the batch first."""

    input: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def is_tokens(self) -> bool:
        """Whether both are tokens by channels, (B, N, C), of the same shape."""
        return len(self.input) == 3 and self.input == self.output


_WITHOUT_EFFECT = (nn.Dropout, nn.Identity)
"""Modules that return their input in evaluation mode."""


def children_of(module: nn.Module) -> list[nn.Module]:
    """The children that compute something."""
    return [child for child in module.children() if not isinstance(child, _WITHOUT_EFFECT)]


def has_other_parameters(module: nn.Module, known: Collection[nn.Module]) -> bool:
    """Whether `module` has parameters or buffers outside the modules `known`."""
    inside = {id(tensor) for part in known for tensor in (*part.parameters(), *part.buffers())}
    return any(id(tensor) not in inside for tensor in (*module.parameters(), *module.buffers()))


def grids_of(tokens: int) -> list[tuple[int, int]]:
    """Grids (H, W) that this many tokens may form: square first, then the nearest to it, tall and wide."""
    heights = [height for height in range(1, tokens + 1) if tokens % height == 0]
    return sorted(((height, tokens // height) for height in heights), key=lambda grid: abs(grid[0] - grid[1]))


def nested(module: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Put `parts` into `module` at their paths, in place, so that a static form has the names of what it replaces."""
    for path, part in parts.items():
        owner = module
        *outer, name = path.split(".")
        for step in outer:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        owner._modules[name] = part

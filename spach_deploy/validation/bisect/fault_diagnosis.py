"""Diagnose a wrong tensor: of the faults that it could have, the one that explains it best.

A hypothesis is the probe point's value with one fault, recomputed by PyTorch from the inputs that the reference had.
The graph computed its value from the same inputs. The fault is that of the nearest hypothesis; where none is near
enough, a wrong weight.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spach_deploy.blocks.token_mlp import TokenLinear
from spach_deploy.common.metrics import relative_l2
from spach_deploy.models.deep_copy import deep_copied
from spach_deploy.validation.bisect.probe_points import (
    AttentionCore,
    Computation,
    ProbeKind,
    ProbeRecord,
    Rounding,
    recompute,
)

Array = NDArray[np.floating]

EXPLAINS = 0.5
"""A hypothesis explains an error if at most this share of the error remains."""


class Fault(str, enum.Enum):
    """Kinds of faults."""

    WEIGHT = "wrong weight"
    LAYOUT = "wrong layout"
    HEADS = "order of heads"
    EPSILON = "wrong epsilon"
    OVERFLOW = "overflow"
    BIAS = "missing bias"
    RESIDUAL = "missing residual"
    FUNCTION = "wrong function"
    PRECISION = "precision"


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A fault, in words, and the probe point's value (B, N, C) with it."""

    fault: Fault
    words: str
    value: Array = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The most likely fault, and why. `left`: relative L2 to the value with that fault; 0 where no hypothesis explains
    it.
    """

    fault: Fault
    why: str
    left: float = 0.0


def diagnose(recorded: ProbeRecord, value: Array) -> Diagnosis:
    """The fault of `value` (B, N, C), which a graph computed from the inputs of `recorded`."""
    if (seen := _overflow(recorded.value, value)) is not None:
        return seen
    error = relative_l2(value, recorded.value)
    best = Diagnosis(Fault.WEIGHT, _where(recorded.value, value), EXPLAINS * error)
    for hypothesis in hypotheses(recorded, value):
        left = relative_l2(value, hypothesis.value)
        if left < best.left:
            best = Diagnosis(hypothesis.fault, hypothesis.words, left)
    return best


def hypotheses(recorded: ProbeRecord, value: Array) -> Iterator[Hypothesis]:
    """All faults that are possible at this probe point. Some are fitted to `value`."""
    computation, exact = recorded.computation, recorded.value
    module = computation.module
    if getattr(module, "bias", None) is not None:
        yield Hypothesis(Fault.BIAS, "Its bias is missing.", _with_changed_module(computation, _without_bias))
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
        yield from _epsilons(computation, exact, value)
    if isinstance(module, AttentionCore):
        yield from _head_orders(computation, module)
        yield from _scales(computation, module)
    if isinstance(module, (nn.GELU, nn.ReLU, nn.SiLU)):
        yield from _activations(computation, module)
    yield from _weight_layouts(computation)
    yield from _grid_layouts(exact, recorded.grid)
    yield from _grid_readings(computation, exact)
    has_heads = recorded.point.kind in (ProbeKind.CORE, ProbeKind.QKV)
    yield from _channel_orders(exact, value, has_heads=has_heads)
    if recorded.point.kind is ProbeKind.SUM:
        yield from _missing_parts(computation)
    yield from _roundings(computation, exact)


# Overflow


def _overflow(exact: Array, value: Array) -> Diagnosis | None:
    """Numbers that are not finite, or that are clipped."""
    bad = int(np.size(value) - np.isfinite(value).sum())
    if bad:
        return Diagnosis(Fault.OVERFLOW, f"{bad:,} of its {value.size:,} numbers are not finite.")
    limit, largest = float(np.abs(value).max()), float(np.abs(exact).max())
    if limit < 0.999 * largest:
        clipped = np.clip(exact, -limit, limit)
        if relative_l2(value, clipped) < EXPLAINS * relative_l2(value, exact):
            return Diagnosis(Fault.OVERFLOW, f"It is cut off at {limit:.4g}; the reference reaches {largest:.4g}.")
    return None


# Hypotheses


def _with_changed_module(computation: Computation, change: Callable[[nn.Module], None]) -> Array:
    """The probe point's value after `change` was applied to a copy of its module."""
    assert computation.module is not None
    module = deep_copied(computation.module)
    with torch.inference_mode():
        change(module)
    return recompute(dataclasses.replace(computation, module=module))


def _without_bias(module: nn.Module) -> None:
    assert isinstance(module.bias, nn.Parameter)
    module.bias = nn.Parameter(torch.zeros_like(module.bias), requires_grad=False)


def _epsilons(computation: Computation, exact: Array, value: Array) -> Iterator[Hypothesis]:
    """Other epsilons: usual ones, and the one that explains the ratio of `value` to the right output, token by
    token.
    """
    module = computation.module
    assert isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d))
    if isinstance(module, nn.BatchNorm2d):
        return
    without = _with_changed_module(computation, _without_bias)
    bias = (exact - without).reshape(-1, exact.shape[-1]).mean(axis=0)
    axes = (1, 2) if isinstance(module, nn.GroupNorm) else (2,)
    shrunk = np.sum((value - bias) * without, axis=axes) / np.maximum(np.sum(without**2, axis=axes), 1e-30)
    x = computation.inputs[0].double()
    dims = tuple(range(1, x.ndim)) if isinstance(module, nn.GroupNorm) else (-1,)
    variance = x.var(dim=dims, unbiased=False).reshape(shrunk.shape).numpy()
    ratio = float(np.median((variance + module.eps) / np.maximum(shrunk, 1e-6) ** 2 - variance))
    for epsilon in {ratio, 1e-3, 1e-5, 1e-8, 0.0, 1e-12}:
        if epsilon < 0 or abs(epsilon - module.eps) < 1e-3 * module.eps:
            continue

        def change(changed: nn.Module, epsilon: float = epsilon) -> None:
            changed.eps = epsilon  # type: ignore[assignment]

        words = f"Its epsilon is {epsilon:.1e} instead of {module.eps:.1e}."
        yield Hypothesis(Fault.EPSILON, words, _with_changed_module(computation, change))


def _head_orders(computation: Computation, core: AttentionCore) -> Iterator[Hypothesis]:
    """Attention that reads the packed qkv, or writes its heads, in another order."""
    packed = computation.inputs[0]
    batch, tokens, width = packed.shape
    heads, depth = core.heads, width // (3 * core.heads)
    parts = packed.reshape(batch, tokens, 3, heads, depth)
    readings = {
        "reads heads before q, k and v: (h three d)": packed.reshape(batch, tokens, heads, 3, depth).transpose(2, 3),
        "reads heads innermost: (three d h)": packed.reshape(batch, tokens, 3, depth, heads).transpose(3, 4),
        "takes k for q": parts[:, :, [1, 0, 2]],
        "takes v for k": parts[:, :, [0, 2, 1]],
        "takes v for q": parts[:, :, [2, 1, 0]],
        "takes q, k and v in turn": parts[:, :, [1, 2, 0]],
        "takes q, k and v in turn, backwards": parts[:, :, [2, 0, 1]],
    }
    for words, reading in readings.items():
        inputs = (reading.reshape(batch, tokens, width),)
        value = recompute(dataclasses.replace(computation, inputs=inputs))
        yield Hypothesis(Fault.HEADS, f"It {words}.", value)
    right = recompute(computation).reshape(batch, tokens, heads, depth)
    shape = (batch, tokens, heads * depth)
    inner = right.transpose(0, 1, 3, 2).reshape(shape)
    yield Hypothesis(Fault.HEADS, "It writes heads innermost: (d h).", inner)
    unmixed = right.transpose(0, 2, 1, 3).reshape(shape)
    yield Hypothesis(Fault.HEADS, "It writes (h n d) without going back to (n h d).", unmixed)


def _scales(computation: Computation, core: AttentionCore) -> Iterator[Hypothesis]:
    """Attention without its scale, or with the scale applied twice."""
    usual = (computation.inputs[0].shape[-1] / (3 * core.heads)) ** -0.5
    for words, factor in (("lacks its scale", 1.0 / usual), ("applies its scale twice", usual)):
        other = AttentionCore(core.heads, core.scale * factor)
        value = recompute(dataclasses.replace(computation, module=other))
        yield Hypothesis(Fault.FUNCTION, f"It {words}.", value)


def _activations(computation: Computation, own: nn.Module) -> Iterator[Hypothesis]:
    """Other activations."""
    others: dict[str, nn.Module] = {
        "It is the tanh form of GELU, an approximation.": nn.GELU(approximate="tanh"),
        "It is the exact GELU.": nn.GELU(),
        "It is left out.": nn.Identity(),
        "It is a ReLU.": nn.ReLU(),
        "It is a SiLU.": nn.SiLU(),
    }
    for words, module in others.items():
        if repr(module) == repr(own):
            continue
        value = recompute(dataclasses.replace(computation, module=module))
        yield Hypothesis(Fault.FUNCTION, words, value)


def _weight_layouts(computation: Computation) -> Iterator[Hypothesis]:
    """Weights in another layout: transposed, or with flipped kernels."""
    module = computation.module
    turns: dict[str, Callable[[Tensor], Tensor]] = {}
    if isinstance(module, nn.Conv2d):
        turns = {
            "Its kernel has height and width swapped.": lambda w: w.transpose(2, 3),
            "Its kernel is turned by 180 degrees, a convolution instead of a correlation.": lambda w: w.flip(2, 3),
            "Its kernel is mirrored.": lambda w: w.flip(3),
            "Its kernel is upside down.": lambda w: w.flip(2),
            "Its kernel's input channels are in reverse order.": lambda w: w.flip(1),
        }
        if module.weight.shape[0] == module.weight.shape[1]:
            turns["Its weight is transposed."] = lambda w: w.transpose(0, 1)
    elif isinstance(module, (nn.Linear, TokenLinear)) and module.weight.shape[0] == module.weight.shape[1]:
        turns = {"Its weight is transposed.": lambda w: w.T}
    if isinstance(module, (nn.Linear, TokenLinear)):
        turns["Its weight lies in memory as its transpose would."] = lambda w: w.T.reshape(w.shape)
        turns["Its weight's columns are in reverse order."] = lambda w: w.flip(1)
    for words, turn in turns.items():
        yield Hypothesis(
            Fault.LAYOUT, words, _with_changed_module(computation, functools.partial(_set_weight, turn=turn))
        )


def _set_weight(module: nn.Module, turn: Callable[[Tensor], Tensor]) -> None:
    assert isinstance(module.weight, nn.Parameter)
    module.weight = nn.Parameter(turn(module.weight).contiguous(), requires_grad=False)


def _grid_layouts(exact: Array, grid_shape: tuple[int, int] | None) -> Iterator[Hypothesis]:
    """Tokens in another layout: a transposed or flipped grid, or channels and tokens exchanged."""
    batch, tokens, channels = exact.shape
    if grid_shape is not None and tokens > 1:
        grid = exact.reshape(batch, *grid_shape, channels)
        turned = {
            "Its grid has height and width swapped.": grid.transpose(0, 2, 1, 3),
            "Its grid is mirrored.": grid[:, :, ::-1],
            "Its grid is upside down.": grid[:, ::-1],
        }
        for words, value in turned.items():
            yield Hypothesis(Fault.LAYOUT, words, value.reshape(exact.shape))
    if tokens > 1:
        mixed = exact.transpose(0, 2, 1).reshape(exact.shape)
        yield Hypothesis(Fault.LAYOUT, "Its channels and tokens are transposed in memory.", mixed)


def _grid_readings(computation: Computation, exact: Array) -> Iterator[Hypothesis]:
    """A convolution that takes the rows of a rectangle for its columns."""
    if not isinstance(computation.module, nn.Conv2d) or computation.inputs[0].ndim != 4:
        return
    x = computation.inputs[0]
    height, width = x.shape[2:]
    if height != width:
        value = recompute(dataclasses.replace(computation, inputs=(x.reshape(*x.shape[:2], width, height),)))
        if value.shape == exact.shape:
            yield Hypothesis(Fault.LAYOUT, f"It reads its {height} by {width} grid as {width} by {height}.", value)


def _channel_orders(exact: Array, value: Array, *, has_heads: bool) -> Iterator[Hypothesis]:
    """Right channels in a wrong order, found by correlation; heads where whole blocks of channels moved."""
    channels = exact.shape[-1]
    if channels < 2 or exact.shape[1] < 2:
        return
    want, have = (_unit(array.reshape(-1, channels)) for array in (exact, value))
    source = np.argmax(have.T @ want, axis=1)
    moved = np.flatnonzero(source != np.arange(channels))
    if not len(moved) or len(np.unique(source)) != channels:
        return
    is_heads = has_heads and _moves_whole_blocks(source)
    fault = Fault.HEADS if is_heads else Fault.WEIGHT if len(moved) <= 2 else Fault.LAYOUT
    words = "Its heads are in another order." if is_heads else f"{len(moved)} of its {channels} channels are permuted."
    yield Hypothesis(fault, words, exact[..., source])


def _unit(rows: Array) -> Array:
    centred = rows - rows.mean(axis=0)
    unit: Array = centred / np.maximum(np.linalg.norm(centred, axis=0), 1e-20)
    return unit


def _moves_whole_blocks(source: NDArray[np.intp]) -> bool:
    """Whether runs of at least 4 consecutive channels moved together."""
    breaks = np.flatnonzero(np.diff(source) != 1)
    return len(breaks) + 1 <= len(source) // 4


def _missing_parts(computation: Computation) -> Iterator[Hypothesis]:
    names = ("one of its summands",) * len(computation.inputs)
    for index, name in enumerate(names):
        rest = (*computation.inputs[:index], *computation.inputs[index + 1 :])
        if rest:
            value = recompute(dataclasses.replace(computation, inputs=rest))
            yield Hypothesis(Fault.RESIDUAL, f"It lacks {name}, the {_ordinal(index)}.", value)


def _ordinal(index: int) -> str:
    return ("first", "second", "third")[index]


# Precision


def _roundings(computation: Computation, exact: Array) -> Iterator[Hypothesis]:
    """Weights, inputs or outputs rounded to a narrower format."""
    for name, rounding in _FORMATS.items():
        rounded = rounding(torch.from_numpy(exact)).numpy()
        yield Hypothesis(Fault.PRECISION, f"Its output is rounded to {name}.", rounded)
        inputs = tuple(rounding(tensor) for tensor in computation.inputs)
        value = recompute(dataclasses.replace(computation, inputs=inputs))
        yield Hypothesis(Fault.PRECISION, f"Its input is rounded to {name}.", value)
        if getattr(computation.module, "weight", None) is not None:
            weights = _with_changed_module(computation, functools.partial(_set_weight, turn=rounding))
            yield Hypothesis(Fault.PRECISION, f"Its weight is rounded to {name}.", weights)
            both = recompute(computation, rounding, rounding)
            yield Hypothesis(Fault.PRECISION, f"It is computed in {name}.", both)


def _int8(tensor: Tensor) -> Tensor:
    scale = tensor.abs().amax().clamp_min(1e-20) / 127
    return (tensor / scale).round() * scale


def _int8_rows(tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        return tensor
    scale = tensor.abs().amax(dim=tuple(range(1, tensor.ndim)), keepdim=True).clamp_min(1e-20) / 127
    return (tensor / scale).round() * scale


def _e4m3(tensor: Tensor) -> Tensor:
    scale = tensor.abs().amax().clamp_min(1e-20) / 448
    return (tensor / scale).to(torch.float8_e4m3fn).float() * scale


_FORMATS: dict[str, Rounding] = {
    "FP16": lambda tensor: tensor.half().float(),
    "BF16": lambda tensor: tensor.bfloat16().float(),
    "FP8 without a scale": lambda tensor: tensor.to(torch.float8_e4m3fn).float(),
    "FP8": _e4m3,
    "INT8": _int8,
    "INT8 by rows": _int8_rows,
}


# Where the error is


def _where(exact: Array, value: Array) -> str:
    """Which channels are wrong, where they are few."""
    channels = exact.shape[-1]
    difference = (value - exact).reshape(-1, channels)
    error = np.linalg.norm(difference, axis=0)
    if exact.shape[1] > 1 and np.linalg.norm(difference - difference.mean(axis=0)) < EXPLAINS * np.linalg.norm(error):
        return "Its bias is wrong: every token is off by the same."
    share = np.sort(np.square(error))[::-1].cumsum()
    wrong = int(np.searchsorted(share, 0.99 * share[-1])) + 1
    if channels > 8 and wrong <= channels // 4:
        which = ", ".join(str(index) for index in np.argsort(-error)[: min(wrong, 3)])
        return f"{wrong} of its {channels} channels hold the error ({which}{', ...' if wrong > 3 else ''})."
    return "Its error is spread over its channels, and no other kind of fault explains it."

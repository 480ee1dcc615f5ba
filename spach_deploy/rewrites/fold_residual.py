"""Fold the residual addition around a depthwise convolution into the centre weight of its kernel.

    x + W * x   =>   W'[:, 0, 1, 1] = W[:, 0, 1, 1] + 1

Quantized depthwise convolutions are skipped: the 1 would be rounded to eight bits with the kernel.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from spach_deploy.rewrites.base import Change, Outcome, double, modules_of, probe, prove, set_parameter
from spach_deploy.rewrites.static_modules import StaticPositionEncoding

NAME = "fold_residual"


def fold_residual(model: nn.Module) -> Outcome:
    """Fold the residual addition around every position encoding, in place."""
    changes: list[Change] = []
    skipped: list[str] = []
    for path, encoding in modules_of(model, StaticPositionEncoding):
        assert isinstance(encoding, StaticPositionEncoding)
        if encoding.is_quantized:
            skipped.append(f"{path}: its kernel is quantized, and the identity would be rounded with it")
            continue
        conv = encoding.net[1]
        assert isinstance(conv, nn.Conv2d)
        old, new = double(conv), double(conv)
        new.weight.data[:, 0, 1, 1] += 1.0
        x = probe(1, encoding.dim, 3, 4)
        changes.append(prove(NAME, path, partial(_with_residual, old), new, x))
        set_parameter(conv, "weight", new.weight)
        encoding.includes_residual = True
    return Outcome(tuple(changes), tuple(skipped))


def _with_residual(conv: nn.Conv2d, x: Tensor) -> Tensor:
    y: Tensor = x + conv(x)
    return y

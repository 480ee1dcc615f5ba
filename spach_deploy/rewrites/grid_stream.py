"""Carry the residual stream as (B, H, W, C) instead of (B, N, C), where that saves kernels.

Both hold the same numbers in the same order (tokens are row-major), so only reshapes move. It is done in two cases:

- In models with MLP blocks. Products over tokens and the operators after them then have one layout, and TensorRT makes
  one kernel of residual addition, depthwise convolution and LayerNorm: ms_mlp_xxs has 97 kernels without and 87 with it
  (`python -m benchmarks.kernels ms_mlp_xxs --no-rewrite grid_stream`).
- Where depthwise convolutions stay convolutions (`--no-rewrite shift_depthwise`): conv_xxs has 67 kernels and 239 MB at
  batch 8 without it, 66 and 237 MB with it.

Other models get the same kernels with (B, N, C), and their attention moves up to 2.5 % fewer bytes.
"""

from __future__ import annotations

from torch import nn

from spach_deploy.rewrites.base import Change, Outcome, own, probe, prove_layout
from spach_deploy.rewrites.static_modules import (
    StaticDownsampling,
    StaticPositionEncoding,
    StaticSpach,
    StaticSpatialMLP,
)

NAME = "grid_stream"


def grid_stream(model: nn.Module) -> Outcome:
    """Set `grid_stream` on every module that reads or makes the stream, in place."""
    assert isinstance(model, StaticSpach)
    if model.is_shifted and not any(isinstance(module, StaticSpatialMLP) for module in model.modules()):
        return Outcome(skipped=("with shifted products and without MLP blocks it gains nothing",))
    changes: list[Change] = []
    proven: set[tuple[object, ...]] = set()
    model.stem.grid_stream = True
    for path, module in model.named_modules():
        if isinstance(module, (StaticDownsampling, StaticPositionEncoding)):
            shape = (type(module), module.grid, module.dim)
            old = own(module)
            module.grid_stream = True
            if shape not in proven:
                changes.append(_prove(path, old, module))
            proven.add(shape)
    return Outcome(tuple(changes))


def _prove(path: str, old: nn.Module, module: StaticDownsampling | StaticPositionEncoding) -> Change:
    height, width = module.grid
    tokens = probe(2, height * width, module.dim)
    return prove_layout(NAME, path, old, lambda x: module(x.reshape(-1, height, width, module.dim)), tokens)

"""The token stream as (B, H, W, C) instead of (B, N, C), in models with MLP blocks or without shifted products.

Row-major tokens are the same numbers in the same order, so this only changes where reshapes stand. Products over tokens
and what follows them meet in one layout, and the compiler makes one kernel of a residual add, the depthwise convolution
and LayerNorm: ms_mlp_xxs has 97 kernels without and 87 with it (`python -m benchmarks.kernels ms_mlp_xxs --no-rewrite
grid_stream`). Other blocks get the same kernels from tokens, and attention moves up to 2.5 % fewer bytes, unless
depthwise convolutions stay convolutions (`--no-rewrite shift_depthwise`): then conv_xxs has 67 kernels and 239 MB at
batch 8 without it, 66 and 237 with it.
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
    """Switch every module of the stream."""
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

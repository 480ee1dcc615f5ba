"""The token stream as (B, H, W, C) instead of (B, N, C).

Row-major tokens are the same numbers in the same order, so this only removes reshapes: convolutions, residual adds and
LayerNorm meet in one layout and the compiler makes one kernel of them.
"""

from __future__ import annotations

from torch import nn

from spach_deploy.rewrites.base import Change, Outcome, own, probe, prove_layout
from spach_deploy.rewrites.static_modules import StaticDownsampling, StaticPositionEncoding, StaticSpach

NAME = "grid_stream"


def grid_stream(model: nn.Module) -> Outcome:
    """Switch every module of the stream."""
    assert isinstance(model, StaticSpach)
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

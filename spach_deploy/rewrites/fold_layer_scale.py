"""Fold LayerScale (gamma_1) into the projection after attention.

    gamma * (W y + b)   =>   W' = diag(gamma) W, b' = gamma * b

Not for spatial MLPs: gamma scales channels and fc2 mixes tokens, so no weight of theirs can take it.
"""

from __future__ import annotations

from torch import nn

from spach_deploy.rewrites.base import Change, Outcome, double, modules_of, probe, prove, set_parameter, with_parameters
from spach_deploy.rewrites.static_modules import StaticAttention, StaticBlock

NAME = "fold_layer_scale"


def fold_layer_scale(model: nn.Module) -> Outcome:
    """Fold gamma_1 of every attention block, in place."""
    changes: list[Change] = []
    skipped: list[str] = []
    for path, block in modules_of(model, StaticBlock):
        assert isinstance(block, StaticBlock)
        if isinstance(block.spatial_func, StaticAttention) and block.gamma_1 is not None:
            changes.append(_fold(path, block, block.spatial_func))
        elif block.spatial_func is not None:
            skipped.append(f"{path}: gamma_1 scales channels, its spatial MLP mixes tokens; no weight can take it")
    return Outcome(tuple(changes), tuple(skipped) if changes or skipped else ("no LayerScale in this model",))


def _fold(path: str, block: StaticBlock, attention: StaticAttention) -> Change:
    assert block.gamma_1 is not None
    gamma = block.gamma_1.detach().double().reshape(-1)
    old = double(attention.proj)
    new = with_parameters(old, {"weight": old.weight * gamma[:, None], "bias": old.bias * gamma})
    change = prove(NAME, path, lambda x: gamma * old(x), new, probe(64, gamma.numel()))
    set_parameter(attention.proj, "weight", new.weight)
    set_parameter(attention.proj, "bias", new.bias)
    block.gamma_1 = None
    return change

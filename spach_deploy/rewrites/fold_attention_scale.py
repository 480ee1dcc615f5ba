"""Fold the scale of attention scores into the query rows of qkv.

(s q) k^T with q = W_q x + b_q   =>   W_q' = s W_q, b_q' = s b_q
"""

from __future__ import annotations

import torch
from torch import nn

from spach_deploy.rewrites.base import Change, Outcome, modules_of, probe, prove, set_parameter, with_parameters
from spach_deploy.rewrites.static_modules import FEW_TOKENS, StaticAttention, on_few_tokens

NAME = "fold_attention_scale"


def fold_attention_scale(model: nn.Module) -> Outcome:
    """Fold the scale of every attention, in place."""
    changes: list[Change] = []
    for path, attention in modules_of(model, StaticAttention):
        assert isinstance(attention, StaticAttention)
        dim = attention.qkv.in_features
        old = on_few_tokens(attention)
        factor = torch.ones_like(old.qkv.bias)
        factor[:dim] = attention.scale
        scaled = {"qkv.weight": old.qkv.weight * factor[:, None], "qkv.bias": old.qkv.bias * factor}
        new = with_parameters(old, scaled)
        new.scale = 1.0
        changes.append(prove(NAME, path, old, new, probe(2, FEW_TOKENS, dim)))
        set_parameter(attention.qkv, "weight", new.qkv.weight)
        set_parameter(attention.qkv, "bias", new.qkv.bias)
        attention.scale = 1.0
    return Outcome(tuple(changes), () if changes else ("no attention in this model",))

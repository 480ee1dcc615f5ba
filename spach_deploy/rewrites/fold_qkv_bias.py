"""Remove the biases of key and value from qkv; the value's goes into the bias of the projection.

Key: its bias adds q . b_k to all scores of a row, and softmax ignores what is common to a row. Value: the rows of the
attention weights sum to 1, so b_v reaches the projection unchanged:

    softmax(q (k + b_k)^T) (v + b_v) = softmax(q k^T) v + b_v   =>   b' = W_proj b_v + b

The packed bias stays, with zeros for key and value, because the query needs its part.
"""

from __future__ import annotations

import torch
from torch import nn

from spach_deploy.rewrites.base import Change, Outcome, modules_of, probe, prove, set_parameter, with_parameters
from spach_deploy.rewrites.static_modules import FEW_TOKENS, StaticAttention, on_few_tokens

NAME = "fold_qkv_bias"


def fold_qkv_bias(model: nn.Module) -> Outcome:
    """Remove the key and value biases of every attention, in place."""
    changes: list[Change] = []
    for path, attention in modules_of(model, StaticAttention):
        assert isinstance(attention, StaticAttention)
        dim = attention.qkv.in_features
        old = on_few_tokens(attention)
        moved = old.proj.weight @ old.qkv.bias[2 * dim :]
        query = torch.cat((old.qkv.bias[:dim], torch.zeros_like(old.qkv.bias[dim:])))
        new = with_parameters(old, {"proj.bias": old.proj.bias + moved, "qkv.bias": query})
        changes.append(prove(NAME, path, old, new, probe(2, FEW_TOKENS, dim)))
        set_parameter(attention.proj, "bias", new.proj.bias)
        set_parameter(attention.qkv, "bias", new.qkv.bias)
    return Outcome(tuple(changes), () if changes else ("no attention in this model",))

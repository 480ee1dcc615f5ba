"""qkv's bias into its weight, by way of the one channel that LayerNorm leaves free.

LayerNorm hands out y = w z + b, channel by channel, with mean(z) = 0. So one combination of its channels is the same
for every token:

    n . y = beta,  n_c = 1 / w_c,  beta = sum_c b_c / w_c      =>      W y + c = (W + c n^T / beta) y

To keep beta large, the norm's bias is moved by t w first, t = 4 / sqrt(C): beta grows by t C, the product by the
constant t W w, and c gives that back:

    b' = b + t w,  beta' = beta + t C,  W' = W + (c - t W w) n^T / beta'

Query, key and value come out as before, to the last bit of FP64; behind it the product has no bias, which
`tokens_first` turns into an attention without moves. Rounding of y, which n . y inherits, must not cost more than
rounding c itself would, or the bias stays; and eight bits want numbers around zero, so theirs stays too.
"""

from __future__ import annotations

import math

from torch import nn

from spach_deploy.rewrites.base import Change, Outcome, double, modules_of, own, probe, prove, set_parameter
from spach_deploy.rewrites.static_modules import FEW_TOKENS, StaticAttention, StaticBlock, StaticSpach, on_few_tokens

NAME = "absorb_qkv_bias"

_SHIFT = 4.0
"""t times sqrt(C). With w = 1 and b = 0: y grows by 3 % at C = 256, and n . y is known 4 times better than needed."""

_GROWTH = 4.0
"""Times that the largest weight may grow: else a channel that the norm nearly switches off would carry the bias."""


def absorb_qkv_bias(model: nn.Module) -> Outcome:
    """Do it in every attention block."""
    assert isinstance(model, StaticSpach)
    if not model.is_tokens_first or model.is_quantized:
        return Outcome(skipped=("it serves attention with tokens first, in floating point",))
    changes: list[Change] = []
    skipped: list[str] = []
    for path, block in modules_of(model, StaticBlock):
        assert isinstance(block, StaticBlock)
        if not isinstance(block.spatial_func, StaticAttention):
            continue
        reason = _absorb(path, block, changes)
        if reason:
            skipped.append(f"{path}: {reason}")
    return Outcome(tuple(changes), tuple(skipped) if changes or skipped else ("no attention in this model",))


def _absorb(path: str, block: StaticBlock, changes: list[Change]) -> str:
    """Change the block and append its proof, or say why not."""
    norm, attention = block.norm1, block.spatial_func
    assert norm is not None
    assert isinstance(attention, StaticAttention)
    if not attention.qkv.bias.any():
        return "qkv has no bias"
    old_norm, old_attention = double(norm), on_few_tokens(attention)
    new_norm, twin = own(old_norm), own(old_attention)
    reason = _move(new_norm, twin.qkv)
    if reason:
        return reason
    old, new = nn.Sequential(old_norm, old_attention), nn.Sequential(new_norm, twin)
    changes.append(prove(NAME, path, old, new, probe(2, FEW_TOKENS, block.dim)))
    set_parameter(norm, "bias", new_norm.bias)
    set_parameter(attention.qkv, "weight", twin.qkv.weight)
    set_parameter(attention.qkv, "bias", twin.qkv.bias)
    return ""


def _move(norm: nn.LayerNorm, qkv: nn.Linear) -> str:
    """Change both in place, in FP64; or say why not."""
    w, b, weight, bias = (tensor.data for tensor in (norm.weight, norm.bias, qkv.weight, qkv.bias))
    if not w.all():
        return "norm1 has a weight of zero"
    channels = w.numel()
    ratios = b / w
    shift = math.copysign(_SHIFT / math.sqrt(channels), float(ratios.sum()))
    ratios = ratios + shift
    beta = float(ratios.sum())
    if math.sqrt(float((1 + ratios**2).sum())) > abs(beta):
        return "norm1's rounding would cost more than the bias's own"
    changed = weight + (bias - shift * (weight @ w))[:, None] / (beta * w)
    if changed.abs().max() > _GROWTH * weight.abs().max():
        return "a channel that norm1 nearly switches off would have to carry it"
    for layer, name, value in ((norm, "bias", b + shift * w), (qkv, "weight", changed), (qkv, "bias", bias * 0)):
        setattr(layer, name, nn.Parameter(value, requires_grad=False))
    return ""

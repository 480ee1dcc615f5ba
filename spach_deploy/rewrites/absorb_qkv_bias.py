"""Move the bias of qkv into its weight, with the one combination of LayerNorm's channels that is constant.

LayerNorm's output is y = w z + b, channel by channel, with mean(z) = 0. So one linear combination of its channels is
the same for every token, and a constant is all that a bias needs:

    n . y = beta,  n_c = 1 / w_c,  beta = sum_c b_c / w_c      =>      W y + c = (W + c n^T / beta) y

To keep beta large, the norm's bias is moved by t w first, t = 4 / sqrt(C): beta grows by t C, the product by the
constant t W w, and c gives that back:

    b' = b + t w,  beta' = beta + t C,  W' = W + (c - t W w) n^T / beta'

Query, key and value are the same but for FP64's rounding. Without a bias, `tokens_first` makes an attention that copies
no q, k and v. The bias stays where the rounding of y in n . y would cost more than rounding c itself, and in models
that are quantized, because eight bits need numbers around zero.
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
"""By which factor the largest weight may grow. It grows more where LayerNorm's weight of a channel is close to zero."""


def absorb_qkv_bias(model: nn.Module) -> Outcome:
    """Move the bias of every qkv, in place; blocks where that costs accuracy are skipped with the reason."""
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
    """Change the block, compare it with the original and append the result to `changes`; or return
    why it is skipped.
    """
    norm, attention = block.norm1, block.spatial_func
    assert norm is not None
    assert isinstance(attention, StaticAttention)
    if not attention.qkv.bias.any():
        return "qkv has no bias"
    old_norm, old_attention = double(norm), on_few_tokens(attention)
    new_norm, new_attention = own(old_norm), own(old_attention)
    reason = _move(new_norm, new_attention.qkv)
    if reason:
        return reason
    old, new = nn.Sequential(old_norm, old_attention), nn.Sequential(new_norm, new_attention)
    changes.append(prove(NAME, path, old, new, probe(2, FEW_TOKENS, block.dim)))
    set_parameter(norm, "bias", new_norm.bias)
    set_parameter(attention.qkv, "weight", new_attention.qkv.weight)
    set_parameter(attention.qkv, "bias", new_attention.qkv.bias)
    return ""


def _move(norm: nn.LayerNorm, qkv: nn.Linear) -> str:
    """Change both modules, which are FP64, in place; or return why that is not possible."""
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

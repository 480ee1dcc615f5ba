"""Multi-head self-attention over tokens, and what can be folded into its weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spach_deploy.blocks.base import (
    Call,
    Change,
    GraphForm,
    Outcome,
    double,
    has_other_parameters,
    modules_of,
    own,
    probe,
    prove,
    set_parameter,
    with_parameters,
)

FEW_TOKENS = 16
"""Tokens on which rewrites of weights are compared: what is folded does not depend on their number."""


LEAST_HEAD, HEAD_MULTIPLE = 16, 8
"""Sizes of heads for TensorRT, by experiment (for RTX 1.7.1, FP16, sm89): below 12 attention is not fused, and sizes
that are no multiple of 8 cost four kernels more for each attention.
"""


class StaticAttention(nn.Module):
    """Attention with one transpose for q, k and v together: (..., C) -> (B*N, C), or (B, *shape) where it is given.

    Both layers are its own, because rewrites of one block must not change another that shares its attention. Both have
    a bias, of zeros where the reference has none: then rewrites and passes need one case only.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        num_heads: int,
        num_tokens: int,
        scale: float,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.qkv = _with_bias(qkv)
        self.proj = _with_bias(proj)
        self.num_heads = num_heads
        self.num_tokens = num_tokens
        self.scale = scale
        self.shape = shape

    @property
    def head_size(self) -> int:
        """Channels of a head, with those that `pad_heads` added."""
        return len(self.qkv.weight) // (3 * self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens by content."""
        heads = self.num_heads
        packed = self.qkv(x.reshape(-1, self.qkv.in_features))
        packed = packed.reshape(-1, self.num_tokens, 3 * heads, self.head_size).transpose(1, 2)  # (B, 3h, N, d)
        q, k, v = packed.split(heads, dim=1)
        if self.scale != 1.0:
            q = q * self.scale
        weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        y: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(-1, heads * self.head_size))
        return y if self.shape is None else y.reshape(-1, *self.shape)


def _with_bias(linear: nn.Linear) -> nn.Linear:
    """A copy of `linear` that shares its tensors, with a bias of zeros where it has none."""
    copied = own(linear)
    if copied.bias is None:
        copied.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
    return copied


def on_few_tokens(attention: StaticAttention) -> StaticAttention:
    """A copy of `attention` in FP64 for `FEW_TOKENS` tokens."""
    copied = double(attention)
    copied.num_tokens, copied.shape = FEW_TOKENS, None
    return copied


def fold_attention_scale(model: nn.Module, form: GraphForm) -> Outcome:
    """Fold the scale of every attention's scores into the query rows of qkv, in place.

    (s q) k^T with q = W_q x + b_q   =>   W_q' = s W_q, b_q' = s b_q
    """
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
        changes.append(prove("fold_attention_scale", path, old, new, probe(2, FEW_TOKENS, dim)))
        set_parameter(attention.qkv, "weight", new.qkv.weight)
        set_parameter(attention.qkv, "bias", new.qkv.bias)
        attention.scale = 1.0
    return Outcome(tuple(changes), () if changes else ("no attention in this model",))


def fold_qkv_bias(model: nn.Module, form: GraphForm) -> Outcome:
    """Remove the biases of key and value from every qkv, in place; the value's goes into the bias of the projection.

    Key: its bias adds q . b_k to all scores of a row, and softmax ignores what is common to a row. Value: the rows of
    the attention weights sum to 1, so b_v reaches the projection unchanged:

        softmax(q (k + b_k)^T) (v + b_v) = softmax(q k^T) v + b_v   =>   b' = W_proj b_v + b

    The packed bias stays, with zeros for key and value, because the query needs its part.
    """
    changes: list[Change] = []
    for path, attention in modules_of(model, StaticAttention):
        assert isinstance(attention, StaticAttention)
        dim = attention.qkv.in_features
        old = on_few_tokens(attention)
        moved = old.proj.weight @ old.qkv.bias[2 * dim :]
        query = torch.cat((old.qkv.bias[:dim], torch.zeros_like(old.qkv.bias[dim:])))
        new = with_parameters(old, {"proj.bias": old.proj.bias + moved, "qkv.bias": query})
        changes.append(prove("fold_qkv_bias", path, old, new, probe(2, FEW_TOKENS, dim)))
        set_parameter(attention.proj, "bias", new.proj.bias)
        set_parameter(attention.qkv, "bias", new.qkv.bias)
    return Outcome(tuple(changes), () if changes else ("no attention in this model",))


def pad_heads(model: nn.Module, form: GraphForm) -> Outcome:
    """Pad small heads with channels of zeros to a size that TensorRT's attention kernel takes, in place.

        q' = (q, 0), k' = (k, 0), v' = (v, 0), W_proj' = (W_proj, 0)   =>   q' k'^T = q k^T, W_proj' v' = W_proj v

    An attention of 4 heads of 8 takes three kernels less, because it is one of them then, and half the bytes.
    """
    if not form.is_tokens_first:
        return Outcome(skipped=("it serves TensorRT's attention kernel",))
    if form.is_quantized:
        return Outcome(skipped=("calibrations fit every target, so layers keep their sizes",))
    changes: list[Change] = []
    for path, attention in modules_of(model, StaticAttention):
        assert isinstance(attention, StaticAttention)
        added = padded_size(attention.head_size) - attention.head_size
        if added:
            old, new = on_few_tokens(attention), on_few_tokens(attention)
            _pad(new, added)
            changes.append(prove("pad_heads", path, old, new, probe(2, FEW_TOKENS, attention.qkv.in_features)))
            _pad(attention, added)
    return Outcome(tuple(changes), () if changes else ("no heads of a size that needs it",))


def padded_size(head_size: int) -> int:
    """The size to which heads of `head_size` channels are padded."""
    return max(LEAST_HEAD, -(-head_size // HEAD_MULTIPLE) * HEAD_MULTIPLE)


def _pad(attention: StaticAttention, added: int) -> None:
    """Add `added` channels of zeros to every head, in place, in the weights' precision."""
    size, dim = attention.head_size, attention.qkv.in_features
    with torch.no_grad():
        rows = nn.functional.pad(attention.qkv.weight.reshape(-1, size, dim), (0, 0, 0, added)).flatten(0, 1)
        bias = nn.functional.pad(attention.qkv.bias.reshape(-1, size), (0, added)).flatten()
        columns = nn.functional.pad(attention.proj.weight.reshape(dim, -1, size), (0, added)).flatten(1)
    for layer, name, value in (
        (attention.qkv, "weight", rows),
        (attention.qkv, "bias", bias),
        (attention.proj, "weight", columns),
    ):
        setattr(layer, name, nn.Parameter(value, requires_grad=False))
    attention.qkv.out_features, attention.proj.in_features = rows.shape[0], columns.shape[1]


def static_forms(module: nn.Module, call: Call) -> Iterator[nn.Module]:
    """Attentions that `module` may be: packed qkv, projection, and its own numbers as heads and scale, or others."""
    linears = [child for child in module.children() if isinstance(child, nn.Linear)]
    if len(linears) != 2 or not call.is_tokens or has_other_parameters(module, linears):
        return
    dim = call.input[2]
    packed, proj = linears if linears[0].out_features == 3 * dim else reversed(linears)
    if (packed.in_features, packed.out_features, proj.in_features, proj.out_features) != (dim, 3 * dim, dim, dim):
        return
    own = [value for value in vars(module).values() if isinstance(value, int | float) and not isinstance(value, bool)]
    heads = [value for value in own if isinstance(value, int) and value > 0 and dim % value == 0]
    for count in dict.fromkeys((*heads, *(value for value in range(1, dim + 1) if dim % value == 0))):
        for scale in dict.fromkeys(((dim // count) ** -0.5, *(value for value in own if isinstance(value, float)))):
            yield StaticAttention(packed, proj, count, call.input[1], scale, call.input[1:])

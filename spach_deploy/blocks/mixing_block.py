"""The SPACH block, which mixes tokens and then channels, and what its edges allow: LayerScale and biases moved away."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor, nn

from spach_deploy.blocks.attention import FEW_TOKENS, StaticAttention, on_few_tokens
from spach_deploy.blocks.base import (
    Call,
    Change,
    GraphForm,
    Outcome,
    double,
    modules_of,
    own,
    probe,
    prove,
    set_parameter,
    with_parameters,
)
from spach_deploy.blocks.channel_mlp import StaticChannelMLP
from spach_deploy.blocks.depthwise import StaticPositionEncoding
from spach_deploy.blocks.token_mlp import StaticSpatialMLP


class StaticBlock(nn.Module):
    """A mixing block; see `spach_deploy.models.spach.MixingBlock` for what it computes.

    `cpe_net` None: without position encoding. `spatial_func` None: a convolution block. `gamma_1` None: there is no
    LayerScale, or it is folded into the spatial function's weights. `grid_stream`: the stream is (B, H, W, C).
    """

    def __init__(
        self,
        grid: tuple[int, int],
        cpe_net: StaticPositionEncoding | None,
        norm2: nn.LayerNorm,
        channel_func: StaticChannelMLP,
        norm1: nn.LayerNorm | None = None,
        spatial_func: StaticAttention | StaticSpatialMLP | None = None,
        gamma_1: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.dim = norm2.normalized_shape[0]
        self.grid_stream = False
        self.gamma_1 = gamma_1
        self.spatial_func = spatial_func
        self.norm1 = norm1
        self.channel_func = channel_func
        self.norm2 = norm2
        self.cpe_net = cpe_net

    @property
    def includes_residual(self) -> bool:
        """Whether the residual addition is folded into the position encoding."""
        return self.cpe_net is not None and self.cpe_net.includes_residual

    def _stream(self, x: Tensor) -> Tensor:
        height, width = self.grid
        return x.reshape(-1, height, width, self.dim) if self.grid_stream else x.reshape(-1, height * width, self.dim)

    def spatial_branch(self, x: Tensor) -> Tensor:
        """gamma_1 * spatial(norm1(x)), in the layout of the stream."""
        assert self.norm1 is not None
        assert self.spatial_func is not None
        y = self._stream(self.spatial_func(self.norm1(x)))
        return y if self.gamma_1 is None else self.gamma_1 * y

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, then channels."""
        y = x
        if self.cpe_net is not None:
            y = self.cpe_net(x) if self.includes_residual else x + self.cpe_net(x)
        if self.spatial_func is not None:
            y = y + self.spatial_branch(x)
        return y + self._stream(self.channel_func(self.norm2(y)))


def fold_residual(model: nn.Module, form: GraphForm) -> Outcome:
    """Fold the residual addition around a block's depthwise convolution into the centre weight of its kernel, in place.

        x + W * x   =>   W'[:, 0, 1, 1] = W[:, 0, 1, 1] + 1

    Quantized depthwise convolutions are skipped: the 1 would be rounded to eight bits with the kernel.
    """
    changes: list[Change] = []
    skipped: list[str] = []
    for block_path, block in modules_of(model, StaticBlock):
        assert isinstance(block, StaticBlock)
        path, encoding = f"{block_path}.cpe_net", block.cpe_net
        if encoding is None:
            skipped.append(f"{block_path}: it has no position encoding")
            continue
        if encoding.is_quantized:
            skipped.append(f"{path}: its kernel is quantized, and the identity would be rounded with it")
            continue
        conv = encoding.net[1]
        assert isinstance(conv, nn.Conv2d)
        old, new = double(conv), double(conv)
        new.weight.data[:, 0, 1, 1] += 1.0
        x = probe(1, encoding.dim, 3, 4)
        changes.append(prove("fold_residual", path, partial(_with_residual, old), new, x))
        set_parameter(conv, "weight", new.weight)
        encoding.includes_residual = True
    return Outcome(tuple(changes), tuple(skipped))


def _with_residual(conv: nn.Conv2d, x: Tensor) -> Tensor:
    y: Tensor = x + conv(x)
    return y


def fold_layer_scale(model: nn.Module, form: GraphForm) -> Outcome:
    """Fold LayerScale (gamma_1) into the projection after attention, in place.

        gamma * (W y + b)   =>   W' = diag(gamma) W, b' = gamma * b

    Not for spatial MLPs: gamma scales channels and fc2 mixes tokens, so no weight of theirs can take it.
    """
    changes: list[Change] = []
    skipped: list[str] = []
    for path, block in modules_of(model, StaticBlock):
        assert isinstance(block, StaticBlock)
        if isinstance(block.spatial_func, StaticAttention) and block.gamma_1 is not None:
            changes.append(_fold_scale(path, block, block.spatial_func))
        elif block.spatial_func is not None and block.gamma_1 is not None:
            skipped.append(f"{path}: gamma_1 scales channels, its spatial MLP mixes tokens; no weight can take it")
    return Outcome(tuple(changes), tuple(skipped) if changes or skipped else ("no LayerScale in this model",))


def _fold_scale(path: str, block: StaticBlock, attention: StaticAttention) -> Change:
    assert block.gamma_1 is not None
    gamma = block.gamma_1.detach().double().reshape(-1)
    old = double(attention.proj)
    new = with_parameters(old, {"weight": old.weight * gamma[:, None], "bias": old.bias * gamma})
    change = prove("fold_layer_scale", path, lambda x: gamma * old(x), new, probe(64, gamma.numel()))
    set_parameter(attention.proj, "weight", new.weight)
    set_parameter(attention.proj, "bias", new.bias)
    block.gamma_1 = None
    return change


_SHIFT = 4.0
"""t times sqrt(C). With w = 1 and b = 0: y grows by 3 % at C = 256, and n . y is known 4 times better than needed."""


_GROWTH = 4.0
"""By which factor the largest weight may grow. It grows more where LayerNorm's weight of a channel is close to zero."""


ABSORBING = ("norm1.bias", "spatial_func.qkv.weight", "spatial_func.qkv.bias")
"""The parameters of a block that `absorb_qkv_bias` changes."""

ABSORBED = "spatial_func.qkv"
"""The layer of a block whose bias it absorbs."""


def absorb_qkv_bias(model: nn.Module, form: GraphForm) -> Outcome:
    """Move the bias of qkv into its weight, in place, with the one combination of LayerNorm's channels that is
    constant.

    LayerNorm's output is y = w z + b, channel by channel, with mean(z) = 0. So one linear combination of its channels
    is the same for every token, and a constant is all that a bias needs:

        n . y = beta,  n_c = 1 / w_c,  beta = sum_c b_c / w_c      =>      W y + c = (W + c n^T / beta) y

    To keep beta large, the norm's bias is moved by t w first, t = 4 / sqrt(C): beta grows by t C, the product by the
    constant t W w, and c gives that back:

        b' = b + t w,  beta' = beta + t C,  W' = W + (c - t W w) n^T / beta'

    Query, key and value are the same but for FP64's rounding. Without a bias, `tokens_first` makes an attention that
    copies no q, k and v. The bias stays where the rounding of y in n . y would cost more than rounding c itself, and
    where qkv is quantized, because eight bits need numbers around zero.
    """
    if not form.is_tokens_first or (form.is_quantized and not form.in_float):
        return Outcome(skipped=("it serves attention with tokens first, in floating point",))
    changes: list[Change] = []
    skipped: list[str] = []
    for path, block in modules_of(model, StaticBlock):
        assert isinstance(block, StaticBlock)
        if not isinstance(block.spatial_func, StaticAttention):
            continue
        if form.is_quantized and f"{path}.{ABSORBED}" not in form.in_float:
            skipped.append(f"{path}: its qkv is in eight bits")
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
    changes.append(prove("absorb_qkv_bias", path, old, new, probe(2, FEW_TOKENS, block.dim)))
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


def static_forms(module: nn.Module, call: Call, known: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """SPACH blocks that `module` may be. `known`: static forms of its children, by name."""
    encodings = [part for part in known.values() if isinstance(part, StaticPositionEncoding)]
    channels = [part for part in known.values() if isinstance(part, StaticChannelMLP)]
    mixing = [part for part in known.values() if isinstance(part, StaticAttention | StaticSpatialMLP)]
    norms = [child for child in module.children() if isinstance(child, nn.LayerNorm)]
    if not call.is_tokens or (len(encodings), len(channels)) != (1, 1) or len(norms) != len(mixing) + 1:
        return
    scales = [parameter for parameter in module.parameters(recurse=False) if parameter.numel() == call.input[2]]
    if len(scales) > len(mixing) or len(mixing) > 1:
        return
    for order in itertools.permutations(norms):
        if not mixing:
            yield StaticBlock(encodings[0].grid, encodings[0], order[0], channels[0])
        else:
            yield StaticBlock(
                encodings[0].grid, encodings[0], order[1], channels[0], order[0], mixing[0], next(iter(scales), None)
            )

"""Make the static model from the reference: einops becomes reshapes of known size; only the batch size is unknown.

`rearrange(qkv(x), "b n (three h d) -> three b h n d")` becomes one transpose of (B, N, 3h, d) and a split over heads:
the same numbers in the same order, with one copy in memory where TensorRT would make three. Linear layers read rows,
(B*N, C), and those over tokens are products W x. No arithmetic changes.
"""

from __future__ import annotations

from collections import OrderedDict

from einops.layers.torch import Rearrange
from torch import nn

from spach_deploy.models import spach as layers
from spach_deploy.models.spach import Spach
from spach_deploy.rewrites import static_modules as static
from spach_deploy.rewrites.base import Change, Outcome, double, probe, prove, prove_layout

NAME = "static_reshapes"


def to_static(model: Spach) -> static.StaticSpach:
    """The static model of `model`, whose parameters it shares."""
    grids = [(side, side) for side in model.config.grids(model.image_size)]
    dim = model.config.dim
    result = static.StaticSpach(static.StaticStem(model.stem.proj, grids[0], dim), model.norm1, model.norm2, model.head)
    for name in model.stage_names:
        layers_by_index = getattr(model, name)._modules.items()
        result.add_stage(
            name, nn.Sequential(OrderedDict((index, static_module(layer)) for index, layer in layers_by_index))
        )
    return result.eval()


def static_module(layer: nn.Module) -> nn.Module:
    """Static form of one layer of a network stage, a block or a downsampling."""
    if isinstance(layer, layers.Downsampling):
        return static.StaticDownsampling(_without_rearrange(layer.net), _grid(layer), _channels(layer))
    if isinstance(layer, layers.MixingBlock):
        return _block(layer)
    raise TypeError(f"{type(layer).__name__} is not part of a SPACH stage")


def _block(block: layers.MixingBlock) -> static.StaticBlock:
    dim, grid = block.norm2.normalized_shape[0], block.cpe_net.grid
    cpe_net = static.StaticPositionEncoding(_without_rearrange(block.cpe_net.net), grid, dim)
    channel = static.StaticChannelMLP(block.channel_func.fc1, block.channel_func.act, block.channel_func.fc2)
    if not block.has_spatial:
        return static.StaticBlock(cpe_net, block.norm2, channel)
    spatial = _spatial(block.spatial_func, grid[0] * grid[1], dim)
    return static.StaticBlock(cpe_net, block.norm2, channel, block.norm1, spatial, block.gamma_1)


def _spatial(
    func: layers.Attention | layers.SpatialMLP, num_tokens: int, dim: int
) -> static.StaticAttention | static.StaticSpatialMLP:
    if isinstance(func, layers.Attention):
        return static.StaticAttention(func.qkv, func.proj, func.num_heads, num_tokens, func.scale)
    return static.StaticSpatialMLP(static.TokenLinear(func.fc1), func.act, static.TokenLinear(func.fc2), dim)


def _without_rearrange(net: nn.Sequential) -> nn.Sequential:
    """`net` without its einops layers. The convolution keeps its index, 1, so state-dict keys stay
    the published ones.
    """
    return nn.Sequential(nn.Identity(), net[1], nn.Identity())


def _grid(layer: layers.Downsampling) -> tuple[int, int]:
    rearrange = layer.net[0]
    assert isinstance(rearrange, Rearrange)
    return int(rearrange.axes_lengths["h"]), int(rearrange.axes_lengths["w"])


def _channels(layer: layers.Downsampling) -> int:
    convolution = layer.net.get_submodule("1.0")
    assert isinstance(convolution, nn.Conv2d)
    return convolution.in_channels


def prove_static(model: Spach, rewritten: static.StaticSpach) -> Outcome:
    """Compare modules of `model` with their static forms, one of each kind and shape, in FP64 (layout: FP32).

    Raises RewriteError when one computes something else.
    """
    changes: list[Change] = []
    for name in model.stage_names:
        seen: set[str] = set()
        for index, layer in enumerate(getattr(model, name)):
            path, kind = f"{name}.{index}", _kind(layer)
            if kind not in seen:
                seen.add(kind)
                changes.extend(_prove_layer(path, layer, getattr(rewritten, name)[index]))
    return Outcome(tuple(changes))


def _kind(layer: nn.Module) -> str:
    return f"{type(layer).__name__}/{type(getattr(layer, 'spatial_func', None)).__name__}"


def _prove_layer(path: str, old: nn.Module, new: nn.Module) -> list[Change]:
    if isinstance(old, layers.Downsampling):
        height, width = _grid(old)
        return [prove_layout(NAME, path, old, new, probe(2, height * width, _channels(old)))]
    assert isinstance(old, layers.MixingBlock)
    assert isinstance(new, static.StaticBlock)
    x = probe(2, old.cpe_net.grid[0] * old.cpe_net.grid[1], new.dim)
    few = probe(2, static.FEW_TOKENS, new.dim)
    changes = [
        prove_layout(NAME, f"{path}.cpe_net", old.cpe_net, new.cpe_net, x),
        prove(NAME, f"{path}.channel_func", double(old.channel_func), double(new.channel_func), few),
    ]
    if isinstance(new.spatial_func, static.StaticAttention):
        few_tokens = static.on_few_tokens(new.spatial_func)
        changes.append(prove(NAME, f"{path}.spatial_func", double(old.spatial_func), few_tokens, few))
    elif new.spatial_func is not None:
        changes.append(prove(NAME, f"{path}.spatial_func", double(old.spatial_func), double(new.spatial_func), x))
    return changes

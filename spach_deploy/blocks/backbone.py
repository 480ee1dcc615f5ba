"""The whole SPACH model in static form, made of the reference module by module, and the layout of its stream."""

from __future__ import annotations

from collections import OrderedDict

from einops.layers.torch import Rearrange
from torch import Tensor, nn

from spach_deploy.blocks.attention import FEW_TOKENS, StaticAttention, on_few_tokens
from spach_deploy.blocks.base import Change, GraphForm, Outcome, double, own, probe, prove, prove_layout
from spach_deploy.blocks.channel_mlp import StaticChannelMLP
from spach_deploy.blocks.depthwise import StaticPositionEncoding
from spach_deploy.blocks.downsampling import StaticDownsampling
from spach_deploy.blocks.mixing_block import StaticBlock
from spach_deploy.blocks.stem import StaticStem
from spach_deploy.blocks.token_mlp import StaticSpatialMLP, TokenLinear
from spach_deploy.bundle.outputs import TOKENS
from spach_deploy.models import spach as layers
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.models.spach import Spach


class StaticSpach(SelectableOutputs):
    """The static model: images (B, 3, S, S) -> logits (B, classes), or the outputs that are chosen."""

    def __init__(self, stem: StaticStem, norm1: nn.LayerNorm, norm2: nn.LayerNorm, head: nn.Linear | None) -> None:
        super().__init__()
        self.stem = stem
        self.norm1 = norm1
        self.norm2 = norm2
        self.head = head
        self.stage_names: list[str] = []

    def add_stage(self, name: str, stage: nn.Sequential) -> None:
        """Append a network stage under the reference's attribute name."""
        setattr(self, name, stage)
        self.stage_names.append(name)

    @property
    def grid_stream(self) -> bool:
        """Whether the stream is (B, H, W, C) instead of (B, N, C)."""
        return self.stem.grid_stream

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(B, 3, S, S) -> logits (B, classes), or the outputs that are chosen."""
        x = self.norm1(self.stem(x))
        stages = []
        for name in self.stage_names:
            x = getattr(self, name)(x)
            stages.append(x)
        return self.arranged(
            lambda: (self._map(stage, shape) for stage, shape in zip(stages, self.stage_shapes, strict=True)),
            lambda: self._embedding(stages[-1]),
            self._logits,
        )

    def _embedding(self, x: Tensor) -> Tensor:
        """The mean over tokens, (B, C)."""
        y: Tensor = self.norm2(x)
        return y.mean(dim=(1, 2)) if self.grid_stream else y.mean(dim=1)

    def _logits(self, embedding: Tensor) -> Tensor:
        assert self.head is not None
        y: Tensor = self.head(embedding)
        return y

    def _map(self, x: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The stream in the layout of feature maps."""
        channels, height, width = shape
        if self.layout == TOKENS:
            return x.reshape(-1, height * width, channels) if self.grid_stream else x
        y = x if self.grid_stream else x.reshape(-1, height, width, channels)
        return y.permute(0, 3, 1, 2)


def to_static(model: Spach) -> StaticSpach:
    """The static model of `model`, whose parameters it shares."""
    grid, dim = model.architecture.grids[0], model.architecture.width
    head = getattr(model, "head", None)
    result = StaticSpach(StaticStem(model.stem.proj, grid, dim), model.norm1, model.norm2, head)
    result.stage_shapes, result.outputs = model.stage_shapes, model.outputs
    for name in model.stage_names:
        layers_by_index = getattr(model, name)._modules.items()
        result.add_stage(
            name, nn.Sequential(OrderedDict((index, static_module(layer)) for index, layer in layers_by_index))
        )
    return result.eval()


def static_module(layer: nn.Module) -> nn.Module:
    """Static form of one layer of a network stage, a block or a downsampling."""
    if isinstance(layer, layers.Downsampling):
        return StaticDownsampling(_without_rearrange(layer.net), _grid(layer), _channels(layer))
    if isinstance(layer, layers.MixingBlock):
        return _block(layer)
    raise TypeError(f"{type(layer).__name__} is not part of a SPACH stage")


def _block(block: layers.MixingBlock) -> StaticBlock:
    dim, grid = block.norm2.normalized_shape[0], block.grid
    cpe_net = None
    if block.has_position:
        cpe_net = StaticPositionEncoding(_without_rearrange(block.cpe_net.net), grid, dim)
    channel = StaticChannelMLP(block.channel_func.fc1, block.channel_func.act, block.channel_func.fc2)
    if not block.has_spatial:
        return StaticBlock(grid, cpe_net, block.norm2, channel)
    spatial = _spatial(block.spatial_func, grid[0] * grid[1], dim)
    gamma_1 = block.gamma_1 if block.has_scale else None
    return StaticBlock(grid, cpe_net, block.norm2, channel, block.norm1, spatial, gamma_1)


def _spatial(
    func: layers.Attention | layers.SpatialMLP, num_tokens: int, dim: int
) -> StaticAttention | StaticSpatialMLP:
    if isinstance(func, layers.Attention):
        return StaticAttention(func.qkv, func.proj, func.num_heads, num_tokens, func.scale)
    return StaticSpatialMLP(TokenLinear(func.fc1), func.act, TokenLinear(func.fc2), dim)


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


def prove_static(model: Spach, rewritten: StaticSpach) -> Outcome:
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
        return [prove_layout("static_reshapes", path, old, new, probe(2, height * width, _channels(old)))]
    assert isinstance(old, layers.MixingBlock)
    assert isinstance(new, StaticBlock)
    x, few = probe(2, old.grid[0] * old.grid[1], new.dim), probe(2, FEW_TOKENS, new.dim)
    changes = []
    if new.cpe_net is not None:
        changes.append(prove_layout("static_reshapes", f"{path}.cpe_net", old.cpe_net, new.cpe_net, x))
    changes.append(
        prove("static_reshapes", f"{path}.channel_func", double(old.channel_func), double(new.channel_func), few)
    )
    if isinstance(new.spatial_func, StaticAttention):
        few_tokens = on_few_tokens(new.spatial_func)
        changes.append(prove("static_reshapes", f"{path}.spatial_func", double(old.spatial_func), few_tokens, few))
    elif new.spatial_func is not None:
        changes.append(
            prove("static_reshapes", f"{path}.spatial_func", double(old.spatial_func), double(new.spatial_func), x)
        )
    return changes


def grid_stream(model: nn.Module, form: GraphForm) -> Outcome:
    """Carry the residual stream as (B, H, W, C) instead of (B, N, C), where that saves kernels, in place.

    Both hold the same numbers in the same order (tokens are row-major), so only reshapes move. It is done in two cases:

    - In models with MLP blocks. Products over tokens and the operators after them then have one layout, and TensorRT
      makes one kernel of residual addition, depthwise convolution and LayerNorm: ms_mlp_xxs has 97 kernels without and
      87 with it (`python -m benchmarks.kernels ms_mlp_xxs --no-rewrite grid_stream`).
    - Where depthwise convolutions stay convolutions (`--no-rewrite shift_depthwise`): conv_xxs has 67 kernels and 239
      MB at batch 8 without it, 66 and 237 MB with it.

    Other models get the same kernels with (B, N, C), and their attention moves up to 2.5 % fewer bytes.
    """
    if not isinstance(model, StaticSpach):
        return Outcome(skipped=("the layout of the stream is the model's own",))
    if form.is_shifted and not any(isinstance(module, StaticSpatialMLP) for module in model.modules()):
        return Outcome(skipped=("with shifted products and without MLP blocks it gains nothing",))
    changes: list[Change] = []
    proven: set[tuple[object, ...]] = set()
    model.stem.grid_stream = True
    for path, module in model.named_modules():
        if isinstance(module, StaticBlock):
            module.grid_stream = True
        if isinstance(module, (StaticDownsampling, StaticPositionEncoding)):
            shape = (type(module), module.grid, module.dim)
            old = own(module)
            module.grid_stream = True
            if shape not in proven:
                changes.append(_prove_stream(path, old, module))
            proven.add(shape)
    return Outcome(tuple(changes))


def _prove_stream(path: str, old: nn.Module, module: StaticDownsampling | StaticPositionEncoding) -> Change:
    height, width = module.grid
    tokens = probe(2, height * width, module.dim)
    return prove_layout("grid_stream", path, old, lambda x: module(x.reshape(-1, height, width, module.dim)), tokens)

"""The reference: SPACH models in PyTorch, whose blocks mix tokens by convolution, attention or an MLP.

Source: Zhao et al., "A Battle of Network Structures: An Empirical Study of CNN, Transformer, and MLP", arXiv
2108.13002. Names of modules and attributes are the state-dict keys of the published checkpoints. Tensors between blocks
are tokens (B, N, C), row-major over an H by W grid. A single-stage model has one sequence, `blocks`; a multi-stage
model has `layer1` to `layer4`, of which the last three begin with a downsampling.

Everything that is exported is compared with these modules. They keep the einops of the publication on purpose;
`spach_deploy.blocks` makes the static model of them.

Every option of the published constructor is in `Architecture`; dropout and stochastic depth do nothing in evaluation.
"""

from __future__ import annotations

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from spach_deploy.bundle.outputs import TOKENS, usual_outputs
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.options.architecture import CONV, TRANS, Architecture

STEM_WIDTH = 64
"""Channels between the convolutions of the convolutional stem."""


def activation(name: str) -> nn.Module:
    """The module that one of `specs.ACTIVATIONS` names."""
    return {"gelu": nn.GELU(), "gelu-tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "silu": nn.SiLU()}[name]


class ChannelMLP(nn.Module):
    """Two linear layers over channels with an activation between: (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, hidden_dim: int, act: str = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = activation(act)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels of each token."""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class SpatialMLP(nn.Module):
    """Two linear layers over tokens, the same for all channels: (B, N, C) -> (B, N, C). Its weights fix N."""

    def __init__(self, num_tokens: int, hidden_tokens: int, act: str = "gelu") -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.fc1 = nn.Linear(num_tokens, hidden_tokens)
        self.act = activation(act)
        self.fc2 = nn.Linear(hidden_tokens, num_tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens of each channel."""
        x = rearrange(x, "b n c -> b c n")
        y: Tensor = rearrange(self.fc2(self.act(self.fc1(x))), "b c n -> b n c")
        return y


class Attention(nn.Module):
    """Multi-head self-attention with packed qkv: (B, N, C) -> (B, N, C). `qk_scale` None or 0: head size ** -0.5."""

    def __init__(self, dim: int, num_heads: int, qk_scale: float | None = None, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens by content."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        y: Tensor = self.proj(rearrange(weights @ v, "b h n d -> b n (h d)"))
        return y


class PositionEncoding(nn.Module):
    """Depthwise 3x3 convolution over the token grid, without the residual addition: (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        height, width = grid
        self.grid = grid
        self.net = nn.Sequential(
            Rearrange("b (h w) c -> b c h w", h=height, w=width),
            nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim),
            Rearrange("b c h w -> b (h w) c"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each channel over the grid."""
        y: Tensor = self.net(x)
        return y


class MixingBlock(nn.Module):
    """One SPACH block: (B, N, C) -> (B, N, C).

    y = x + gamma_1 * spatial(norm1(x)) + depthwise(x), then y + channel(norm2(y)). The depthwise convolution
    reads the block's input. Convolution blocks have no spatial function: y = x + depthwise(x). Without position
    encoding there is no depthwise convolution, without LayerScale no gamma_1.
    """

    gamma_1: nn.Parameter
    norm1: nn.LayerNorm
    spatial_func: Attention | SpatialMLP
    cpe_net: PositionEncoding

    def __init__(
        self,
        architecture: Architecture,
        dim: int,
        grid: tuple[int, int],
        spatial_func: Attention | SpatialMLP | None,
    ) -> None:
        super().__init__()
        self.has_spatial = spatial_func is not None
        self.has_scale = spatial_func is not None and architecture.layer_scale
        self.has_position = architecture.position_encoding
        self.grid = grid
        if self.has_scale:
            self.gamma_1 = nn.Parameter(torch.full((1, 1, dim), 1e-4))
        if spatial_func is not None:
            self.spatial_func = spatial_func
            self.norm1 = nn.LayerNorm(dim, eps=architecture.norm_eps)
        self.channel_func = ChannelMLP(dim, int(dim * architecture.channel_ratio), architecture.activation)
        self.norm2 = nn.LayerNorm(dim, eps=architecture.norm_eps)
        if self.has_position:
            self.cpe_net = PositionEncoding(dim, grid)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, then channels."""
        y = x
        if self.has_spatial:
            mixed = self.spatial_func(self.norm1(x))
            y = y + (self.gamma_1 * mixed if self.has_scale else mixed)
        if self.has_position:
            y = y + self.cpe_net(x)
        z: Tensor = y + self.channel_func(self.norm2(y))
        return z


class PatchStem(nn.Module):
    """One convolution, kernel = stride = patch: (B, channels, H, W) -> (B, N, C)."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches as tokens."""
        y: Tensor = rearrange(self.proj(x), "b c h w -> b (h w) c")
        return y


class ConvStem(nn.Module):
    """Stem of the "+" models, three convolutions before the patches: (B, channels, H, W) -> (B, N, C)."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        patch = patch_size // 2
        self.proj = nn.Sequential(
            *_conv_bn_relu(channels, kernel_size=7, stride=2),
            *_conv_bn_relu(STEM_WIDTH, kernel_size=3, stride=1),
            *_conv_bn_relu(STEM_WIDTH, kernel_size=3, stride=1),
            nn.Conv2d(STEM_WIDTH, dim, kernel_size=patch, stride=patch),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches as tokens."""
        y: Tensor = rearrange(self.proj(x), "b c h w -> b (h w) c")
        return y


def _conv_bn_relu(channels: int, kernel_size: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, STEM_WIDTH, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return [conv, nn.BatchNorm2d(STEM_WIDTH), nn.ReLU()]


class Downsampling(nn.Module):
    """Halve the grid, double the channels: (B, N, C) -> (B, N/4, 2C)."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        height, width = grid
        self.net = nn.Sequential(
            Rearrange("b (h w) c -> b c h w", h=height, w=width),
            nn.Sequential(
                nn.Conv2d(dim, 2 * dim, kernel_size=2, stride=2, bias=False),
                nn.GroupNorm(1, 2 * dim),
            ),
            Rearrange("b c h w -> b (h w) c"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Merge each 2x2 neighbourhood."""
        y: Tensor = self.net(x)
        return y


class Spach(SelectableOutputs):
    """A SPACH classifier: images (B, channels, H, W) normalized, float -> logits (B, classes), or chosen outputs.

    Without classes there is no head, and it gives the embedding (B, C), the mean over tokens.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        stem = ConvStem if architecture.stem == "conv" else PatchStem
        self.stem = stem(architecture.channels, architecture.width, architecture.patch_size)
        self.norm1 = nn.LayerNorm(architecture.width, eps=architecture.norm_eps)
        for index, name in enumerate(architecture.stage_names):
            setattr(self, name, _stage(architecture, index))
        width = architecture.stage_dims[-1]
        self.norm2 = nn.LayerNorm(width, eps=architecture.norm_eps)
        if architecture.classes:
            self.head = nn.Linear(width, architecture.classes)
        self.stage_shapes = tuple(
            (dim, *grid) for dim, grid in zip(architecture.stage_dims, architecture.grids, strict=True)
        )
        self.outputs = usual_outputs(architecture.classes, width)
        _initialize(self)

    @property
    def stage_names(self) -> list[str]:
        """Attribute names of the stages, in order."""
        return self.architecture.stage_names

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Images (B, channels, H, W) -> tokens of every stage (B, N, C)."""
        x = self.norm1(self.stem(x))
        stages = []
        for name in self.stage_names:
            x = getattr(self, name)(x)
            stages.append(x)
        return stages

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images (B, channels, H, W) -> logits (B, classes), or the outputs that are chosen."""
        stages = self.forward_stages(x)
        return self.arranged(
            lambda: (self._map(tokens, shape) for tokens, shape in zip(stages, self.stage_shapes, strict=True)),
            lambda: self.norm2(stages[-1]).mean(dim=1),
            lambda embedding: self.head(embedding),
        )

    def _map(self, tokens: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Tokens (B, N, C) in the layout of feature maps."""
        return tokens if self.layout == TOKENS else rearrange(tokens, "b (h w) c -> b c h w", h=shape[1])


def _stage(architecture: Architecture, index: int) -> nn.Sequential:
    dim, grid, mixers = architecture.stage_dims[index], architecture.grids[index], architecture.mixers[index]
    layers: list[nn.Module] = [Downsampling(dim // 2, architecture.grids[index - 1])] if index else []
    shared = _spatial(architecture, mixers[0], dim, grid) if architecture.is_shared(index) else None
    for mixer in mixers:
        spatial = shared or _spatial(architecture, mixer, dim, grid)
        layers.append(MixingBlock(architecture, dim, grid, spatial))
    return nn.Sequential(*layers)


def _spatial(architecture: Architecture, mixer: str, dim: int, grid: tuple[int, int]) -> Attention | SpatialMLP | None:
    if mixer == CONV:
        return None
    if mixer == TRANS:
        return Attention(dim, architecture.heads, architecture.qk_scale, architecture.qkv_bias)
    tokens = grid[0] * grid[1]
    return SpatialMLP(tokens, int(tokens * architecture.token_ratio), architecture.activation)


def _initialize(model: nn.Module) -> None:
    """Published initialisation: truncated normals, zero biases, zero head (so the logits of a new model are zero)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name == "head":
                nn.init.zeros_(module.weight)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

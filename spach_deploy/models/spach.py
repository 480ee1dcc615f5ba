"""The reference: SPACH models in PyTorch, whose blocks mix tokens by convolution, attention or an MLP.

Source: Zhao et al., "A Battle of Network Structures: An Empirical Study of CNN, Transformer, and MLP", arXiv
2108.13002. Names of modules and attributes are the state-dict keys of the published checkpoints. Tensors between blocks
are tokens (B, N, C), row-major over an H by W grid. A single-stage model has one sequence, `blocks`; a multi-stage
model has `layer1` to `layer4`, of which the last three begin with a downsampling.

Everything that is exported is compared with these modules. They keep the einops of the publication on purpose;
`spach_deploy.blocks` makes the static model of them.
"""

from __future__ import annotations

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from spach_deploy.common.errors import ModelError
from spach_deploy.models.published import CONV, MLP, STEM_WIDTH, TRANS, SpachConfig


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

    def __init__(self, num_tokens: int, act: str = "gelu") -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.fc1 = nn.Linear(num_tokens, num_tokens // 2)
        self.act = activation(act)
        self.fc2 = nn.Linear(num_tokens // 2, num_tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens of each channel."""
        x = rearrange(x, "b n c -> b c n")
        y: Tensor = rearrange(self.fc2(self.act(self.fc1(x))), "b c n -> b n c")
        return y


class Attention(nn.Module):
    """Multi-head self-attention with packed qkv: (B, N, C) -> (B, N, C). `qk_scale` None or 0: head size ** -0.5."""

    def __init__(self, dim: int, num_heads: int, qk_scale: float | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
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
    reads the block's input. Convolution blocks have no spatial function: y = x + depthwise(x).
    """

    gamma_1: nn.Parameter
    norm1: nn.LayerNorm
    spatial_func: Attention | SpatialMLP

    def __init__(
        self, config: SpachConfig, dim: int, grid: tuple[int, int], spatial_func: Attention | SpatialMLP | None
    ) -> None:
        super().__init__()
        self.has_spatial = spatial_func is not None
        if spatial_func is not None:
            self.gamma_1 = nn.Parameter(torch.full((1, 1, dim), 1e-4))
            self.spatial_func = spatial_func
            self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.channel_func = ChannelMLP(dim, dim * config.mlp_ratio, config.activation)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.cpe_net = PositionEncoding(dim, grid)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, then channels."""
        if self.has_spatial:
            x = x + self.gamma_1 * self.spatial_func(self.norm1(x)) + self.cpe_net(x)
        else:
            x = x + self.cpe_net(x)
        y: Tensor = x + self.channel_func(self.norm2(x))
        return y


class PatchStem(nn.Module):
    """One convolution, kernel = stride = patch: (B, 3, S, S) -> (B, N, C)."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches as tokens."""
        y: Tensor = rearrange(self.proj(x), "b c h w -> b (h w) c")
        return y


class ConvStem(nn.Module):
    """Stem of the "+" models, three convolutions before the patches: (B, 3, S, S) -> (B, N, C)."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        patch = patch_size // 2
        self.proj = nn.Sequential(
            *_conv_bn_relu(3, kernel_size=7, stride=2),
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


__all__ = ["CONV", "MLP", "TRANS", "Spach", "SpachConfig"]


class Spach(nn.Module):
    """A SPACH classifier: images (B, 3, S, S) normalized, float -> logits (B, classes)."""

    def __init__(self, config: SpachConfig, image_size: int = 224, num_classes: int = 1000) -> None:
        super().__init__()
        if num_classes < 1:
            raise ModelError(f"A classifier of {num_classes} classes does not exist.", "Give at least 1 class.")
        self.config = config
        self.image_size = image_size
        self.num_classes = num_classes
        stem = ConvStem if config.conv_stem else PatchStem
        grids = config.grids(image_size)
        self.stem = stem(config.dim, config.patch_size)
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        for index, (mixers, side) in enumerate(zip(config.stages, grids, strict=True)):
            setattr(self, self.stage_names[index], _stage(config, index, mixers, side))
        width = config.dim << (len(config.stages) - 1)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, num_classes)
        _initialize(self)

    @property
    def stage_names(self) -> list[str]:
        """Attribute names of the stages, in order."""
        return self.config.stage_names

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> normalized tokens of the last stage (B, N, C)."""
        x = self.norm1(self.stem(x))
        for name in self.stage_names:
            x = getattr(self, name)(x)
        y: Tensor = self.norm2(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> logits (B, classes)."""
        y: Tensor = self.head(self.forward_features(x).mean(dim=1))
        return y


def _stage(config: SpachConfig, index: int, mixers: tuple[str, ...], side: int) -> nn.Sequential:
    dim = config.dim << index
    layers: list[nn.Module] = [Downsampling(dim // 2, (2 * side, 2 * side))] if index else []
    shared = _spatial(config, MLP, dim, side) if config.shared_spatial and MLP in mixers else None
    for mixer in mixers:
        spatial = shared or _spatial(config, mixer, dim, side)
        layers.append(MixingBlock(config, dim, (side, side), spatial))
    return nn.Sequential(*layers)


def _spatial(config: SpachConfig, mixer: str, dim: int, side: int) -> Attention | SpatialMLP | None:
    if mixer == TRANS:
        return Attention(dim, config.num_heads, config.qk_scale)
    return SpatialMLP(side * side, config.activation) if mixer == MLP else None


def _initialize(model: nn.Module) -> None:
    """Published initialisation: truncated normals, zero biases, zero head (so the logits of a new model are zero)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name == "head":
                nn.init.zeros_(module.weight)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

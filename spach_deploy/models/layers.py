"""Building blocks of SPACH: mixing functions, stems, downsampling.

Source: Zhao et al., "A Battle of Network Structures: An Empirical Study of CNN, Transformer, and MLP", arXiv
2108.13002. Module and attribute names are the published checkpoints' state-dict keys. Tensors between blocks
are tokens (B, N, C), row-major over an H by W grid. einops stays here on purpose: this is the reference that
everything else is compared with; `spach_deploy.rewrites` makes it static.
"""

from __future__ import annotations

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from spach_deploy.models.configs import STEM_WIDTH, SpachConfig


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
    """The same over tokens, each channel alike: (B, N, C) -> (B, N, C). Its weights fix N."""

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
    """Depthwise 3x3 convolution over the token grid: (B, N, C) -> (B, N, C), the residual not included."""

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
    sees the block's input. Convolution blocks have no spatial function: y = x + depthwise(x).
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

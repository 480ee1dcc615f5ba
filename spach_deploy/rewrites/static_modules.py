"""Modules of the static model: those of SPACH with reshapes to known sizes in the place of einops.

They compute what the modules of `spach_deploy.models.spach` compute and keep their attribute names, so state-dict keys
and the ONNX node names made of them are the published ones. Only the batch size is unknown.

`grid_stream` is the layout of the residual stream between modules: False, (B, N, C) as in the reference; True,
(B, H, W, C), which convolutions and TensorRT's pointwise fusions need. Linear layers read rows, (B*N, C), and become
one Gemm each, with bias and GELU in the same kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spach_deploy.rewrites.base import double

FEW_TOKENS = 16
"""Tokens on which rewrites of weights are compared: what is folded does not depend on their number."""


class StaticStem(nn.Module):
    """Patch embedding, (B, 3, S, S) -> the stream, (B, N, C) or (B, H, W, C). `proj`: the reference's projection."""

    def __init__(self, proj: nn.Module, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.proj = proj
        self.grid = grid
        self.dim = dim
        self.grid_stream = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, C) or (B, H, W, C)."""
        x = self.proj(x)
        x = x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        return x if self.grid_stream else x.reshape(-1, self.grid[0] * self.grid[1], self.dim)


class _GridNet(nn.Module):
    """Applies a channels-first `net` to the stream.

    Its input has `grid` (H, W) tokens of `dim` channels, its output `out_tokens` tokens of `out_dim` channels.
    """

    def __init__(self, net: nn.Sequential, grid: tuple[int, int], dim: int, out_tokens: int, out_dim: int) -> None:
        super().__init__()
        self.net = net
        self.grid = grid
        self.dim = dim
        self.out_tokens = out_tokens
        self.out_dim = out_dim
        self.grid_stream = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, M, D), or (B, H, W, C) -> (B, H', W', D)."""
        height, width = self.grid
        y: Tensor = x if self.grid_stream else x.reshape(-1, height, width, self.dim)
        y = self.net(y.permute(0, 3, 1, 2))
        y = y.permute(0, 2, 3, 1)
        return y if self.grid_stream else y.reshape(-1, self.out_tokens, self.out_dim)


class StaticPositionEncoding(_GridNet):
    """Depthwise convolution over the grid.

    `includes_residual`: the residual addition is folded into the kernel (`fold_residual`). `is_quantized`: the kernel
    will be rounded to eight bits, so the residual must not be folded into it.
    """

    def __init__(self, net: nn.Sequential, grid: tuple[int, int], dim: int) -> None:
        super().__init__(net, grid, dim, grid[0] * grid[1], dim)
        self.includes_residual = False
        self.is_quantized = False


class StaticDownsampling(_GridNet):
    """2x2 convolution of stride 2 and GroupNorm: a quarter of the tokens, twice the channels."""

    def __init__(self, net: nn.Sequential, grid: tuple[int, int], dim: int) -> None:
        super().__init__(net, grid, dim, grid[0] * grid[1] // 4, 2 * dim)


class StaticChannelMLP(nn.Module):
    """Two linear layers on rows: (..., C) -> (B*N, C)."""

    def __init__(self, fc1: nn.Linear, act: nn.Module, fc2: nn.Linear) -> None:
        super().__init__()
        self.fc1 = fc1
        self.act = act
        self.fc2 = fc2

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels of each token."""
        y: Tensor = self.fc2(self.act(self.fc1(x.reshape(-1, self.fc1.in_features))))
        return y


class TokenLinear(nn.Module):
    """A linear layer over tokens, W x + b with b a column: (B, N, C) -> (B, M, C).

    W x needs no transpose of tokens and channels; nn.Linear needs one before and one after it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = nn.Parameter(linear.bias.detach().reshape(-1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens of each channel."""
        return torch.matmul(self.weight, x) + self.bias


class StaticSpatialMLP(nn.Module):
    """Two linear layers over tokens: (..., C) -> (B, N, C)."""

    def __init__(self, fc1: TokenLinear, act: nn.Module, fc2: TokenLinear, dim: int) -> None:
        super().__init__()
        self.fc1 = fc1
        self.act = act
        self.fc2 = fc2
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens of each channel."""
        x = x.reshape(-1, self.fc1.weight.shape[1], self.dim)
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class StaticAttention(nn.Module):
    """Attention with one transpose for q, k and v together: (..., C) -> (B*N, C)."""

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, num_heads: int, num_tokens: int, scale: float) -> None:
        super().__init__()
        self.qkv = qkv
        self.proj = proj
        self.num_heads = num_heads
        self.num_tokens = num_tokens
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens by content."""
        dim, heads = self.qkv.in_features, self.num_heads
        packed = self.qkv(x.reshape(-1, dim))
        packed = packed.reshape(-1, self.num_tokens, 3 * heads, dim // heads).transpose(1, 2)  # (B, 3h, N, d)
        q, k, v = packed.split(heads, dim=1)
        if self.scale != 1.0:
            q = q * self.scale
        weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        y: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(-1, dim))
        return y


def on_few_tokens(attention: StaticAttention) -> StaticAttention:
    """A copy of `attention` in FP64 for `FEW_TOKENS` tokens."""
    copied = double(attention)
    copied.num_tokens = FEW_TOKENS
    return copied


class StaticBlock(nn.Module):
    """A mixing block; see `spach_deploy.models.spach.MixingBlock` for what it computes.

    `spatial_func` None: a convolution block. `gamma_1` None: LayerScale is folded into the spatial function's weights.
    """

    def __init__(
        self,
        cpe_net: StaticPositionEncoding,
        norm2: nn.LayerNorm,
        channel_func: StaticChannelMLP,
        norm1: nn.LayerNorm | None = None,
        spatial_func: StaticAttention | StaticSpatialMLP | None = None,
        gamma_1: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.gamma_1 = gamma_1
        self.spatial_func = spatial_func
        self.norm1 = norm1
        self.channel_func = channel_func
        self.norm2 = norm2
        self.cpe_net = cpe_net

    @property
    def dim(self) -> int:
        """Channels."""
        return self.cpe_net.dim

    @property
    def grid(self) -> tuple[int, int]:
        """Token grid, (H, W)."""
        return self.cpe_net.grid

    def _stream(self, x: Tensor) -> Tensor:
        height, width = self.grid
        return (
            x.reshape(-1, height, width, self.dim)
            if self.cpe_net.grid_stream
            else x.reshape(-1, height * width, self.dim)
        )

    def spatial_branch(self, x: Tensor) -> Tensor:
        """gamma_1 * spatial(norm1(x)), in the layout of the stream."""
        assert self.norm1 is not None
        assert self.spatial_func is not None
        y = self._stream(self.spatial_func(self.norm1(x)))
        return y if self.gamma_1 is None else self.gamma_1 * y

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, then channels."""
        y: Tensor = self.cpe_net(x)
        if not self.cpe_net.includes_residual:
            y = x + y
        if self.spatial_func is not None:
            y = y + self.spatial_branch(x)
        return y + self._stream(self.channel_func(self.norm2(y)))


class StaticSpach(nn.Module):
    """The static model: images (B, 3, S, S) -> logits (B, classes).

    Three facts for rewrites: `is_shifted`, the pass `shift_depthwise` will run; `is_tokens_first`, the pass
    `tokens_first` will run; `is_quantized`, some layers will be quantized to eight bits.
    """

    def __init__(self, stem: StaticStem, norm1: nn.LayerNorm, norm2: nn.LayerNorm, head: nn.Linear) -> None:
        super().__init__()
        self.stem = stem
        self.norm1 = norm1
        self.norm2 = norm2
        self.head = head
        self.stage_names: list[str] = []
        self.is_shifted = True
        self.is_tokens_first = True
        self.is_quantized = False

    def add_stage(self, name: str, stage: nn.Sequential) -> None:
        """Append a network stage under the reference's attribute name."""
        setattr(self, name, stage)
        self.stage_names.append(name)

    @property
    def grid_stream(self) -> bool:
        """Whether the stream is (B, H, W, C) instead of (B, N, C)."""
        return self.stem.grid_stream

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> logits (B, classes)."""
        x = self.norm1(self.stem(x))
        for name in self.stage_names:
            x = getattr(self, name)(x)
        x = self.norm2(x)
        x = x.mean(dim=(1, 2)) if self.grid_stream else x.mean(dim=1)
        y: Tensor = self.head(x)
        return y

"""Modules over the token grid, and of them the depthwise convolution (the position encoding of the papers)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from spach_deploy.blocks.base import Call, grids_of, has_other_parameters


class GridNet(nn.Module):
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


class StaticPositionEncoding(GridNet):
    """Depthwise convolution over the grid.

    `includes_residual`: the residual addition is folded into the kernel (`fold_residual`). `is_quantized`: the kernel
    will be rounded to eight bits, so the residual must not be folded into it.
    """

    def __init__(self, net: nn.Sequential, grid: tuple[int, int], dim: int) -> None:
        super().__init__(net, grid, dim, grid[0] * grid[1], dim)
        self.includes_residual = False
        self.is_quantized = False


def static_forms(module: nn.Module, call: Call) -> Iterator[nn.Module]:
    """Depthwise convolutions over a grid that `module`, which takes tokens, may be."""
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    if len(convolutions) != 1 or not call.is_tokens or has_other_parameters(module, convolutions):
        return
    (conv,) = convolutions
    if conv.groups == conv.in_channels == conv.out_channels == call.input[2]:
        for grid in grids_of(call.input[1]):
            yield StaticPositionEncoding(nn.Sequential(nn.Identity(), conv, nn.Identity()), grid, call.input[2])

"""Modules over the token grid, and of them the depthwise convolution (the position encoding of the papers)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from spach_deploy.blocks.base import Change, GraphForm, Outcome, double, modules_of, probe, prove, set_parameter


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


def fold_residual(model: nn.Module, form: GraphForm) -> Outcome:
    """Fold the residual addition around a depthwise convolution into the centre weight of its kernel, in place.

        x + W * x   =>   W'[:, 0, 1, 1] = W[:, 0, 1, 1] + 1

    Quantized depthwise convolutions are skipped: the 1 would be rounded to eight bits with the kernel.
    """
    changes: list[Change] = []
    skipped: list[str] = []
    for path, encoding in modules_of(model, StaticPositionEncoding):
        assert isinstance(encoding, StaticPositionEncoding)
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

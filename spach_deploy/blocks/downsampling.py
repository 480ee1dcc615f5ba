"""The convolution between two stages, which halves the grid."""

from __future__ import annotations

from torch import nn

from spach_deploy.blocks.depthwise import GridNet


class StaticDownsampling(GridNet):
    """2x2 convolution of stride 2 and GroupNorm: a quarter of the tokens, twice the channels."""

    def __init__(self, net: nn.Sequential, grid: tuple[int, int], dim: int) -> None:
        super().__init__(net, grid, dim, grid[0] * grid[1] // 4, 2 * dim)

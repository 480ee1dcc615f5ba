"""The convolution between two stages, which halves the grid."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from spach_deploy.blocks.base import Call, grids_of, has_other_parameters
from spach_deploy.blocks.depthwise import GridNet


class StaticDownsampling(GridNet):
    """2x2 convolution of stride 2 and GroupNorm: half the grid, what is left over cut, and twice the channels."""

    def __init__(self, net: nn.Sequential, grid: tuple[int, int], dim: int) -> None:
        super().__init__(net, grid, dim, (grid[0] // 2) * (grid[1] // 2), 2 * dim)


def static_forms(module: nn.Module, call: Call) -> Iterator[nn.Module]:
    """Downsamplings that `module`, which takes tokens, may be."""
    parts = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.GroupNorm)]
    if [type(part) for part in parts] != [nn.Conv2d, nn.GroupNorm] or len(call.input) != 3 or len(call.output) != 3:
        return
    _, tokens, dim = call.input
    if has_other_parameters(module, parts) or call.output[2] != 2 * dim:
        return
    for grid in grids_of(tokens):
        if (grid[0] // 2) * (grid[1] // 2) == call.output[1]:
            net = nn.Sequential(nn.Identity(), nn.Sequential(*parts), nn.Identity())
            yield StaticDownsampling(net, grid, dim)

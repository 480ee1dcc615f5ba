"""The stem: from pixels to tokens, by one convolution of the patches or by three convolutions before it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spach_deploy.blocks.base import (
    Call,
    Change,
    GraphForm,
    Outcome,
    double,
    grids_of,
    has_other_parameters,
    modules_of,
    probe,
    prove,
)


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


def fold_batchnorm(model: nn.Module, form: GraphForm) -> Outcome:
    """Fold each BatchNorm of stems into weights and bias of the convolution before it, in place.

    bn(conv(x)) = s * (W x - mean) + beta, s = weight / sqrt(var + eps)   =>   W' = s W, b' = beta - s * mean
    """
    changes: list[Change] = []
    skipped: list[str] = []
    for path, stem in modules_of(model, StaticStem):
        assert isinstance(stem, StaticStem)
        if isinstance(stem.proj, nn.Sequential):
            stem.proj = _folded(f"{path}.proj", stem.proj, changes)
        else:
            skipped.append(f"{path}: one convolution without BatchNorm")
    return Outcome(tuple(changes), tuple(skipped))


def _folded(path: str, proj: nn.Sequential, changes: list[Change]) -> nn.Sequential:
    folded: list[nn.Module] = list(proj)
    for index, (conv, norm) in enumerate(itertools.pairwise(folded)):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            old_conv, old_norm = double(conv), double(norm).eval()
            old = nn.Sequential(old_conv, old_norm)
            new = fuse_conv_bn_eval(old_conv, old_norm)
            changes.append(prove("fold_batchnorm", f"{path}.{index}", old, new, probe(2, conv.in_channels, 16, 16)))
            folded[index], folded[index + 1] = new.float(), nn.Identity()
    return nn.Sequential(*folded)


def static_forms(module: nn.Module, call: Call) -> Iterator[nn.Module]:
    """Stems that `module`, which makes tokens of images, may be: its convolutions one after the other."""
    parts = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
    if len(call.input) != 4 or len(call.output) != 3 or not parts or has_other_parameters(module, parts):
        return
    proj = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    for grid in grids_of(call.output[1]):
        if grid[0] * call.input[3] == grid[1] * call.input[2]:
            yield StaticStem(proj, grid, call.output[2])

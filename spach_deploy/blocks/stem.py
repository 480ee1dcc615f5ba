"""The stem: from pixels to tokens, by one convolution of the patches or by three convolutions before it."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spach_deploy.blocks.base import Change, GraphForm, Outcome, double, modules_of, probe, prove


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
    """Fold each BatchNorm of a convolutional stem into weights and bias of the convolution before it, in place.

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

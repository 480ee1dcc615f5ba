"""Fold each BatchNorm of the convolutional stem into weights and bias of the convolution before it.

bn(conv(x)) = s * (W x - mean) + beta, s = weight / sqrt(var + eps)   =>   W' = s W, b' = beta - s * mean
"""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spach_deploy.rewrites.base import Change, Outcome, double, probe, prove
from spach_deploy.rewrites.static_modules import StaticSpach

NAME = "fold_batchnorm"


def fold_batchnorm(model: nn.Module) -> Outcome:
    """Fold every pair of Conv2d and BatchNorm2d in the stem, in place."""
    assert isinstance(model, StaticSpach)
    proj = model.stem.proj
    if not isinstance(proj, nn.Sequential):
        return Outcome(skipped=("stem: one convolution without BatchNorm",))
    folded: list[nn.Module] = list(proj)
    changes: list[Change] = []
    for index, (conv, norm) in enumerate(itertools.pairwise(folded)):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            old_conv, old_norm = double(conv), double(norm).eval()
            old = nn.Sequential(old_conv, old_norm)
            new = fuse_conv_bn_eval(old_conv, old_norm)
            changes.append(prove(NAME, f"stem.proj.{index}", old, new, probe(2, conv.in_channels, 16, 16)))
            folded[index], folded[index + 1] = new.float(), nn.Identity()
    model.stem.proj = nn.Sequential(*folded)
    return Outcome(tuple(changes))

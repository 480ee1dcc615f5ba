"""The SPACH family: one Transformer-like frame, blocks that mix by convolution, attention or MLP.

Source: Zhao et al., arXiv 2108.13002. A single-stage model has one stack, `blocks`; a multi-stage one has
`layer1` to `layer4`, of which the later three begin with a downsampling.
"""

from __future__ import annotations

from torch import Tensor, nn

from spach_deploy.errors import ModelError
from spach_deploy.models.configs import CONV, MLP, TRANS, SpachConfig
from spach_deploy.models.layers import (
    Attention,
    ConvStem,
    Downsampling,
    MixingBlock,
    PatchStem,
    SpatialMLP,
)

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
    """Published initialisation: truncated normals, zero biases, zero head (so a fresh model answers zero)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name == "head":
                nn.init.zeros_(module.weight)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

"""Configuration of every published SPACH model: widths, stages, mixers, heads.

Source: Zhao et al., arXiv 2108.13002, and the keys of its published checkpoints. This module imports no torch, so that
`--list` and errors about names and image sizes are instant.
"""

from __future__ import annotations

import dataclasses

from spach_deploy.common.errors import ModelError

CONV, TRANS, MLP = "conv", "trans", "mlp"
STEM_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class SpachConfig:
    """Architecture of one model. `stages`: for each network stage, how each of its blocks mixes tokens.

    `qk_scale` None: head size ** -0.5. `activation`: one of `specs.ACTIVATIONS`.
    """

    dim: int
    patch_size: int
    mlp_ratio: int
    stages: tuple[tuple[str, ...], ...]
    num_heads: int = 0
    conv_stem: bool = False
    shared_spatial: bool = False
    qk_scale: float | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-6

    @property
    def attention_dims(self) -> list[int]:
        """Channels of each stage that has attention."""
        return [dim for dim, mixers in zip(self.stage_dims, self.stages, strict=True) if TRANS in mixers]

    @property
    def multi_stage(self) -> bool:
        """Whether the model has several stages, each with half the resolution of the one before."""
        return len(self.stages) > 1

    @property
    def stage_names(self) -> list[str]:
        """Attribute names of the stages, in order."""
        return [f"layer{i + 1}" for i in range(len(self.stages))] if self.multi_stage else ["blocks"]

    @property
    def stage_dims(self) -> list[int]:
        """Channels of each stage."""
        return [self.dim << stage for stage in range(len(self.stages))]

    @property
    def image_size_step(self) -> int:
        """Image sizes are multiples of this, in pixels."""
        return self.patch_size << (len(self.stages) - 1)

    @property
    def smallest_image_size(self) -> int:
        """In pixels. The last grid is at least 2 x 2, because one token cannot be mixed (a spatial
        MLP would halve it).
        """
        return 2 * self.image_size_step

    def grids(self, image_size: int) -> list[int]:
        """Side of each stage's token grid for square images of `image_size` pixels."""
        self.check_image_size(image_size)
        side = image_size // self.patch_size
        return [side >> stage for stage in range(len(self.stages))]

    def check_image_size(self, image_size: int) -> None:
        """ModelError for an image size (pixels) that patches and strides do not divide, or with too few tokens."""
        step, smallest = self.image_size_step, self.smallest_image_size
        if image_size % step:
            below = image_size // step * step
            nearest = f"{below} or {below + step}" if below >= smallest else f"{smallest}"
            raise ModelError(
                f"Image size {image_size} is not a multiple of {step}, which patches and strides need.",
                f"Take {nearest}.",
            )
        if image_size < smallest:
            raise ModelError(
                f"Image size {image_size} is too small: mixing needs a grid of 2 by 2 tokens in the last stage.",
                f"Take {smallest} or more.",
            )


def _single(mixer: str, dim: int, depth: int, ratio: int, heads: int = 0, shared: bool = False) -> SpachConfig:
    return SpachConfig(dim, 16, ratio, ((mixer,) * depth,), num_heads=heads, shared_spatial=shared)


def _multi(
    mixer: str, dim: int, ratio: int, depths: tuple[int, ...], heads: int = 0, shared: bool = False
) -> SpachConfig:
    """Convolution blocks in the first stage, `mixer` in the others."""
    stages = ((CONV,) * depths[0], *((mixer,) * depth for depth in depths[1:]))
    return SpachConfig(dim, 4, ratio, stages, num_heads=heads, shared_spatial=shared)


_XXS, _XS = (2, 2, 6, 2), (3, 4, 12, 3)
_HYBRID_XS = ((CONV,) * 3, (CONV,) * 4, (CONV,) * 2 + (TRANS,) * 10, (CONV,) + (TRANS,) * 2)
_HYBRID_S = ((CONV,) * 3, (CONV,) * 2 + (TRANS,) * 2, (CONV,) * 2 + (TRANS,) * 10, (CONV,) + (TRANS,) * 2)

CONFIGS: dict[str, SpachConfig] = {
    "conv_xxs": _single(CONV, 384, 12, 2),
    "conv_xs": _single(CONV, 384, 24, 2),
    "conv_s": _single(CONV, 512, 24, 3),
    "trans_xxs": _single(TRANS, 192, 12, 2, heads=6),
    "trans_xs": _single(TRANS, 384, 12, 2, heads=12),
    "trans_s": _single(TRANS, 512, 12, 3, heads=16),
    "mlp_xxs": _single(MLP, 384, 12, 2),
    "mlp_xs": _single(MLP, 384, 24, 2),
    "mlp_s": _single(MLP, 512, 24, 3),
    "mlp_s_shared": _single(MLP, 512, 24, 3, shared=True),
    "ms_conv_xxs": _multi(CONV, 64, 2, _XXS),
    "ms_conv_xs": _multi(CONV, 96, 2, _XS),
    "ms_conv_s": _multi(CONV, 128, 3, _XS),
    # One head, though a written summary of the published models says two: shapes cannot show it, but the
    # published implementation's logits are reproduced to 2.4e-7 (relative L2) with one head and missed by
    # 0.04 with two.
    "ms_trans_xxs": _multi(TRANS, 32, 2, _XXS, heads=1),
    "ms_trans_xs": _multi(TRANS, 64, 2, _XS, heads=2),
    "ms_trans_s": _multi(TRANS, 96, 3, _XS, heads=3),
    "ms_mlp_xxs": _multi(MLP, 64, 2, _XXS),
    "ms_mlp_xs": _multi(MLP, 96, 2, _XS),
    "ms_mlp_s": _multi(MLP, 128, 3, _XS),
    "ms_mlp_s_shared": _multi(MLP, 128, 3, _XS, shared=True),
    "ms_hybrid_xs": SpachConfig(96, 4, 2, _HYBRID_XS, num_heads=3),
    "ms_hybrid_xs+": SpachConfig(96, 4, 2, _HYBRID_XS, num_heads=3, conv_stem=True),
    "ms_hybrid_s": SpachConfig(128, 4, 3, _HYBRID_S, num_heads=4),
    "ms_hybrid_s+": SpachConfig(128, 4, 3, _HYBRID_S, num_heads=4, conv_stem=True),
}

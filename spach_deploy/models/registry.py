"""Names of the SPACH models and what they are: the table that `spach-export --list` prints."""

from __future__ import annotations

import difflib

from spach_deploy.errors import ModelError
from spach_deploy.models.spach import CONV, MLP, TRANS, Spach, SpachConfig


def _single(mixer: str, dim: int, depth: int, ratio: int, heads: int = 0, shared: bool = False) -> SpachConfig:
    return SpachConfig(dim, 16, ratio, ((mixer,) * depth,), num_heads=heads, shared_spatial=shared)


def _multi(mixer: str, dim: int, ratio: int, depths: tuple[int, ...], heads: int = 0, shared: bool = False) -> SpachConfig:
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


def resolve(name: str) -> str:
    """Our name for `name`, which may be an alias; ModelError with the nearest names otherwise."""
    if name in CONFIGS:
        return name
    near = difflib.get_close_matches(name, CONFIGS, n=3)
    raise ModelError(f"There is no model {name!r}.", f"Near it: {', '.join(near)}." if near else "See --list.")


def create_model(name: str, *, image_size: int = 224, num_classes: int = 1000) -> Spach:
    """A freshly initialised model in evaluation mode, float32 on the CPU."""
    return Spach(CONFIGS[resolve(name)], image_size=image_size, num_classes=num_classes).eval()

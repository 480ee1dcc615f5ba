"""Parsing GPU names to compute capabilities: `sm89`, `8.9`, `rtx4090`, `NVIDIA A100-SXM4-80GB`.

Source: NVIDIA, "CUDA GPU Compute Capability" and the support matrices of TensorRT 10, 11 and TensorRT for RTX.
"""

from __future__ import annotations

import difflib
import re

from spach_deploy.common.errors import UsageError
from spach_deploy.options.specs import ComputeCapability

_CARDS_BY_CAPABILITY: dict[tuple[int, int], str] = {
    (7, 5): "t4 rtx2060 rtx2070 rtx2080 titanrtx quadrortx4000 quadrortx5000 quadrortx6000 quadrortx8000",
    (8, 0): "a100 a30 a800",
    (8, 6): "a2 a10 a10g a10m a16 a40 rtx2050 rtx3050 rtx3060 rtx3070 rtx3080 rtx3090 "
    "rtxa2000 rtxa4000 rtxa4500 rtxa5000 rtxa5500 rtxa6000",
    (8, 7): "orin agxorin orinnx orinnano",
    (8, 9): "l4 l20 l40 l40s rtx4050 rtx4060 rtx4070 rtx4080 rtx4090 "
    "rtx2000ada rtx4000ada rtx4500ada rtx5000ada rtx5880ada rtx6000ada",
    (9, 0): "h100 h200 h20 h800 gh200",
    (10, 0): "b100 b200 gb200",
    (10, 3): "b300 gb300",
    (11, 0): "thor agxthor",
    (12, 0): "rtx5050 rtx5060 rtx5070 rtx5080 rtx5090 rtxpro2000 rtxpro4000 rtxpro4500 rtxpro5000 rtxpro6000",
    (12, 1): "gb10 dgxspark",
}

CARDS: dict[str, ComputeCapability] = {
    name: ComputeCapability(*capability) for capability, names in _CARDS_BY_CAPABILITY.items() for name in names.split()
}
"""Card names in lower case without spaces and dashes, with their compute capability."""

SUPPORTED: tuple[ComputeCapability, ...] = tuple(sorted({*CARDS.values()}))
"""Capabilities for which at least one flavour of TensorRT compiles."""

_DECORATION = re.compile(
    r"nvidia|geforce|tesla|jetson|gpu|laptop|mobile|generation|blackwell|server|workstation|edition|ti|super|"
    r"sxm\d*|pcie|nvl|hbm\d\w?|\d+gb"
)
_SUFFIX = re.compile(r"(ti|super)+$")
_CAPABILITY = re.compile(r"(?:sm|compute)?(\d{1,2})\.?(\d)[af]?")


def parse_gpus(text: str) -> tuple[ComputeCapability, ...]:
    """The compute capabilities that `text` names, sorted, each once.

    `text` is a list with commas of capabilities (`sm89`, `8.9`) and card names (`rtx4090`, `RTX A6000`, `l4`), in any
    case, with or without spaces, dashes and underscores. UsageError for anything else, with the nearest names.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError("--gpu names no GPU.", "Give --gpu sm86,sm89 or card names such as rtx4090.")
    return tuple(sorted({_parse_one(part) for part in parts}))


def _parse_one(part: str) -> ComputeCapability:
    words = re.split(r"[\s_-]+", part.lower())
    if match := _CAPABILITY.fullmatch("".join(words)):
        return _supported(ComputeCapability(int(match[1]), int(match[2])), part)
    card = "".join(word for word in words if not _DECORATION.fullmatch(word))
    for name in (card, _SUFFIX.sub("", card)):
        if name in CARDS:
            return CARDS[name]
    raise UsageError(f"--gpu {part!r} is no GPU known here.", _nearest(card))


def _supported(capability: ComputeCapability, part: str) -> ComputeCapability:
    if capability in SUPPORTED:
        return capability
    raise UsageError(
        f"--gpu {part}: {capability} is not a compute capability that TensorRT supports.",
        f"Take one of {format_gpus(SUPPORTED)}.",
    )


def _nearest(card: str) -> str:
    near = difflib.get_close_matches(card, CARDS, n=3, cutoff=0.5)
    advice = "Or give its compute capability, such as sm89."
    return f"Near it: {', '.join(near)}. {advice}" if near else "Give its compute capability, such as sm89."


def format_gpus(gpus: tuple[ComputeCapability, ...]) -> str:
    """Capabilities as a list in a message: `sm80, sm86`."""
    return ", ".join(str(gpu) for gpu in gpus)

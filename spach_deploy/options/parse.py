"""Sizes and colour channels as users write them. GPUs are in `gpus`, batches in `specs`."""

from __future__ import annotations

from spach_deploy.common.errors import UsageError
from spach_deploy.common.units import parse_bytes
from spach_deploy.options.specs import Channels

_LARGEST_WORKSPACE = 1 << 50


def parse_size(text: str) -> int:
    """Bytes, as `spach_deploy.common.units` reads them."""
    try:
        size = parse_bytes(text)
    except ValueError:
        size = 0
    if not 0 < size <= _LARGEST_WORKSPACE:
        raise UsageError(f"--workspace {text!r} is not a size.", "Give 512M, 2G or a number of bytes.")
    return size


def parse_channels(flag: str, text: str) -> Channels:
    """`0.5,0.5,0.5`, or one number for all three; `flag` is named in the error."""
    try:
        values = [float(part) for part in text.split(",")]
        red, green, blue = values * 3 if len(values) == 1 else values
    except ValueError:
        raise UsageError(f"{flag} {text!r} is not three numbers.", f"Give {flag} 0.485,0.456,0.406.") from None
    return red, green, blue

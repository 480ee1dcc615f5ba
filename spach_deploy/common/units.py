"""Sizes in bytes as users write them.

`G` and `GiB` are 2^30 bytes, as in trtexec, Polygraphy and Docker. `GB` is 10^9 bytes, the unit in which this package
prints sizes. K, M and T follow the same rule.
"""

from __future__ import annotations

import re

SIZES = "K, M, G, T or KiB, MiB, … of 1024; KB, MB, … of 1000"
"""The accepted units, for help texts and error hints."""

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*(?:([KMGT])(B|iB?)?|B)?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of `512M`, `2 GiB`, `1.5GB` or a plain number. ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size")
    number, prefix, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    return int(float(number) * base**power) if "." in number else int(number) * base**power

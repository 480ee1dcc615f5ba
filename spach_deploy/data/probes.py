"""Photographs that the package carries, for when a user gives none.

Eight public-domain or CC0 pictures; `probes/README.md` names source and licence of each. Enough to compare
two forms of one model, not to measure accuracy; reports say when they were used.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources

from PIL import Image

from spach_deploy.data.source import Entry, ImageSource, decode
from spach_deploy.errors import ImageError


def probe_source() -> ImageSource:
    """The built-in photographs, sorted by name, without labels. Raises ImageError when they are missing."""
    folder = resources.files("spach_deploy.data") / "probes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".jpg")), key=lambda f: f.name)
    if not files:
        raise ImageError("The built-in photographs are missing from this installation.", "Reinstall spach-deploy.")
    entries = [Entry(file.name, partial(_load, file.read_bytes)) for file in files]

    def choose(_: int | None) -> Iterator[Entry]:
        return iter(entries)

    return ImageSource(f"the {len(entries)} built-in photographs", choose, count=len(entries))


def _load(read: Callable[[], bytes]) -> Image.Image:
    return decode(io.BytesIO(read()))

"""Paths for libraries in C++ and Rust, which know UTF-8 names alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """The file's path, which leads through a descriptor that is open in the block where the path is not UTF-8.

    What lies beside the file is found beside it, unless its very name is not UTF-8. OSError where it cannot be opened.
    """
    if _is_utf8(str(path)):
        yield str(path)
        return
    is_named = _is_utf8(path.name)
    descriptor = os.open(path.parent if is_named else path, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}{f'/{path.name}' if is_named else ''}"
    finally:
        os.close(descriptor)


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

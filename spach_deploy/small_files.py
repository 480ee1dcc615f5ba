"""Small text files: recipes and names of classes that users write, and JSON that decides what is trusted."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from spach_deploy.errors import UsageError

MOST_BYTES = 64 << 20
"""Of a file that is read whole: far more than a person writes, or any record of one model has."""

_ALWAYS_OPEN = ("/dev/", "/proc/")
"""Where the shell puts a pipe whose other end it has opened: `--labels <(command)`."""


def read_text(path: Path, what: str, wanted: str) -> str:
    """The text of a file that `what` names in an error, and `wanted` tells how to give.

    UsageError for one that cannot be read, is large, is not UTF-8, or is a named pipe, at which a command would wait.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{what} cannot be read ({error.strerror}).", wanted) from None
    except UnicodeDecodeError:
        raise UsageError(f"{what} cannot be read (it is not UTF-8).", wanted) from None


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """The content of a JSON file. OSError for one that cannot be read or is larger, ValueError for what is no JSON."""
    return parse_json(read_bytes(path, most_bytes).decode("utf-8-sig"))


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """All of a file. OSError for one that cannot be read, is larger, or is a named pipe."""
    if path.is_fifo() and not str(path).startswith(_ALWAYS_OPEN):
        raise OSError(errno.EINVAL, "it is a pipe", str(path))
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
    return content


def check_regular(path: Path) -> None:
    """OSError for what is missing, and for a pipe or a device, which would be read for ever."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def parse_json(text: str) -> Any:
    """JSON in which every object has each name once: of two values, readers take one or the other.

    ValueError, in a few words, for anything else.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} is in it twice")
    return found

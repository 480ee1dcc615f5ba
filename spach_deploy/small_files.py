"""Small text files that users write: recipes, names of classes."""

from __future__ import annotations

from pathlib import Path

from spach_deploy.errors import UsageError

_ALWAYS_OPEN = ("/dev/", "/proc/")
"""Where the shell puts a pipe whose other end it has opened: `--labels <(command)`."""


def read_text(path: Path, what: str, wanted: str) -> str:
    """The text of a file that `what` names in an error, and `wanted` tells how to give.

    UsageError for one that cannot be read, is not UTF-8, or is a named pipe, at which a command would wait.
    """
    try:
        if path.is_fifo() and not str(path).startswith(_ALWAYS_OPEN):
            raise UsageError(f"{what} cannot be read (it is a pipe).", wanted)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{what} cannot be read ({error.strerror}).", wanted) from None
    except UnicodeDecodeError:
        raise UsageError(f"{what} cannot be read (it is not UTF-8).", wanted) from None

"""stdout and stderr of a command, which may be closed, full, piped into something that ended, or of few characters."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any, TextIO

NARROWEST, WIDEST = 60, 100
"""Columns that text is broken at, on a terminal."""


_PLAIN = "spach_deploy.plain"
_SIGNS = {"─": "-", "–": "-", "…": "...", "×": "x"}


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Instead of characters that a stream's encoding lacks: lines and dashes of tables in ASCII, others escaped."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_SIGNS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


codecs.register_error(_PLAIN, _plain)


@contextlib.contextmanager
def outputs_that_may_fail() -> Iterator[None]:
    """A command goes on and ends with the same exit code though nobody can read it.

    For stdout one sentence on stderr says so. A character that the stream's encoding lacks is escaped.
    """
    _open_closed_ones()
    with _replaced("stderr", 2, ""), _replaced("stdout", 1, "Warning: standard output cannot be written ({}).\n"):
        yield


def _open_closed_ones() -> None:
    """A file that is opened later must not become stdout because that number is free; children inherit it too."""
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # the lowest free number; writing to stdout still fails


@contextlib.contextmanager
def _replaced(name: str, number: int, complaint: str) -> Iterator[None]:
    """Another stream on the same descriptor; nothing where a caller has put one of its own there."""
    before: TextIO | None = getattr(sys, name)
    if before is not getattr(sys, f"__{name}__"):
        yield
        return
    if before is not None:
        before.flush()
    binary = io.BufferedWriter(_Descriptor(number, complaint))
    encoding = "utf-8" if before is None else before.encoding
    stream = io.TextIOWrapper(binary, encoding, errors=_PLAIN, line_buffering=number == 2 or binary.isatty())
    setattr(sys, name, stream)
    try:
        yield
    finally:
        stream.flush()
        setattr(sys, name, before or stream)


class _Descriptor(io.FileIO):
    """Drops what cannot be written; the first time it says so."""

    def __init__(self, number: int, complaint: str) -> None:
        super().__init__(number, "w", closefd=False)
        self._complaint = complaint

    def write(self, data: Any, /) -> int:
        """As a file does; all of it where it fails."""
        try:
            return super().write(data)
        except OSError as error:
            complaint, self._complaint = self._complaint, ""
            if complaint:
                sys.stderr.write(complaint.format(error.strerror))
            return memoryview(data).nbytes


def is_colored() -> bool:
    """Whether stdout gets colours: a terminal that has them, or anything with FORCE_COLOR; nothing with NO_COLOR."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def width(usual: int) -> int:
    """Columns to break text at: the terminal's or COLUMNS, within reason; `usual` where stdout is no terminal."""
    columns = shutil.get_terminal_size((usual, 24)).columns if sys.stdout.isatty() else usual
    return min(max(columns, NARROWEST), WIDEST)

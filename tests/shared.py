"""What takes long to make and tests only read: made once per run, by whichever of its processes wants it first."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

VARIABLE = "SPACH_TESTS_SHARED"
"""The folder of a run, which its first process makes and removes (conftest.py)."""


@functools.cache
def _own() -> tempfile.TemporaryDirectory[str]:
    """Outside a run of pytest: a script that uses what tests use."""
    return tempfile.TemporaryDirectory(prefix="spach-tests-")


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder that `make` writes to the path it is given; not to be changed."""
    target = Path(os.environ.get(VARIABLE) or _own().name) / name
    finished = target.with_name(f"{target.name}.finished")
    with alone(target):
        if not finished.exists():
            if target.is_dir():  # of somebody who was killed, or failed
                shutil.rmtree(target)
            make(target)
            finished.touch()
    return target


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time, so that of several that want the same thing one makes it and the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file closes, also by a killed process
        yield

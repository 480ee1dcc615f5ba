"""Cores of a machine, shared out among processes that do not know of each other."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def cores(count: int) -> Iterator[frozenset[int]]:
    """`count` cores that no other block on this machine holds; all where there are too few free ones.

    A lock on a file stands for each core: the kernel gives it back when a process ends, however it does.
    """
    folder = Path(tempfile.gettempdir()) / f"spach-deploy-cores-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    known = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        held: list[int] = []
        for core in known:
            if len(held) < count and _taken(folder / str(core), stack):
                held.append(core)
        yield frozenset(held) if len(held) == count else frozenset(known)


def _taken(file: Path, stack: contextlib.ExitStack) -> bool:
    stream = stack.enter_context(file.open("w"))
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

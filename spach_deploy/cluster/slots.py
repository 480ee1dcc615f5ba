"""Cores of a machine, shared out among processes that do not know of each other."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from spach_deploy.files import lock_file, private_folder


@contextlib.contextmanager
def cores(count: int) -> Iterator[frozenset[int]]:
    """`count` cores that no other block on this machine holds; all where there are too few free ones.

    A lock on a file stands for each core: the kernel gives it back when a process ends, however it does. They lie in a
    directory of this user; where somebody else has made it, all cores are given.
    """
    known = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        held: list[int] = []
        with contextlib.suppress(OSError):
            folder = private_folder(Path(tempfile.gettempdir()) / f"spach-deploy-cores-{os.getuid()}")
            for core in known:
                if len(held) < count and _taken(folder / str(core), stack):
                    held.append(core)
        yield frozenset(held) if len(held) == count else frozenset(known)


def _taken(file: Path, stack: contextlib.ExitStack) -> bool:
    try:
        fcntl.flock(stack.enter_context(lock_file(file)), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

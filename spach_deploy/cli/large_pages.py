"""Large pages for what a command allocates.

An export allocates and frees gigabytes, and the kernel takes every page of 4 KB that is touched by itself: with pages
of 2 MB an export takes less time on some machines and about the same on others (run it with and without
`GLIBC_TUNABLES=`). glibc can ask for them, but reads that wish only when a process starts, so a command that computes
starts itself once more, in the same process, before it has done anything.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from spach_deploy.cli.quiet import module_run
from spach_deploy.runtime.pages import LARGE, VARIABLE

_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FIRST = (2, 35)
"""glibc that knows the wish."""


def start_again_with_large_pages() -> None:
    """Replace this process by itself with `GLIBC_TUNABLES` set. Returns where that is of no use or was done.

    Whoever sets `GLIBC_TUNABLES` keeps it as it is; `GLIBC_TUNABLES=` turns this off.
    """
    if VARIABLE in os.environ or not (is_the_whole_process() and glibc_knows() and kernel_waits_to_be_asked()):
        return
    environment = {**os.environ, VARIABLE: LARGE}
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def is_the_whole_process() -> bool:
    """Whether the command's words are those that this process was started with: a caller may have put others there."""
    count, started = len(sys.argv), sys.orig_argv
    if sys.argv[0] == "-c":
        return started[1:2] == ["-c"] and started[3:] == sys.argv[1:]
    if module_run():
        return started[len(started) - count + 1 :] == sys.argv[1:]
    return started[-count:] == sys.argv


def glibc_knows() -> bool:
    """Whether this C library is a glibc that can ask."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        major, minor = (int(part) for part in version.split(".")[:2])
    except (AttributeError, OSError, ValueError):
        return False
    return name == "glibc" and (major, minor) >= _FIRST


def kernel_waits_to_be_asked() -> bool:
    """Whether large pages are for those who ask: not given to all anyway, and not turned off."""
    try:
        return "[madvise]" in _KERNEL.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False

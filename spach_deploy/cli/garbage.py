"""Fewer searches for garbage in a command that is a process of its own, and none at its end.

Loading PyTorch and tracing a model make millions of objects that stay. Python looks through all of them for unreachable
cycles again and again, and takes them apart one by one when it ends. What only cycles hold is small, behind the
exporter too.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Iterator

from spach_deploy.cli.large_pages import is_the_whole_process
from spach_deploy.cli.quiet import is_our_script

THRESHOLDS = (50_000, 20, 100)
"""New objects between two searches among the youngest, and how many of those before older ones are searched too."""


@contextlib.contextmanager
def seldom_searched() -> Iterator[None]:
    """The whole of a command, which ends with SystemExit: behind it, and behind what is to be done at exit, the system
    takes back everything at once. Nothing changes where the command is a part of another program, and only our own
    scripts end so: what others register to be done at exit before a command begins would be left undone.
    """
    if not is_the_whole_process():
        yield
        return
    gc.set_threshold(*THRESHOLDS)
    if not is_our_script():
        yield
        return
    end = _End()
    atexit.register(end)  # the first that is registered is the last that is called
    try:
        yield
    except SystemExit as reason:
        end.code = reason.code if isinstance(reason.code, int) else int(reason.code is not None)
        raise


@contextlib.contextmanager
def not_searched_while_loading() -> Iterator[None]:
    """No search while modules are loaded; what they make is never looked at again. Nothing changes where the command is
    a part of another program.
    """
    if not is_the_whole_process():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _End:
    code: int | None = None

    def __call__(self) -> None:
        if self.code is None:
            return  # an end that nobody foresaw is Python's affair
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            return
        os._exit(self.code)

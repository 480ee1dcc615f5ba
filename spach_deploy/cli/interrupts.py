"""Ctrl-C ends a command, wherever it strikes.

Python raises KeyboardInterrupt at whatever the main thread happens to do. In a callback of the import system or of the
garbage collector it is swallowed, and the import lock may stay locked, so that other threads wait for ever; in a class
body it becomes a RuntimeError. All three were seen while torch was loading. So the signal is remembered: what ends the
block after it counts as the interruption, and what does not end in time is ended.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from spach_deploy.cli.quiet import INTERRUPTED
from spach_deploy.common.errors import printable

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

NOTHING = "Nothing was written."
_SHOW_CURSOR = "\x1b[?25h"
GRACE_S = 5.0
"""Seconds to stop a build and remove what was begun; counted from when the main thread is back in Python."""


def sentence(kept: str) -> str:
    """What the command says at its end."""
    return f"Interrupted. {kept}"


@contextlib.contextmanager
def ending_on_interrupt(kept: Callable[[], str], *, grace_s: float = GRACE_S) -> Iterator[None]:
    """Raise KeyboardInterrupt(kept()) at the end of the block if Ctrl-C was pressed in it, however the block ended.

    `kept` says what is there now. If the process lives `grace_s` longer, or at a second Ctrl-C, it exits with 130.
    Does nothing where Ctrl-C is ignored (a shell's background job) or in another thread than the main one.
    """
    previous = signal.getsignal(signal.SIGINT)
    if previous in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt = _Interrupt(kept, grace_s)
    atexit.unregister(_leave_before_the_alarm)
    atexit.register(_leave_before_the_alarm)  # before the heavy imports, so that it runs after what they register
    hook = sys.unraisablehook
    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = _without_interrupts(hook)
    try:
        yield
    except BaseException:
        if not interrupt.happened:
            raise
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, previous)
    if interrupt.happened:
        interrupt.told = True  # by whoever catches this
        raise KeyboardInterrupt(kept())


class _Interrupt:
    """A handler of SIGINT that remembers."""

    def __init__(self, kept: Callable[[], str], grace_s: float) -> None:
        self.happened = False
        self.told = False
        self._kept = kept
        self._grace_s = grace_s

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        if self.happened:
            self._end_now()
        self.happened = True
        signal.signal(signal.SIGALRM, self._end_now)
        signal.setitimer(signal.ITIMER_REAL, self._grace_s)
        raise KeyboardInterrupt

    def _end_now(self, *_: Any) -> NoReturn:
        """Without unwinding: what is left of this export is removed by the next one."""
        if not self.told:
            cursor = _SHOW_CURSOR if os.isatty(2) else ""
            with contextlib.suppress(OSError):  # nobody reads it
                os.write(2, f"{cursor}{printable(sentence(self._kept()))}\n".encode())
        os._exit(INTERRUPTED)


def _leave_before_the_alarm() -> None:
    """Python's own end forgets handlers first and may take long: the alarm would kill it, with another exit code."""
    if signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(INTERRUPTED)


def _without_interrupts(hook: Callable[[UnraisableHookArgs], Any]) -> Callable[[UnraisableHookArgs], Any]:
    def report(unraisable: UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)

    return report

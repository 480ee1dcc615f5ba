"""Handling of Ctrl-C: a command ends with exit code 130 and one sentence, whatever it is doing.

Python raises KeyboardInterrupt wherever the main thread happens to be. In a callback of the import system or of the
garbage collector it is swallowed, and the import lock may stay locked, so that other threads wait for ever; in a class
body it becomes a RuntimeError. All three were seen while torch was loading. So `ending_on_interrupt` records the
signal: however its block ends afterwards, it raises KeyboardInterrupt, and a block that does not end in time is killed.

Until `install_early_interrupt_handler` has run, Ctrl-C shows a traceback. So this module imports only what Python has
loaded already.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path
    from sys import UnraisableHookArgs
    from types import FrameType, TracebackType
    from typing import Any, NoReturn

INTERRUPTED = 130
"""Exit code."""

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGBREAK") if hasattr(signal, name)]
"""Ctrl-C, and on Windows Ctrl-Break, by which one process interrupts another there."""

NOTHING = "Nothing was written."
_SHOW_CURSOR = "\x1b[?25h"
GRACE_S = 5.0
"""Seconds to stop a build and clean up, counted from the moment at which the main thread runs Python code again."""


def install_early_interrupt_handler() -> None:
    """In a command of this package, end without a traceback on Ctrl-C before and after the command's own handling."""
    if is_our_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        for number in _SIGNALS:
            signal.signal(number, lambda *_: _exit_now("Interrupted.\n"))


def is_our_script() -> bool:
    """Whether this process is a command that pip installed, or `python -m` with a command's module."""
    words = sys.orig_argv
    is_module = len(words) > len(sys.argv) and words[-len(sys.argv) - 1] == "-m"
    module = words[-len(sys.argv)] if is_module else ""
    return os.path.basename(sys.argv[0]).startswith("spach-") or module.startswith("spach_deploy.cli.")


def sentence(kept: str) -> str:
    """The message of an interrupted command."""
    return f"Interrupted. {kept}"


def what_is_kept(target: Path | None) -> Callable[[], str]:
    """A function that says, when called, whether the bundle `target` is the one of now, a new one, or absent.

    Bundles are moved into place in one step, so a directory with another inode is a complete new bundle.
    """
    before = _inode(target)

    def kept() -> str:
        now = _inode(target)
        if now != before:
            return f"The new bundle was written before that: {target} is complete."
        return NOTHING if now is None else f"Nothing was written; {target} is as it was."

    return kept


def _inode(path: Path | None) -> int | None:
    try:
        return None if path is None else path.stat().st_ino
    except OSError:
        return None


def ending_on_interrupt(kept: Callable[[], str], *, grace_s: float = GRACE_S) -> AbstractContextManager[None]:
    """Raise KeyboardInterrupt(kept()) at the end of the block if Ctrl-C was pressed in it, however the block ended.

    `kept` returns a sentence on what is on disk. After `grace_s` seconds, or at a second Ctrl-C, the process exits with
    130. Does nothing where Ctrl-C is ignored (a shell's background job), or outside the main thread.
    """
    return _Block(_Interrupt(kept, grace_s))


class _Block:
    def __init__(self, interrupt: _Interrupt) -> None:
        self._interrupt = interrupt
        self._previous: dict[int, Any] = {}
        self._hook: Any = None
        self._is_inactive = False

    def __enter__(self) -> None:
        import atexit
        import threading

        self._is_inactive = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
        self._is_inactive |= threading.current_thread() is not threading.main_thread()
        if self._is_inactive:
            return
        atexit.unregister(_leave_before_the_alarm)
        atexit.register(_leave_before_the_alarm)  # before the heavy imports, so that it runs after what they register
        self._hook = sys.unraisablehook
        self._unwatch = self._interrupt.watch()
        self._previous = {number: signal.signal(number, self._interrupt) for number in _SIGNALS}
        sys.unraisablehook = _without_interrupts(self._hook)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_inactive:
            return
        sys.unraisablehook = self._hook
        self._unwatch()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._interrupt.happened:
            self._interrupt.is_reported = True  # by the code that catches this
            raise KeyboardInterrupt(self._interrupt.kept()) from None


class _Interrupt:
    """A handler of Ctrl-C that records the signal, starts the time limit and raises KeyboardInterrupt."""

    def __init__(self, kept: Callable[[], str], grace_s: float) -> None:
        from spach_deploy.common import operating_system
        from spach_deploy.common.errors import printable

        self.happened = False
        self.is_reported = False
        self.kept = kept
        self._printable = printable
        self._system = operating_system  # nothing is imported in a signal's handler
        self._grace_s = grace_s

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        if self.happened:
            self._end_now()
        self.happened = True
        self._start_limit()
        raise KeyboardInterrupt

    def watch(self) -> Callable[[], None]:
        """Start the time limit also where the main thread is not woken; returns a function that ends that."""
        return self._system.watch_interrupts(self._start_limit)

    def _start_limit(self) -> None:
        if not self._system.alarm_is_set():
            self._system.set_alarm(self._grace_s, self._end_now)

    def _end_now(self, *_: Any) -> NoReturn:
        """Exit without unwinding. The next export removes what this one leaves."""
        cursor = _SHOW_CURSOR if os.isatty(2) else ""
        _exit_now("" if self.is_reported else f"{cursor}{self._printable(sentence(self.kept()))}\n")


def _exit_now(text: str) -> NoReturn:
    try:  # noqa: SIM105  (contextlib would have to be imported)
        os.write(2, text.encode())
    except OSError:  # stderr is closed
        pass
    os._exit(INTERRUPTED)


def _leave_before_the_alarm() -> None:
    """At exit, leave at once if the time limit runs: Python's shutdown removes handlers, so SIGALRM would kill it."""
    from spach_deploy.common.operating_system import alarm_is_set

    if alarm_is_set():
        for stream in (sys.stdout, sys.stderr):
            try:  # noqa: SIM105
                stream.flush()
            except (OSError, ValueError):
                pass
        os._exit(INTERRUPTED)


def _without_interrupts(hook: Callable[[UnraisableHookArgs], Any]) -> Callable[[UnraisableHookArgs], Any]:
    def report(unraisable: UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)

    return report

"""Work beside this process's own: in a copy of it that shares its memory, on one thread.

Tracing a model keeps one core busy, and threads would not help: Python runs one at a time, and torch.export changes
every module's class while it traces. A copy (fork) has the model without loading it again. It may only compute with
NumPy and PyTorch, on one thread: of the threads that this process has, a copy has none. So it never takes apart what it
has from this process, either: the end of an ONNX Runtime session, for one, waits for that session's threads. And a copy
that hangs all the same, on whatever lock a thread held when it was made, is given up.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from spach_deploy.common.errors import SpachError
from spach_deploy.common.processes import end_with
from spach_deploy.common.threads import available_threads, torch_threads

if TYPE_CHECKING:
    from typing_extensions import Self

Result = TypeVar("Result")

LOOK_S = 1.0
PATIENCE_S = 30.0
"""How often to look whether a copy computes, and how long it may not."""

YIELDING = 5
"""Niceness of a copy that is not urgent: what it is beside goes first."""


class Beside(Generic[Result]):
    """`work()`, which answers something, begun at once in a copy of this process.

    Leaving the context ends the copy, finished or not. `is_urgent`: this process will wait for it, so it takes its full
    share of the processor. Where there is one core, or where a copy cannot be made or ends without an answer, `result`
    does the work here. `seconds`: what it took in the copy, None before its answer came and where it was done here.
    """

    seconds: float | None = None

    def __init__(self, work: Callable[[], Result], *, is_urgent: bool = False) -> None:
        self._work = work
        self._niceness = 0 if is_urgent else YIELDING
        self._connection: Connection | None = None
        self._process: Any = None
        self._found: Any = None

    def __enter__(self) -> Self:
        if can_be_copied():
            with contextlib.suppress(OSError):  # no memory, or no process, to spare
                self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()

    @property
    def is_under_way(self) -> bool:
        """Whether a copy is at work, which takes a core until its answer has come."""
        if self._found is not None or self._connection is None or self._process is None:
            return False
        with contextlib.suppress(OSError):
            return not self._connection.poll()
        return False

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(theirs, self._work, os.getpid(), self._niceness), daemon=True)
        with theirs, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that threads do not come along is what we want
            process.start()
        self._process = process

    def result(self, threads: int) -> Result:
        """What `work` gave; with `threads` where it has to be done here. Raises the SpachError that it raised."""
        if self._found is None:
            self._found = self._received()
        if self._found is None:
            with torch_threads(threads):
                self._found = self._work()
        if isinstance(self._found, SpachError):
            raise self._found
        result: Result = self._found
        return result

    def answer(self) -> Result | None:
        """What `work` gave in the copy; None where there is none, or none that could do it."""
        if self._found is None:
            self._found = self._received()
        return None if isinstance(self._found, SpachError) else self._found

    def _received(self) -> Any:
        """The copy's answer or error; None where there is none."""
        if self._process is None or self._connection is None:
            return None
        try:
            if not self._computes_until_it_answers():
                return None
            found, self.seconds = self._connection.recv()
        except (EOFError, OSError):
            return None
        return found

    def _computes_until_it_answers(self) -> bool:
        """Wait for the answer, or for the copy's end; False for one that stopped computing."""
        assert self._connection is not None
        used, since = -1.0, time.monotonic()
        while not self._connection.poll(LOOK_S):
            now = processor_seconds(self._process.pid)
            if now > used:
                used, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE_S:
                return False
        return True


def processor_seconds(pid: int) -> float:
    """What a process has had of a processor so far."""
    words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def can_be_copied() -> bool:
    """Whether a copy of this process could compute: Ray's and other threads' processes are left alone."""
    alone = threading.current_thread() is threading.main_thread() and "ray" not in sys.modules
    alone = alone and not multiprocessing.current_process().daemon  # which may have no children
    return alone and sys.platform == "linux" and available_threads() > 1


def _answer(connection: Connection, work: Callable[[], Any], parent: int, niceness: int) -> None:
    """In the copy: one answer. It ends with the process that it is of, whose signals are not for it."""
    end_with(parent, signal.SIGKILL)
    gc.freeze()
    for number, handler in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.nice(niceness)
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        found = work()
    except SpachError as error:
        found = error
    except BaseException:  # whatever it is, the work is done again where it can be told
        os._exit(1)
    with contextlib.suppress(OSError):
        connection.send((found, time.perf_counter() - start))

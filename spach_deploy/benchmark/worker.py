"""One runner in a process of its own: its memory is its own, and its end is not the end of the others."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spach_deploy.benchmark.contestants import Opened, Setup, opened
from spach_deploy.errors import SpachError, UnavailableError

if TYPE_CHECKING:
    from typing_extensions import Self

_WARM_RUNS, _WARM_S, _LEAST_RUNS = 2, 0.1, 3


@dataclasses.dataclass(frozen=True)
class Turn:
    """Seconds of each run, after some that are not counted; of the first of those; the process's peak memory so far."""

    seconds: tuple[float, ...]
    first_s: float
    peak_bytes: int


class Worker:
    """A runner in its process. Entering raises UnavailableError with the reason where it does not open."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name = name
        self._setup = setup
        self._connection: Connection | None = None
        self._process: Any = None

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.name, self._setup), daemon=True)
        threads = str(self._setup.threads)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = threads
        try:
            self._process.start()
        finally:
            os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
        theirs.close()
        try:
            self._received()
        except UnavailableError:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """Of its process."""
        return int(self._process.pid)

    def logits(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Answers to engine inputs (N, ...)."""
        found: npt.NDArray[np.float32] = self._ask("logits", inputs)
        return found

    def turn(self, inputs: npt.NDArray[Any], seconds: float) -> Turn:
        """Run this batch for so many seconds."""
        turn: Turn = self._ask("turn", (inputs, seconds))
        return turn

    def profile(self, inputs: npt.NDArray[Any]) -> dict[str, float]:
        """Seconds of each module in one run; empty where the runner cannot tell."""
        times: dict[str, float] = self._ask("profile", inputs)
        return times

    def _ask(self, what: str, argument: Any) -> Any:
        assert self._connection is not None, "outside the worker's context"
        try:
            self._connection.send((what, argument))
        except OSError:
            raise self._died() from None
        return self._received()

    def _received(self) -> Any:
        assert self._connection is not None
        try:
            well, content = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if not well:
            raise UnavailableError(content)
        return content

    def _died(self) -> UnavailableError:
        self._process.join(5)
        code = self._process.exitcode
        hint = "out of memory? Give smaller batches" if code == -9 else "its library gave no reason"
        return UnavailableError(f"its process ended with {code} ({hint})")

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.terminate()
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()


def _serve(connection: Connection, name: str, setup: Setup) -> None:
    """In the worker: open the runner, then answer until the other end closes."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command itself ends its workers
    try:
        with opened(name, setup) as runner:
            connection.send((True, None))
            while True:
                what, argument = connection.recv()
                connection.send((True, _answer(runner, what, argument)))
    except EOFError:
        return
    except Exception as error:  # of any library; it crosses to the other process as a sentence
        connection.send((False, _sentence(error)))


def _answer(runner: Opened, what: str, argument: Any) -> Any:
    if what == "logits":
        return np.asarray(runner.run(runner.prepare(argument)), np.float32)
    if what == "profile":
        return {} if runner.profile is None else runner.profile(runner.prepare(argument))
    inputs, seconds = argument
    fed = runner.prepare(inputs)
    warm = _timed(runner, fed, _WARM_S, _WARM_RUNS)
    counted = _timed(runner, fed, seconds, _LEAST_RUNS)
    return Turn(counted, warm[0], _peak_bytes())


def _peak_bytes() -> int:
    """Of this program alone: getrusage also counts what the process was before it became a worker."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def _timed(runner: Opened, fed: Any, seconds: float, least: int) -> tuple[float, ...]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        runner.run(fed)
        times.append(time.perf_counter() - start)
    return tuple(times)


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    return first if isinstance(error, SpachError) else f"{type(error).__name__}: {first}"

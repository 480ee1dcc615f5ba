"""A benchmark's runner in a process of its own: its memory is measured apart, and its crash does not end the
benchmark.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spach_deploy.benchmark.runners import OpenRunner, RunnerSetup, opened
from spach_deploy.bundle.inputs import Batch
from spach_deploy.common import operating_system, processes
from spach_deploy.common.errors import SpachError, UnavailableError

if TYPE_CHECKING:
    from typing_extensions import Self

    from spach_deploy.common.operating_system import Connection

_WARM_RUNS, _WARM_S, _LEAST_RUNS = 1, 0.1, 2
_PATIENCE_S = 5.0
"""Seconds in which a worker may end by itself."""

_WORKER = "import sys; from spach_deploy.benchmark.worker import main; main(int(sys.argv[1]))"
_NO_MEMORY = ("allocate memory", "bad_alloc", "out of memory", "bad allocation")
"""Parts of error messages for exhausted memory, of libraries that raise no exception of their own for it."""


@dataclasses.dataclass(frozen=True)
class TimedRuns:
    """Seconds of each timed run, and the last run's output (N, ...) in float32.

    `peak_bytes`: the process's peak memory so far, loading included.
    """

    seconds: tuple[float, ...]
    values: npt.NDArray[np.float32]
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class FirstOutputs:
    """The output (N, ...) in float32, and seconds of the first run at this batch size, which may compile."""

    values: npt.NDArray[np.float32]
    first_s: float


class RunnerProcess:
    """A runner in its process. Entering raises UnavailableError with the reason where it does not open."""

    def __init__(self, name: str, setup: RunnerSetup) -> None:
        self.name = name
        self._setup = setup
        self._connection: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.device = ""
        self.open_s = 0.0

    def __enter__(self) -> Self:
        self._connection, self._process = processes.start_worker(_WORKER, threads=self._setup.threads)
        try:
            self.device, self.open_s = self._request((self.name, self._setup))
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
        """The process id."""
        assert self._process is not None, "outside the worker's context"
        return self._process.pid

    def first_outputs(self, inputs: Batch, batch: int) -> FirstOutputs:
        """Run engine inputs (N, ...) in batches of exactly `batch`; the last one is filled up with the first images."""
        outputs: FirstOutputs = self._request(("first_outputs", (inputs, batch)))
        return outputs

    def turn(self, inputs: Batch, seconds: float) -> TimedRuns:
        """Run this batch again and again for so many seconds, after a warm-up."""
        turn: TimedRuns = self._request(("turn", (inputs, seconds)))
        return turn

    def profile(self, inputs: Batch) -> dict[str, float]:
        """Seconds of one run by module; empty for a runner without a profiler."""
        times: dict[str, float] = self._request(("profile", inputs))
        return times

    def _request(self, message: Any) -> Any:
        assert self._connection is not None, "outside the worker's context"
        try:
            self._connection.send(message)
            succeeded, content = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if not succeeded:
            raise UnavailableError(content)
        return content

    def _died(self) -> UnavailableError:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_S)
        code = self._process.returncode
        hint = "out of memory? Give a smaller --batch" if code == -9 else "its library gave no reason"
        return UnavailableError(f"its process ended with {code} ({hint})")

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            processes.end(self._process, _PATIENCE_S)


def main(connection_fd: int) -> None:
    """The worker's main function: open the runner, then serve requests until the other end closes."""
    connection = operating_system.shared_connection(connection_fd)
    sys.stdout = sys.stderr  # what a user's own module prints is no result
    try:
        wanted, begun = connection.recv(), time.perf_counter()
        with opened(*wanted) as runner:
            connection.send((True, (runner.device, time.perf_counter() - begun)))
            while True:
                what, argument = connection.recv()
                connection.send((True, _reply(runner, what, argument)))
    except EOFError:
        return
    except Exception as error:  # of any library; it crosses to the other process as a sentence
        connection.send((False, _sentence(error)))


def _reply(runner: OpenRunner, what: str, argument: Any) -> Any:
    if what == "first_outputs":
        return _first_outputs(runner, *argument)
    if what == "profile":
        return {} if runner.profile is None else runner.profile(runner.prepare(argument))
    inputs, seconds = argument
    fed = runner.prepare(inputs)
    _timed(runner, fed, _WARM_S, _WARM_RUNS)
    times, last = _timed(runner, fed, seconds, _LEAST_RUNS)
    return TimedRuns(times, np.asarray(last, np.float32), operating_system.peak_bytes_of_program())


def _first_outputs(runner: OpenRunner, inputs: Batch, batch: int) -> FirstOutputs:
    times, parts = [], []
    for start in range(0, len(inputs), batch):
        fed = runner.prepare(inputs[np.arange(start, start + batch) % len(inputs)])
        begun = time.perf_counter()
        parts.append(np.asarray(runner.run(fed), np.float32))
        times.append(time.perf_counter() - begun)
    return FirstOutputs(np.concatenate(parts)[: len(inputs)], times[0])


def _timed(runner: OpenRunner, fed: Any, seconds: float, least: int) -> tuple[tuple[float, ...], Any]:
    """Seconds of each run, and the last output."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        last = runner.run(fed)
        times.append(time.perf_counter() - start)
    return tuple(times), last


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, MemoryError) or any(word in text for word in _NO_MEMORY):
        return "not enough memory: give a smaller --batch, or close other programs"
    return first.rstrip(".") if isinstance(error, SpachError) else f"{type(error).__name__}: {first}"

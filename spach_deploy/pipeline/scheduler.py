"""When the steps of an export run: one after another, or some of them in a worker process beside the others.

What a step computes is written in `pipeline.steps`, and is the same either way: with as many threads, from the same
inputs. A step that is submitted gives a `concurrent.futures.Future`; futures among its inputs are waited for first.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from spach_deploy.common.errors import SpachError
from spach_deploy.common.machine import available_threads, torch_threads
from spach_deploy.common.processes import end, start_worker

if TYPE_CHECKING:
    from typing_extensions import Self

Result = TypeVar("Result")

_WORKER = "import sys; from spach_deploy.pipeline.scheduler import serve; serve(int(sys.argv[1]))"


class Scheduler(Protocol):
    """Decides when steps run."""

    def submit(self, step: Callable[..., Result], *inputs: Any) -> Future[Result]:
        """`step(*inputs)`, each future among the inputs replaced by its result."""

    def started(self, work: Future[Any] | None) -> None:
        """Another process is at work on this: wait for it where nothing is to run beside anything."""


def results_of(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs, futures replaced by their results. Raises what they raise."""
    return tuple(value.result() if isinstance(value, Future) else value for value in inputs)


def step_threads() -> int:
    """With how many threads PyTorch computes a submitted step: half of the cores, so that sums come out alike."""
    return max(1, available_threads() // 2)


class Sequential:
    """Every step runs when it is submitted, in this process."""

    def submit(self, step: Callable[..., Result], *inputs: Any) -> Future[Result]:
        """A future that is done."""
        future: Future[Result] = Future()
        try:
            with torch_threads(step_threads()):
                future.set_result(step(*results_of(inputs)))
        except SpachError as error:
            future.set_exception(error)
        return future

    def started(self, work: Future[Any] | None) -> None:
        """Wait for it."""
        if work is not None:
            work.exception()


class Overlapped:
    """Submitted steps run one after another in a worker process that starts clean; steps and inputs are pickled.

    The worker starts when the block is entered, and loads PyTorch beside what this process loads. Leaving the block
    ends it, whatever it does. Where it cannot be started, or dies, its steps run in this process.
    """

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(1, "overlapped-steps")
        self._is_left = False
        self._connection: Connection | None = None
        with contextlib.suppress(OSError):  # no memory, or no process, to spare
            self._connection, self._process = start_worker(_WORKER, threads=step_threads())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_left = True
        if self._connection is not None:
            end(self._process)
        self._threads.shutdown(cancel_futures=True)
        if self._connection is not None:
            self._connection.close()

    def submit(self, step: Callable[..., Result], *inputs: Any) -> Future[Result]:
        """The step's future, at once."""
        return self._threads.submit(self._run, step, inputs)

    def started(self, work: Future[Any] | None) -> None:
        """Go on."""

    def _run(self, step: Callable[..., Result], inputs: tuple[Any, ...]) -> Result:
        inputs = results_of(inputs)
        try:
            outcome = self._answer(step, inputs)
        except (EOFError, OSError):
            if self._is_left:
                raise
            with torch_threads(step_threads()):
                return step(*inputs)
        if isinstance(outcome, SpachError):
            raise outcome
        result: Result = outcome
        return result

    def _answer(self, step: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        if self._connection is None:
            raise EOFError
        self._connection.send_bytes(pickle.dumps((step, inputs), protocol=pickle.HIGHEST_PROTOCOL))
        return self._connection.recv()


def scheduler_here() -> contextlib.AbstractContextManager[Scheduler]:
    """`Overlapped` where there are two cores or more, else `Sequential`."""
    return Overlapped() if available_threads() > 1 else contextlib.nullcontext(Sequential())


def serve(connection_fd: int) -> None:
    """In the worker: run the steps that come over the connection, until its other end closes."""
    connection = Connection(connection_fd)
    threading.Thread(target=_load, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            step, inputs = pickle.loads(connection.recv_bytes())
            try:
                outcome = step(*inputs)
            except SpachError as error:
                outcome = error
            connection.send(outcome)
    os._exit(0)


def _load() -> None:
    """PyTorch, before the first step needs it."""
    import torch

    torch.set_num_threads(step_threads())

"""Schedulers decide when and where the steps of an export run: `Sequential` or `Overlapped`.

`Sequential` runs every step at once; `Overlapped` runs submitted steps in a worker process at the same time as other
work. Both give the same bytes: the same functions of `pipeline.steps` run on the same inputs with the same number of
threads. `submit` returns a `concurrent.futures.Future`; futures among a step's inputs are waited for first.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from spach_deploy.common.errors import SpachError
from spach_deploy.common.machine import available_threads, torch_threads
from spach_deploy.common.operating_system import shared_connection
from spach_deploy.common.processes import end, start_worker
from spach_deploy.common.progress import results_of

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from typing_extensions import Self

    from spach_deploy.common.operating_system import Connection

Result = TypeVar("Result")

_WORKER = "import sys; from spach_deploy.pipeline.scheduler import serve; serve(int(sys.argv[1]))"


class Scheduler(Protocol):
    """Decides when steps run."""

    def submit(self, step: Callable[..., Result], *inputs: Any) -> Future[Result]:
        """Run `step(*inputs)`, with futures among the inputs replaced by their results."""

    def started(self, work: Future[Any] | None) -> None:
        """Called when another process has begun `work`, such as the engine build: wait for it, or go on meanwhile."""


def step_threads() -> int:
    """PyTorch's threads in a submitted step: half of the cores in every scheduler, so that sums round identically."""
    return max(1, available_threads() // 2)


class Sequential:
    """Every step runs when it is submitted, in this process."""

    def submit(self, step: Callable[..., Result], *inputs: Any) -> Future[Result]:
        """Run the step now; the future is done."""
        future: Future[Result] = Future()
        try:
            with torch_threads(step_threads()):
                future.set_result(step(*results_of(inputs)))
        except SpachError as error:
            future.set_exception(error)
        return future

    def started(self, work: Future[Any] | None) -> None:
        """Wait until `work` is done."""
        if work is not None:
            work.exception()


class Overlapped:
    """Submitted steps run one after another in one worker process, a new Python; steps and inputs are pickled.

    The worker starts on entering the context, and loads PyTorch while this process loads it too. Leaving the context
    kills it. Where it cannot be started, or dies, its steps run in this process.
    """

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(1, "overlapped-steps")
        self._is_left = False
        self._connection: Connection | None = None
        with contextlib.suppress(OSError):  # not enough memory, or too many processes
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
        """Queue the step for the worker, and return its future at once."""
        return self._threads.submit(self._run, step, inputs)

    def started(self, work: Future[Any] | None) -> None:
        """Go on without waiting."""

    def _run(self, step: Callable[..., Result], inputs: tuple[Any, ...]) -> Result:
        inputs = results_of(inputs)
        try:
            outcome = self._in_worker(step, inputs)
        except (EOFError, OSError):
            if self._is_left:
                raise
            with torch_threads(step_threads()):
                return step(*inputs)
        if isinstance(outcome, SpachError):
            raise outcome
        result: Result = outcome
        return result

    def _in_worker(self, step: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        """The step's result from the worker, or its SpachError. EOFError or OSError where there is no worker."""
        if self._connection is None:
            raise EOFError
        _send(self._connection, (step, inputs))
        return _receive(self._connection)


def scheduler_here() -> contextlib.AbstractContextManager[Scheduler]:
    """`Overlapped` where there are two cores or more, else `Sequential`."""
    return Overlapped() if available_threads() > 1 else contextlib.nullcontext(Sequential())


def serve(number: int) -> None:
    """Main loop of the worker: run the steps that come over the connection `number`, until its other end closes."""
    connection = shared_connection(number)
    sys.stdout = sys.stderr  # what a user's own module prints is no result
    threading.Thread(target=_load, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            step, inputs = _receive(connection)
            try:
                outcome = step(*inputs)
            except SpachError as error:
                outcome = error
            except Exception:  # the step runs again in the other process, which raises it there
                os._exit(1)
            _send(connection, outcome)
    os._exit(0)


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, whose numbers go out of band: PyTorch would copy each of them several times."""

    def reducer_override(self, value: Any) -> Any:
        """How a dense tensor on the CPU is made again; others as PyTorch does it."""
        torch = sys.modules.get("torch")
        if torch is None or type(value) not in (torch.Tensor, torch.nn.Parameter):
            return NotImplemented
        if value.device.type != "cpu" or not value.is_contiguous() or value.dtype is torch.bfloat16:
            return NotImplemented
        return _tensor, (value.detach().numpy(), type(value), value.requires_grad)


def _tensor(array: NDArray[Any], kind: Callable[..., torch.Tensor], requires_grad: bool) -> torch.Tensor:
    import torch

    tensor = torch.from_numpy(array)
    return tensor.requires_grad_(requires_grad) if kind is torch.Tensor else kind(tensor, requires_grad)


def _send(connection: Connection, value: Any) -> None:
    """Send what `_receive` returns: the pickled value, and each of its arrays in a message of its own."""
    arrays: list[pickle.PickleBuffer] = []
    content = io.BytesIO()
    _Pickler(content, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=arrays.append).dump(value)
    connection.send((content.getvalue(), len(arrays)))
    for array in arrays:
        connection.send_bytes(array.raw())


def _receive(connection: Connection) -> Any:
    content, count = connection.recv()
    return pickle.loads(content, buffers=[bytearray(connection.recv_bytes()) for _ in range(count)])


def _load() -> None:
    """Import PyTorch before the first step needs it."""
    import torch

    torch.set_num_threads(step_threads())

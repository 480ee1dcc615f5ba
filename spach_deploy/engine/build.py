"""Build an engine plan from an ONNX graph in a worker process, with Polygraphy.

Why a worker process:

- The compiler blocks its thread for seconds, so Ctrl-C would be delayed, or lost in one of its callbacks. A worker ends
  within milliseconds.
- The compiler can crash: an ONNX Attention in FP32 ends TensorRT for RTX 1.7 with a segmentation fault. With a worker
  that is an error with a message.
- Polygraphy binds one flavour of TensorRT per process.
- The compiler's memory is free at once when the worker ends.

The caller can validate the graph during the build:

    with start_build(path, target, flavour, precision=precision) as build:
        ...  # validate the graph meanwhile
        result = build.result()
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

from spach_deploy.common import operating_system, processes
from spach_deploy.common.errors import BuildError, UsageError
from spach_deploy.engine.flavours import EngineFlavour
from spach_deploy.engine.network_facts import NetworkFacts
from spach_deploy.engine.worker import Built, OnProgress, ProgressEvent, Request
from spach_deploy.options.specs import BatchProfile, ComputeCapability, EngineTarget, Flavour, Precision
from spach_deploy.runtime.polygraphy_session import LogLine, summarize_warnings

_SHOWN_OUTPUT = 400
_WORKER = "import sys; from spach_deploy.engine.worker import main; main(int(sys.argv[1]), sys.argv[2])"


@dataclasses.dataclass(frozen=True)
class EngineResult:
    """A built engine. `plan`: the bytes of engine.plan. `graph_sha256`: of the bytes that the compiler parsed.
    `warnings`: of the log, each kind once with its count. Seconds are wall-clock time.
    """

    plan: bytes = dataclasses.field(repr=False)
    graph_sha256: str
    flavour: Flavour
    flavour_version: str
    gpus: tuple[ComputeCapability, ...]
    batch: BatchProfile
    network: NetworkFacts = dataclasses.field(repr=False)
    log: tuple[LogLine, ...] = dataclasses.field(repr=False)
    warnings: tuple[tuple[str, int], ...]
    parse_seconds: float
    build_seconds: float
    seconds: float

    @property
    def log_text(self) -> str:
        """The builder's log as text, one message per line."""
        return "".join(f"{line}\n" for line in self.log)


def build_engine(
    onnx_path: Path, target: EngineTarget, flavour: EngineFlavour, *, precision: Precision
) -> EngineResult:
    """`start_build`, and wait for the result."""
    with start_build(onnx_path, target, flavour, precision=precision) as build:
        return build.result()


def start_build(
    onnx_path: Path,
    target: EngineTarget,
    flavour: EngineFlavour,
    *,
    precision: Precision,
    on_progress: OnProgress | None = None,
) -> contextlib.AbstractContextManager[Future[EngineResult]]:
    """Start building the plan of a typed graph and return at once. Leaving the context ends the build.

    Inputs are (batch, ...). Their shapes are read from the graph, the batch profile from `target`. `precision` is the
    graph's; GPUs that cannot compute in it are refused. `on_progress` is called from another thread.

    Raises what `EngineFlavour.resolve` raises, and UsageError when there is no such file. The future's `result()`
    raises BuildError with the compiler's reason, also when the worker crashed, and UsageError for options that the
    compiler refuses.
    """
    resolved = flavour.resolve(target, precision)
    if not onnx_path.is_file():
        raise UsageError(f"There is no graph {onnx_path}.", "Give the ONNX file to build from.")
    return _BuildProcess(onnx_path, resolved, on_progress or _ignore)


def _ignore(event: ProgressEvent) -> None:
    """Does nothing; for builds whose progress is not wanted."""


class _BuildProcess:
    """A worker process that builds one engine, and the future of its result. Leaving the context kills the worker."""

    def __init__(self, onnx_path: Path, target: EngineTarget, on_progress: OnProgress) -> None:
        self.future: Future[EngineResult] = Future()
        self._target = target
        self._name = onnx_path.name
        self._start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            self._plan_fd, self._output_fd = (_memory_file(stack, name) for name in ("plan", "output"))
            output, plan = self._output_fd, operating_system.shared_number(self._plan_fd)
            self._connection, self._process = processes.start_worker(
                _WORKER, target.flavour.value, stdout=output, stderr=output, shared=(plan,)
            )
            stack.callback(self._connection.close)
            self._stack = stack.pop_all()
        with contextlib.suppress(OSError):  # if the worker has ended already, `_read` sets the error on the future
            self._connection.send(Request(onnx_path.resolve(), target, plan))
        self._reader = threading.Thread(target=self._read, args=(on_progress,), daemon=True)
        self._reader.start()

    def __enter__(self) -> Future[EngineResult]:
        return self.future

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        processes.end(self._process)
        self._reader.join()
        self._stack.close()

    def _read(self, on_progress: OnProgress) -> None:
        """Pass progress on until the worker sends its outcome or ends, and set that on the future."""
        try:
            while isinstance(message := self._connection.recv(), ProgressEvent):
                on_progress(message)
            self._process.kill()  # nothing more comes, and an orderly exit takes time to free memory
            if isinstance(message, Built):
                self.future.set_result(self._result(message))
            else:
                self.future.set_exception(message)
        except (EOFError, OSError):
            self.future.set_exception(self._crash())
        except BaseException as error:  # raised by on_progress
            self._process.kill()
            self.future.set_exception(error)

    def _result(self, built: Built) -> EngineResult:
        return EngineResult(
            plan=_contents(self._plan_fd),
            graph_sha256=built.graph_sha256,
            flavour=self._target.flavour,
            flavour_version=built.version,
            gpus=self._target.gpus,
            batch=self._target.batch,
            network=built.network,
            log=built.log,
            warnings=summarize_warnings(built.log),
            parse_seconds=built.parse_seconds,
            build_seconds=built.build_seconds,
            seconds=time.perf_counter() - self._start,
        )

    def _crash(self) -> BuildError:
        code = self._process.wait()
        crash = operating_system.crash(code)
        how = f"was ended by {crash.name}" if crash else f"ended with code {code}"
        words = " ".join(_contents(self._output_fd).decode(errors="replace").split())[-_SHOWN_OUTPUT:]
        return BuildError(
            f"The process that built {self._name} with {self._target.flavour.value} {how}"
            f"{f', saying: {words}' if words else ' without a word'}.",
            _crash_hint(crash) if crash else "",
        )


def _crash_hint(crash: operating_system.Crash) -> str:
    """The next step after the system ended the compiler."""
    if crash.of_memory:
        return f"{crash.name} mostly means too little memory: give fewer --gpu or a smaller --batch."
    return (
        "That is a defect of the compiler that this graph meets: --no-rewrite NAME gives it another graph,"
        " and --engine none exports the graph alone."
    )


def _memory_file(stack: contextlib.ExitStack, name: str) -> int:
    """A new open file, in memory where the system can, because a disk may be full. `stack` closes it."""
    descriptor = operating_system.memory_file(f"spach-deploy-{name}")
    stack.callback(os.close, descriptor)
    return descriptor


def _contents(descriptor: int) -> bytes:
    with open(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return file.read()

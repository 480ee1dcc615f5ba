"""Engines from ONNX graphs: each is built in a process of its own, by Polygraphy.

Why another process: the compiler holds its thread for seconds at a time, so Ctrl-C would wait for it, or be swallowed
in one of its callbacks; it can crash (an ONNX Attention in FP32 ends TensorRT for RTX 1.7 with a segmentation fault);
Polygraphy drives one flavour per process; and the memory it took is given back at once. Here Ctrl-C ends the build
within milliseconds, a crash is an error, and validation can run beside the build:

    with start_build(path, target, flavour, precision=precision) as build:
        ...  # validate the graph meanwhile
        result = build.wait()

The process can be there before the graph is (`Builder`), and load the compiler beside other work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from spach_deploy.common import processes
from spach_deploy.common.errors import BuildError, UsageError
from spach_deploy.engine.compile import OnProgress, ProgressEvent
from spach_deploy.engine.flavours import EngineFlavour, choose_flavour
from spach_deploy.engine.network_facts import NetworkFacts
from spach_deploy.engine.worker import Built, Failed, Request
from spach_deploy.options.specs import BatchProfile, ComputeCapability, EngineTarget, Flavour, Precision
from spach_deploy.runtime.polygraphy_session import LogLine, summarize_warnings

if TYPE_CHECKING:
    from typing_extensions import Self

_SHOWN_OUTPUT = 400
_WORKER = "import sys; from spach_deploy.engine.worker import main; main(int(sys.argv[1]), sys.argv[2])"


@dataclasses.dataclass(frozen=True)
class EngineResult:
    """A built engine. `graph_sha256` is of the bytes that the compiler parsed, `warnings` are the log's, each kind once
    with its count. Seconds are of the wall clock.
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
        """The builder's log as text, one message a line."""
        return "".join(f"{line}\n" for line in self.log)


def build_engine(
    onnx_path: Path,
    target: EngineTarget,
    flavour: EngineFlavour,
    *,
    precision: Precision,
    on_progress: OnProgress | None = None,
) -> EngineResult:
    """Build and wait; see `start_build`."""
    with start_build(onnx_path, target, flavour, precision=precision, on_progress=on_progress) as build:
        return build.wait()


def start_build(
    onnx_path: Path,
    target: EngineTarget,
    flavour: EngineFlavour,
    *,
    precision: Precision,
    on_progress: OnProgress | None = None,
    builder: Builder | None = None,
) -> RunningBuild:
    """Start building the plan of a strongly typed graph and return at once.

    Inputs are (batch, ...); their shapes are read from the graph, the batch profile from `target`. `precision` is the
    graph's, by which targets are checked. `on_progress` is called from another thread. `builder`: a process that is
    there already, of the same flavour. Raises what `EngineFlavour.resolve` raises, and UsageError when there is no such
    file.
    """
    resolved = flavour.resolve(target, precision)
    if not onnx_path.is_file():
        raise UsageError(f"There is no graph {onnx_path}.", "Give the ONNX file to build from.")
    return RunningBuild(builder or Builder(flavour.flavour), onnx_path, resolved, on_progress or _ignore)


def _ignore(event: ProgressEvent) -> None:
    """Progress that nobody watches."""


class Builder:
    """A process that loads a flavour's compiler and waits for one graph. Leaving its context ends it."""

    def __init__(self, flavour: Flavour) -> None:
        with contextlib.ExitStack() as stack:
            self.plan_fd, self.output_fd = (_memory_file(stack, name) for name in ("plan", "output"))
            self.connection, self.process = processes.start_worker(
                *(_WORKER, flavour.value),
                stdout=self.output_fd,
                stderr=self.output_fd,
                pass_fds=(self.plan_fd,),
            )
            stack.callback(self.connection.close)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self.close()

    @classmethod
    def for_flavour(cls, requested: Flavour) -> contextlib.AbstractContextManager[Builder | None]:
        """A builder of the flavour that `choose_flavour` gives for `requested`, and raises what that raises."""
        flavour = choose_flavour(requested)
        return contextlib.nullcontext() if flavour is None else cls(flavour.flavour)

    def end(self) -> None:
        """End the process, whatever it does."""
        processes.end(self.process)

    def close(self) -> None:
        """Give back what is held for it, when nobody reads from it any more. Harmless when repeated."""
        self._stack.close()


class RunningBuild:
    """A build under way in another process. Leaving its context ends that process, finished or not."""

    def __init__(self, builder: Builder, onnx_path: Path, target: EngineTarget, on_progress: OnProgress) -> None:
        self._builder = builder
        self._target = target
        self._name = onnx_path.name
        self._start = time.perf_counter()
        self._outcome: Built | Failed | None = None
        self._broken: BaseException | None = None
        self._seconds = 0.0
        with contextlib.suppress(OSError):  # one that has ended says why to whoever waits
            builder.connection.send(Request(onnx_path.resolve(), target, builder.plan_fd))
        self._reader = threading.Thread(target=self._read, args=(on_progress,), daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the build, if it still runs, and give back what it holds. Harmless when repeated."""
        self._builder.end()
        if self._reader is not threading.current_thread():
            self._reader.join()
        self._builder.close()

    def wait(self) -> EngineResult:
        """The engine. BuildError with the compiler's reason, also when its process crashed; UsageError for options.

        Can be interrupted (Ctrl-C); then leave the context, which ends the build.
        """
        self._reader.join()
        if self._broken is not None:
            raise self._broken
        if isinstance(self._outcome, Failed):
            raise self._outcome.error()
        if self._outcome is None:
            raise self._crash()
        return self._result(self._outcome)

    def _read(self, on_progress: OnProgress) -> None:
        """Pass on progress until the outcome comes, or the process is gone."""
        try:
            while isinstance(message := self._builder.connection.recv(), ProgressEvent):
                on_progress(message)
            self._outcome = message
            self._builder.process.kill()  # it has said all, and giving its memory back takes time
        except (EOFError, OSError):
            pass
        except BaseException as error:  # of on_progress: raised again where the caller waits
            self._broken = error
            self._builder.process.kill()
        self._seconds = time.perf_counter() - self._start

    def _result(self, built: Built) -> EngineResult:
        return EngineResult(
            plan=_contents(self._builder.plan_fd),
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
            seconds=self._seconds,
        )

    def _crash(self) -> BuildError:
        code = self._builder.process.wait()
        how = f"was ended by {processes.signal_name(-code)}" if code < 0 else f"ended with code {code}"
        words = " ".join(_contents(self._builder.output_fd).decode(errors="replace").split())[-_SHOWN_OUTPUT:]
        return BuildError(
            f"The process that built {self._name} with {self._target.flavour.value} {how}"
            f"{f', saying: {words}' if words else ' without a word'}.",
            "SIGSEGV is a defect of the compiler that this graph meets; SIGKILL mostly means too little memory."
            if code < 0
            else "",
        )


def _memory_file(stack: contextlib.ExitStack, name: str) -> int:
    """An open file that lives in memory: plans never touch a disk that may be full."""
    descriptor = os.memfd_create(f"spach-deploy-{name}")
    stack.callback(os.close, descriptor)
    return descriptor


def _contents(descriptor: int) -> bytes:
    with open(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return file.read()

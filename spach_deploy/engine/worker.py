"""The worker process that builds one engine. `spach_deploy.engine.build` starts it.

It loads the compiler, reads one `Request` from a connection, and writes progress and the outcome (`Built` or an error)
to it.

`compile_plan` builds a plan in this process with Polygraphy: parse, read facts of the network, configure, build. All
other code calls `spach_deploy.engine.build`, which runs it in a worker process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.common import operating_system
from spach_deploy.common.errors import BuildError, SpachError, UsageError
from spach_deploy.engine.flavours import FLAVOURS, EngineFlavour, Profile
from spach_deploy.engine.network_facts import NetworkFacts, TensorFact, read_network_facts
from spach_deploy.options.specs import BatchProfile, EngineTarget, Flavour
from spach_deploy.runtime.devices import missing_package
from spach_deploy.runtime.polygraphy_session import LogLine, captured_log, reason_of_failure, use_tensorrt

if TYPE_CHECKING:
    from spach_deploy.common.operating_system import Connection


@dataclasses.dataclass(frozen=True)
class Request:
    """What to build. `plan`: number of the open file to which it is written (`operating_system.shared_descriptor`)."""

    onnx_path: Path
    target: EngineTarget
    plan: int


@dataclasses.dataclass(frozen=True)
class Built:
    """The outcome of a successful build, without the plan, which is in the request's file."""

    graph_sha256: str
    version: str
    network: NetworkFacts
    log: tuple[LogLine, ...]
    parse_seconds: float
    build_seconds: float


def main(number: int, flavour: str) -> None:
    """Build for the one request on the shared connection `number`; return if it closes without one."""
    connection = operating_system.shared_connection(number)
    with contextlib.suppress(Exception):  # ignored here; compile_plan raises it again
        use_tensorrt(Flavour(flavour))
    try:
        request: Request = connection.recv()
    except (EOFError, OSError):
        return
    _exit_with_parent(connection)
    connection.send(_outcome(request, connection.send))


def _outcome(request: Request, send: Callable[[ProgressEvent], None]) -> Built | SpachError:
    try:
        compiled = compile_plan(request.onnx_path, request.target, FLAVOURS[request.target.flavour], send)
        _write_plan(compiled, request.plan)
    except SpachError as error:
        return error
    return Built(
        compiled.graph_sha256,
        compiled.version,
        compiled.network,
        compiled.log,
        compiled.parse_seconds,
        compiled.build_seconds,
    )


def _write_plan(compiled: Compiled, number: int) -> None:
    with open(operating_system.shared_descriptor(number), "wb") as file:
        file.write(compiled.plan)


def _exit_with_parent(connection: Connection) -> None:
    """Start a thread that ends this process when the parent closes the connection, cancels the build or dies."""

    def watch() -> None:
        try:
            connection.recv()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_SECONDS_BETWEEN_STEPS = 0.05
_DYNAMIC = -1


@dataclasses.dataclass(frozen=True)
class ProgressEvent:
    """One progress message of the builder: `step` of `steps` of a phase. Phases nest; `parent` is the enclosing one."""

    phase: str
    parent: str | None
    step: int
    steps: int
    finished: bool = False


OnProgress = Callable[[ProgressEvent], None]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Result of a build in this process. `plan` is in TensorRT's memory; `graph_sha256` is of the parsed bytes."""

    plan: memoryview = dataclasses.field(repr=False)
    graph_sha256: str
    version: str
    network: NetworkFacts
    log: tuple[LogLine, ...]
    parse_seconds: float
    build_seconds: float


def compile_plan(onnx_path: Path, target: EngineTarget, flavour: EngineFlavour, on_progress: OnProgress) -> Compiled:
    """Build the plan of a graph for a target that `EngineFlavour.resolve` returned.

    Raises MissingPackageError when the flavour's package does not import, UsageError when the graph's fixed batch is
    not the profile's, BuildError with the compiler's reason when the graph cannot be parsed or built.
    """
    try:
        trt = use_tensorrt(flavour.flavour)
    except ImportError as error:
        raise missing_package(flavour.flavour, "Building an engine", str(error)) from error
    with captured_log() as log:
        return _compile(trt, onnx_path, target, flavour, on_progress, log)


def _compile(
    trt: Any, onnx_path: Path, target: EngineTarget, flavour: EngineFlavour, on_progress: OnProgress, log: list[LogLine]
) -> Compiled:
    from polygraphy.backend.trt import EngineBytesFromNetwork

    start = time.perf_counter()
    what = f"{flavour.flavour.value} cannot read {onnx_path.name}"
    graph_sha256, parsed = _explained(lambda: _parsed(onnx_path), log, what, "")
    facts = read_network_facts(parsed[1])
    profile = batch_profile(facts.inputs, target.batch, onnx_path)
    parse_seconds = time.perf_counter() - start
    config = flavour.create_config(trt, target, profile, progress_monitor(trt, on_progress))
    build = EngineBytesFromNetwork(parsed, config, save_timing_cache=flavour.timing_cache(target))
    plan = _explained(build, log, f"{flavour.flavour.value} cannot build {onnx_path.name}", _advice(target))
    seconds = time.perf_counter() - start - parse_seconds
    return Compiled(memoryview(plan), graph_sha256, trt.__version__, facts, tuple(log), parse_seconds, seconds)


def _parsed(onnx_path: Path) -> tuple[str, Any]:
    """SHA-256 of the bytes that are parsed, and Polygraphy's builder, network and parser."""
    from polygraphy.backend.trt import NetworkFromOnnxBytes

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(onnx_path.open("rb"))
        # Mapped, not read: 130 MB less at the peak for ms_hybrid_s.
        content = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return hashlib.sha256(content).hexdigest(), NetworkFromOnnxBytes(content, strongly_typed=True)()


def _explained(step: Callable[[], Any], log: list[LogLine], what: str, advice: str) -> Any:
    """Call `step`; an exception becomes a BuildError with `what` failed, the compiler's reason from
    the log, `advice`.
    """
    try:
        return step()
    except Exception as error:  # Polygraphy's, and TensorRT's for options that it does not take
        reason = reason_of_failure(log) or _words(error) or "it gave no reason"
        raise BuildError(f"{what}: {reason.rstrip('.')}.", advice if "workspace" in reason else "") from error


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "" if text.startswith("Invalid Engine") else text


def _advice(target: EngineTarget) -> str:
    given = target.workspace_bytes is not None
    return "Give a larger --workspace, or leave it out." if given else "Free some memory for the compiler's workspace."


def batch_profile(inputs: tuple[TensorFact, ...], batch: BatchProfile, onnx_path: Path) -> Profile:
    """The optimization profile of a graph whose inputs are (batch, ...), with the batch symbolic or fixed.

    Raises BuildError for a graph without inputs (the parser makes one of a file that is no ONNX graph) and for other
    dynamic extents; UsageError when the graph's fixed batch is not `batch`.
    """
    if not inputs:
        raise BuildError(f"{onnx_path.name} is not an ONNX graph with inputs.", "Give the graph that was exported.")
    return {tensor.name: _shapes(tensor, batch, onnx_path) for tensor in inputs}


def _shapes(
    tensor: TensorFact, batch: BatchProfile, onnx_path: Path
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    leading, sample = tensor.shape[0], tensor.shape[1:]
    if _DYNAMIC in sample:
        raise BuildError(f"Input {tensor.name} of {onnx_path.name} has more than its batch symbolic: {tensor.shape}.")
    if leading != _DYNAMIC and batch != BatchProfile(leading, leading, leading):
        raise UsageError(
            f"{onnx_path.name} has a fixed batch of {leading} and --batch is {batch}.", f"Give --batch {leading}."
        )
    return (batch.min, *sample), (batch.opt, *sample), (batch.max, *sample)


def progress_monitor(trt: Any, on_progress: OnProgress) -> Any:
    """TensorRT's IProgressMonitor that passes every phase, and about twenty steps a second, to `on_progress`."""
    phases: dict[str, tuple[str | None, int]] = {}
    last_step = 0.0

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases[phase_name] = (parent_phase, num_steps)
            on_progress(ProgressEvent(phase_name, parent_phase, 0, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            nonlocal last_step
            now = time.monotonic()
            if now - last_step >= _SECONDS_BETWEEN_STEPS:
                last_step = now
                parent, steps = phases.get(phase_name, (None, step + 1))
                on_progress(ProgressEvent(phase_name, parent, step + 1, steps))
            return True  # never cancels: steps may be many seconds apart, so builds are cancelled by ending the process

        def phase_finish(self, phase_name: str) -> None:
            parent, steps = phases.get(phase_name, (None, 1))
            on_progress(ProgressEvent(phase_name, parent, steps, steps, finished=True))

    return Monitor()

"""Run engine plans of both flavours of TensorRT, with Polygraphy's TrtRunner, on the first GPU of this process."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from spach_deploy.common.errors import UnavailableError, UsageError
from spach_deploy.options.specs import Flavour
from spach_deploy.runtime import TensorSpec
from spach_deploy.runtime.batching import Arrays, BatchLimits, Feeds, check_feeds, run_in_batches
from spach_deploy.runtime.devices import (
    RTX_CAPABILITIES,
    LocalGpu,
    installed_version,
    is_installed,
    local_gpus,
    missing_package,
)
from spach_deploy.runtime.plan_identity import plan_identity
from spach_deploy.runtime.polygraphy_session import LogLine, captured_log, reason_of_failure, use_tensorrt
from spach_deploy.runtime.warm_start import COLD, RuntimeCache, StartOptions, cache_file, execution_context

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self


def why_engine_cannot_run_here(flavour: Flavour, gpus: tuple[LocalGpu, ...] | None = None) -> str | None:
    """Why no plan of `flavour` can run on this machine, as a clause; None when one may run.

    Takes only an attempt to open the driver's library. A plan for another GPU or version can still be refused.
    """
    present = local_gpus() if gpus is None else gpus
    if not present:
        return "no NVIDIA GPU with a working driver was found here"
    if flavour is Flavour.TENSORRT_RTX and present[0].capability not in RTX_CAPABILITIES:
        return f"TensorRT for RTX does not run on this machine's GPU, {present[0]}"
    return None if is_installed(flavour) else f"the package {flavour.value} is not installed"


class TensorRTRunner:
    """Runs a serialized plan; batches are split to fit its optimization profile.

    Entering raises UsageError when `plan` is no plan, and UnavailableError with the reason when it cannot run on this
    machine: no GPU, the other flavour, another version or GPU than it was built for. `gpus` replaces those that the
    driver reports. `start`: runtime cache, CUDA graphs and specialization, of TensorRT for RTX only; by default every
    start is cold. Inside the context, `problem` says why a runtime cache was not used, as a sentence.
    """

    device = "cuda"

    def __init__(
        self, plan: bytes, flavour: Flavour, *, gpus: tuple[LocalGpu, ...] | None = None, start: StartOptions = COLD
    ) -> None:
        self._plan = plan
        self._gpus = gpus
        self._flavour = flavour
        self._start = start
        self._cache: RuntimeCache | None = None
        self._exit = contextlib.ExitStack()
        self._runner: Any = None
        self._limits = BatchLimits()
        self.input_specs: Mapping[str, TensorSpec] = {}
        self.output_specs: Mapping[str, TensorSpec] = {}

    @property
    def name(self) -> str:
        """Name in tables and messages."""
        return f"TensorRT engine ({self._flavour.value})"

    def __enter__(self) -> Self:
        self._check_plan()
        if reason := why_engine_cannot_run_here(self._flavour, self._gpus):
            raise UnavailableError(f"The engine cannot run here: {reason}.")
        with contextlib.ExitStack() as stack:
            lines = stack.enter_context(captured_log())
            self._runner = stack.enter_context(self._activated(lines))
            self._read_specs(self._runner.engine)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner = None
        self._exit.close()

    @property
    def problem(self) -> str:
        """Why the runtime cache was not used or not written; empty where all is well, and without one."""
        return "" if self._cache is None else self._cache.problem

    def run(self, feeds: Feeds) -> Arrays:
        """Outputs of `feeds`; larger batches are split."""
        check_feeds(self.name, self.input_specs, feeds)
        return run_in_batches(self._run_once, feeds, self._limits)

    def layer_seconds(self, feeds: Feeds, runs: int = 3) -> dict[str, float]:
        """Seconds of each layer of the engine, the mean over `runs` runs after a warm-up, by TensorRT's own profiler.

        While the profiler is attached, layers run one after the other. Source: TensorRT Python API, "IProfiler".
        """
        check_feeds(self.name, self.input_specs, feeds)
        profiler = _profiler(use_tensorrt(self._flavour))
        context = self._runner.context
        self._runner.infer(feeds, check_inputs=False)
        context.profiler = profiler
        try:
            for _ in range(runs):
                self._runner.infer(feeds, check_inputs=False)
        finally:
            context.profiler = None
        return {layer: milliseconds / runs / 1e3 for layer, milliseconds in profiler.milliseconds.items()}

    def _run_once(self, feeds: Arrays) -> Arrays:
        outputs = self._runner.infer(feeds, check_inputs=False)
        return {name: _owned(array) for name, array in outputs.items()}  # copied: Polygraphy reuses its buffers

    def _check_plan(self) -> None:
        identity = plan_identity(self._plan)
        if not identity.is_plan:
            raise UsageError(f"This is not a whole TensorRT plan: {identity.problem}.", "Export it again.")
        if identity.flavour is not self._flavour:
            assert identity.flavour is not None
            raise UnavailableError(
                f"The plan was built by {identity.flavour.value} and {self._flavour.value} was to run it.",
                f"Run it with {identity.flavour.value}.",
            )

    @contextlib.contextmanager
    def _activated(self, lines: list[LogLine]) -> Any:
        try:
            tensorrt = use_tensorrt(self._flavour)
        except ImportError as error:
            raise missing_package(self._flavour, "Running an engine", str(error)) from error
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
        from polygraphy.exception import PolygraphyException

        try:
            runner = TrtRunner(functools.partial(self._loaded, tensorrt, EngineFromBytes(self._plan)))
            runner.activate()
        except PolygraphyException as error:
            raise self._explain(lines) from error
        try:
            yield runner
        finally:
            if self._cache is not None:
                self._cache.save()
            runner.deactivate()

    def _loaded(self, tensorrt: Any, load: Callable[[], Any]) -> Any:
        """The engine, or for TensorRT for RTX a context of it that starts as asked."""
        engine = load()
        if self._flavour is not Flavour.TENSORRT_RTX or self._start == COLD:
            return engine
        gpus = local_gpus() if self._gpus is None else self._gpus
        file = cache_file(self._plan, gpus[0], self._start)
        context, self._cache = execution_context(tensorrt, engine, file, self._start)
        return context

    def _explain(self, lines: list[LogLine]) -> UnavailableError:
        reason = reason_of_failure(lines) or "TensorRT gave no reason"
        built, here = plan_identity(self._plan).version, installed_version(self._flavour)
        versions = f" It was built by version {built}; {here} is installed here." if built and here else ""
        return UnavailableError(
            f"TensorRT does not load this plan here: {reason}.{versions}",
            "Plans are bound to the version that built them and to the GPUs they were built for: export it again here.",
        )

    def _read_specs(self, engine: Any) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
        self.input_specs = {name: _spec(engine, name) for name in inputs}
        self.output_specs = {name: _spec(engine, name) for name in names if name not in inputs}
        smallest, _, largest = (tuple(shape) for shape in engine.get_tensor_profile_shape(inputs[0], 0))
        self._limits = BatchLimits(smallest[0], largest[0])


def _profiler(tensorrt: Any) -> Any:
    """An IProfiler that sums the time of each layer in `milliseconds`."""

    class Profiler(tensorrt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.milliseconds: Counter[str] = Counter()

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.milliseconds[layer_name] += ms  # type: ignore[assignment]

    return Profiler()


def _spec(engine: Any, name: str) -> TensorSpec:
    from polygraphy.datatype import DataType

    dtype = DataType.from_dtype(engine.get_tensor_dtype(name), "tensorrt")
    shape = tuple(engine.get_tensor_shape(name))
    return TensorSpec(str(dtype.numpy()), tuple(None if extent < 0 else extent for extent in shape))


def _owned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.copy()

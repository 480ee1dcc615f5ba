"""Run ONNX graphs in OpenVINO on the CPU.

The graph is compiled for each input shape that comes: with a fixed batch it runs up to a fifth faster.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from spach_deploy.bundle.store import GRAPH, OPENVINO_MODEL
from spach_deploy.common.errors import MissingPackageError, UnavailableError, UsageError, printable
from spach_deploy.common.files import utf8_path
from spach_deploy.common.versions import old_package
from spach_deploy.runtime import TensorSpec
from spach_deploy.runtime.batching import Arrays, BatchLimits, Feeds, check_feeds, run_in_batches

if TYPE_CHECKING:
    from typing_extensions import Self

    from spach_deploy.bundle.store import Bundle


class OpenVinoRunner:
    """Runs an ONNX graph. `threads` None lets OpenVINO choose. `max_batch`: larger batches are split; None never
    splits.

    `precision_hint`: OpenVINO's INFERENCE_PRECISION_HINT, f32 or bf16; OpenVINO's own default is bfloat16 where the CPU
    has it. Entering raises MissingPackageError without openvino, and UsageError for a graph that OpenVINO cannot read.
    """

    name, device = "OpenVINO (CPU)", "cpu"

    def __init__(
        self, model: Path, *, threads: int | None = None, precision_hint: str = "f32", max_batch: int | None = None
    ) -> None:
        self._model = model
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision_hint,
            **({} if threads is None else {"INFERENCE_NUM_THREADS": threads}),
        }
        self._max_batch = max_batch
        self._core: Any = None
        self._requests: dict[tuple[tuple[int, ...], ...], Any] = {}
        self.input_specs: Mapping[str, TensorSpec] = {}
        self.output_specs: Mapping[str, TensorSpec] = {}

    def __enter__(self) -> Self:
        self._core = _import_openvino().Core()
        model = self._read()
        self.input_specs = {port.get_any_name(): _spec(port) for port in model.inputs}
        self.output_specs = {port.get_any_name(): _spec(port) for port in model.outputs}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._requests.clear()
        self._core = None

    def run(self, feeds: Feeds) -> Arrays:
        """Outputs of `feeds`; larger batches are split into equal ones, so that only one shape is compiled."""
        check_feeds(self.name, self.input_specs, feeds)
        leading, count = next(iter(self.input_specs.values())).shape[0], len(next(iter(feeds.values())))
        size = leading or min(count, self._max_batch or count)
        return run_in_batches(self._run_once, feeds, BatchLimits(size, size))

    def _run_once(self, feeds: Arrays) -> Arrays:
        shapes = {name: array.shape for name, array in feeds.items()}
        key = tuple(shapes.values())
        if key not in self._requests:
            self._requests[key] = self._compiled(shapes)
        results = self._requests[key].infer(dict(feeds))
        return {output: np.array(results[output]) for output in self.output_specs}

    def _compiled(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        model = self._read()
        try:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            return self._core.compile_model(model, "CPU", self._settings).create_infer_request()
        except RuntimeError as error:
            raise UnavailableError(f"OpenVINO does not compile {self._model}: {_reason(error)}.") from error

    def _read(self) -> Any:
        try:
            with utf8_path(self._model) as path:
                return self._core.read_model(path)
        except RuntimeError as error:
            hint = "Give an ONNX file such as model.onnx."
            raise UsageError(f"{self._model} does not load in OpenVINO: {_reason(error)}.", hint) from error


def runner_of(bundle: Bundle, *, threads: int | None = None, max_batch: int | None = None) -> OpenVinoRunner:
    """What OpenVINO runs of a bundle: the OpenVINO model that it holds, or its graph, in the precision that --target
    cpu chose.
    """
    cpu = bundle.manifest.cpu
    hint = "f32" if cpu is None else cpu.chosen.settings.get("INFERENCE_PRECISION_HINT", "f32")
    model = bundle.file(OPENVINO_MODEL if OPENVINO_MODEL in bundle.manifest.files else GRAPH)
    return OpenVinoRunner(model, threads=threads, precision_hint=hint, max_batch=max_batch)


def _import_openvino() -> Any:
    try:
        found = importlib.import_module("openvino")
    except ImportError as error:
        install = "pip install 'spach-deploy[openvino]'"
        raise MissingPackageError("openvino", "Running a graph in OpenVINO", install) from error
    if (old := old_package("openvino")) is not None:
        raise old
    return found


def _spec(port: Any) -> TensorSpec:
    shape = tuple(extent.get_length() if extent.is_static else None for extent in port.get_partial_shape())
    return TensorSpec(str(port.get_element_type().to_dtype()), shape)


def _reason(error: RuntimeError) -> str:
    """The last line of OpenVINO's message that has words; those before say where in its source it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[-1].rstrip(".")) if lines else type(error).__name__

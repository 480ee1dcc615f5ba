"""The largest |x| of every tensor of an FP32 graph over given images, measured in ONNX Runtime.

Each tensor's minimum and maximum are computed by nodes added to the graph, so only scalars leave it and memory does not
grow with the number of images. Outputs of views and softmax are not measured; their ranges follow. ReduceMax and
ReduceMin may skip NaN, so a batch whose outputs are not finite runs again with ReduceSum, which does not.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.common.errors import ImageError, MissingPackageError
from spach_deploy.common.files import utf8_path
from spach_deploy.graph.editing import is_marked_float32, made_values, name_of, tensor_of
from spach_deploy.graph.precision.formats import FLOAT, infer_all_types, is_view, shown
from spach_deploy.runtime.onnxruntime_runner import NOT_SPINNING, UNPACKED, new_session, saved_graph

Arrays = Mapping[str, NDArray[Any]]

BOUNDED = {"Softmax": 1.0}
"""By operator: the largest |x| that its results can have."""

_EXTREMES = ("ReduceMax", "ReduceMin")
_SUM = ("ReduceSum",)
_ERRORS_ONLY = 3  # ONNX Runtime's severity


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Largest |x| by tensor, in the order of the graph; inf or NaN where a tensor was not finite.

    `images`: on how many it was measured. `source`: on which, in words for the report, such as "the 8 built-in
    photographs".
    """

    max_abs: Mapping[str, float]
    images: int
    source: str = ""

    def completed(self, model: ir.Model) -> Ranges:
        """These ranges and those that follow from them: of views and of bounded operators; in the order of `model`."""
        known = dict(self.max_abs)
        for node in model.graph:
            for name in map(name_of, node.outputs):
                value = _bound(node, name, known)
                if value is not None:
                    known[name] = value
        values = (*model.graph.inputs, *made_values(model.graph))
        ordered = {name: known[name] for name in map(name_of, values) if name in known}
        return dataclasses.replace(self, max_abs=ordered)

    @property
    def first_non_finite(self) -> str | None:
        """The first tensor, in the order of the graph, that was not finite."""
        return next((name for name, value in self.max_abs.items() if not np.isfinite(value)), None)


class RangeMeter:
    """Runs a graph batch by batch and keeps the largest |x| of its tensors.

    `tensors` None measures every FP32 tensor whose range typing needs: all but those that only nodes marked FP32 make
    and read. The graph's inputs and outputs are measured in any case. `threads` None lets ONNX Runtime choose. Raises
    MissingPackageError without onnxruntime.
    """

    def __init__(self, model: ir.Model, *, tensors: Iterable[str] | None = None, threads: int | None = None) -> None:
        self._model = model
        self._threads = threads
        self._outputs = [name_of(value) for value in model.graph.outputs]
        self._tensors = tuple(measurable(model) if tensors is None else tensors)
        self._max_abs: dict[str, float] = {}
        self._images = 0
        self._session = open_probed(model, self._tensors, _EXTREMES, threads)

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run one batch, by input name, and add its ranges; returns the graph's own outputs by name."""
        # Copied, because a result of ONNX Runtime keeps the whole memory pool of its session alive.
        results = [np.array(result) for result in self._session.run(None, dict(feeds))]
        outputs = dict(zip(self._outputs, results, strict=False))
        self._add(_largest(feeds))
        self._add(_largest(outputs))
        scalars = np.abs(np.array(results[len(self._outputs) :], np.float64)).reshape(-1, len(_EXTREMES))
        self._add(dict(zip(self._tensors, scalars.max(axis=1).tolist(), strict=True)))
        if not all(np.isfinite(value).all() for value in outputs.values()):
            self._add(self._find_nan(feeds))
        self._images += len(next(iter(feeds.values())))
        return outputs

    def ranges(self, source: str = "") -> Ranges:
        """The ranges over all batches so far, those of views included."""
        return Ranges(dict(self._max_abs), self._images, source).completed(self._model)

    def _add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._max_abs[name] = float(np.maximum(self._max_abs.get(name, 0.0), value))

    def _find_nan(self, feeds: Arrays) -> dict[str, float]:
        session = open_probed(self._model, self._tensors, _SUM, self._threads)
        sums = session.run(None, dict(feeds))[len(self._outputs) :]
        return {name: float("nan") for name, total in zip(self._tensors, sums, strict=True) if np.isnan(total)}


def _bound(node: ir.Node, name: str, known: Mapping[str, float]) -> float | None:
    """The largest |x| of an output of `node` that follows from its operator or inputs; None where none follows."""
    if node.op_type in BOUNDED:
        return BOUNDED[node.op_type]
    sources = shown(node) if is_view(node) else ()
    moved = [value for value in sources if not value.is_initializer()]
    if sources and not moved and sources[0].dtype == FLOAT:
        return max(_largest_weight(value) for value in sources)
    if name in known or not moved or not all(name_of(value) in known for value in moved):
        return None
    return max(known[name_of(value)] for value in moved)


def _largest_weight(value: ir.Value) -> float:
    return float(np.abs(tensor_of(value).numpy()).max(initial=0.0))


def _largest(arrays: Arrays) -> dict[str, float]:
    return {name: float(np.abs(value).max()) for name, value in arrays.items() if value.dtype.kind == "f"}


def measure_ranges(model: ir.Model, feeds: Iterable[Arrays], *, source: str = "", threads: int | None = None) -> Ranges:
    """Largest |x| of every tensor of the FP32 graph `model` over `feeds`, each one batch by input name.

    Batches of a few images keep memory small. Raises ImageError when `feeds` is empty, MissingPackageError without
    onnxruntime. A tensor that is not finite is recorded here; `type_graph` raises PrecisionError for it.
    """
    meter = RangeMeter(model, threads=threads)
    count = sum(1 for batch in feeds if meter.run(batch))
    if not count:
        raise ImageError("No images were given to measure ranges on.", "Give a folder of images with --images DIR.")
    return meter.ranges(source)


def measurable(model: ir.Model) -> Iterator[str]:
    """Names of the FP32 tensors that must be measured.

    Not outputs of views and of bounded operators, nor tensors that only nodes marked FP32 make and read.
    """
    infer_all_types(model)
    for node in model.graph:
        if node.op_type in BOUNDED or is_view(node):
            continue
        for value in node.outputs:
            readers = value.consumers()
            inner = is_marked_float32(node) and readers and all(map(is_marked_float32, readers))
            if value.dtype == FLOAT and not inner:
                yield name_of(value)


def open_probed(model: ir.Model, tensors: Iterable[str], operators: tuple[str, ...], threads: int | None) -> Any:
    """An ONNX Runtime session with the outputs of `model`, and after them each of `operators` of each of `tensors`.

    The operators are reductions, and their results scalars. `model` is not copied: the additional nodes are a second
    protobuf, written after the first into one file, which a parser reads as one merged message.
    """
    probes = [_probe(name, operator) for name in tensors for operator in operators]
    return open_session(model, more_outputs(model, [probe.outputs[0] for probe in probes], probes), threads=threads)


def _probe(name: str, operator: str) -> ir.Node:
    result = ir.val(f"{name}/{operator}", FLOAT, [])
    return ir.node(operator, [ir.val(name)], {"keepdims": 0}, outputs=[result], name=result.name)


def more_outputs(model: ir.Model, outputs: Sequence[ir.Value], nodes: Iterable[ir.Node] = ()) -> ir.Model:
    """A graph that, merged into `model` as protobuf, adds `outputs` to it, and the `nodes` that make them."""
    return ir.Model(ir.Graph([], outputs, nodes=nodes), ir_version=model.ir_version)


def open_session(*models: ir.Model, threads: int | None = None, plain: bool = False) -> Any:
    """An ONNX Runtime session on the CPU, of one graph or of several to be merged as protobuf.

    `plain`: fuse no nodes. `threads` None lets ONNX Runtime choose. Raises MissingPackageError without onnxruntime.
    """
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingPackageError(
            "onnxruntime", "Measuring the ranges of tensors", "pip install 'spach-deploy[cpu]'"
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry(*NOT_SPINNING)
    options.add_session_config_entry(*UNPACKED)
    # Reductions run as soon as they can. In the default order they run last, and all tensors stay in memory until then.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if threads is not None:
        options.intra_op_num_threads = threads
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with saved_graph(*models) as path, utf8_path(path) as name:
        return new_session(name, options, ["CPUExecutionProvider"])

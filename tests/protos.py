"""Functions on `onnx_ir` models for tests that have messages, where anything can be planted."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from spach_deploy.graph.editing import FLOAT32_KEY, made_values, name_of
from spach_deploy.graph.editing import as_proto as message
from spach_deploy.graph.precision import formats, ranges, rounding, typed_graph
from spach_deploy.graph.precision.decision import PrecisionPolicy
from spach_deploy.graph.precision.formats import decode as _decode
from spach_deploy.options.specs import Precision
from spach_deploy.quantization import calibration, equalization, qdq, quantize, shards, sites, statistics
from spach_deploy.quantization.fake_quantization import CorrectBiases
from spach_deploy.quantization.outlier_migration import MigrateOutliers
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.validation import external_graph
from spach_deploy.validation.bisect import locate as locating
from tests.outputs import classifier

R = TypeVar("R")


# Messages themselves


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """Node that makes each tensor."""
    return {output: node for node in graph.node for output in node.output}


def consumers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Nodes that read each tensor."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            readers[name].append(node)
    return readers


def initializers(graph: GraphProto) -> dict[str, TensorProto]:
    """Constant tensors by name."""
    return {tensor.name: tensor for tensor in graph.initializer}


def attributes(node: NodeProto) -> dict[str, object]:
    """Attributes as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def constant(name: str, value: NDArray[np.generic]) -> TensorProto:
    """An initializer."""
    return numpy_helper.from_array(np.ascontiguousarray(value), name)


def mark_float32(node: NodeProto) -> NodeProto:
    """Ask the precision step to leave this node in FP32."""
    entry = node.metadata_props.add()
    entry.key, entry.value = FLOAT32_KEY, "fp32"
    return node


def remove_unused_initializers(graph: GraphProto) -> None:
    """Drop constants that no node reads."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    unused = [i for i, tensor in enumerate(graph.initializer) if tensor.name not in used]
    for index in reversed(unused):
        del graph.initializer[index]


# Functions on models


def decode(tensor: onnx.TensorProto) -> Any:
    """Values of an initializer, float32."""
    return _decode(ir.serde.deserialize_tensor(tensor))


def in_place(function: Callable[..., R], proto: ModelProto, *arguments: Any) -> R:
    """Let `function`, which changes a model in place, change `proto`; what it returned."""
    model = ir.from_proto(proto)
    result = function(model, *arguments)
    proto.CopyFrom(message(model))
    return result


def _read(function: Callable[..., R]) -> Callable[..., R]:
    """The function with messages for models, which it does not change."""

    def call(*arguments: Any, **options: Any) -> R:
        given = [ir.from_proto(entry) if isinstance(entry, ModelProto) else entry for entry in arguments]
        return function(*given, **options)

    return call


@dataclasses.dataclass(frozen=True)
class TypedGraph:
    """`typed_graph.TypedGraph` with a message."""

    model: ModelProto
    policy: PrecisionPolicy


def type_graph(model: ModelProto, precision: Precision, *arguments: Any) -> TypedGraph:
    """`typed_graph.type_graph`; what gives the graph itself back gives the same message back."""
    given = ir.from_proto(model)
    typed = typed_graph.type_graph(given, precision, *arguments)
    return TypedGraph(model if typed.model is given else message(typed.model), typed.policy)


measure_ranges = _read(ranges.measure_ranges)
RangeMeter = _read(ranges.RangeMeter)
measurable = _read(ranges.measurable)
open_session = _read(ranges.open_session)
weighted_layers = _read(formats.weighted_layers)
find_sites = _read(sites.find_sites)
find_pairs = _read(equalization.find_pairs)
candidates = _read(quantize.candidates)
plan_from_statistics = _read(quantize.plan_from_statistics)
Collector = _read(statistics.Collector)
audit = _read(qdq.audit)
collect = _read(calibration.collect)
collect_in_parts = _read(shards.collect_in_parts)
collect_on_cluster = _read(shards.collect_on_cluster)
bisect_graph = _read(locating.bisect_graph)
locate = _read(locating.locate)
apply_to_graph = functools.partial(in_place, equalization.apply_to_graph)
equalize_graph = functools.partial(in_place, quantize.equalize_graph)
mark_sites = functools.partial(in_place, quantize.mark_sites)


def is_marked_float32(node: onnx.NodeProto) -> bool:
    """Whether `mark_float32` was asked for this node."""
    return any((entry.key, entry.value) == (FLOAT32_KEY, "fp32") for entry in node.metadata_props)


def rounded_graph(typed: ModelProto) -> ModelProto:
    """`rounding.rounded_graph`."""
    return message(rounding.rounded_graph(ir.from_proto(typed)))


def element_types(model: ModelProto) -> dict[str, int]:
    """Of every tensor, as ONNX numbers them."""
    known = ir.from_proto(model)
    formats.infer_all_types(known)
    graph = known.graph
    values = (*graph.inputs, *graph.initializers.values(), *made_values(graph))
    return {name_of(value): value.dtype for value in values if value.dtype is not None}


def correct_biases(model: ModelProto, plan: Any) -> bool:
    """Biases corrected in place; whether any was."""
    return in_place(CorrectBiases(plan), model).modified


def migrate_outliers(model: ModelProto, known: Any, form: Any, margin: float) -> tuple[str, ...]:
    """Outliers migrated in place; names of the pairs."""
    return in_place(MigrateOutliers(known, form, margin).call, model).pairs


def insert_qdq(typed: ModelProto, plan: Any) -> ModelProto:
    """A graph with the pairs of `plan`."""
    return message(qdq.InsertQdq(plan)(ir.from_proto(typed)).model)


def quantize_typed(typed: ModelProto, plan: Any) -> ModelProto:
    """The same, audited."""
    return message(quantize.quantize_typed(ir.from_proto(typed), plan))


@dataclasses.dataclass(frozen=True)
class QuantizedGraph:
    """`quantize.QuantizedGraph` with a message."""

    model: ModelProto
    plan: QuantizationPlan


def quantize_graph(model: ModelProto, *arguments: Any, **options: Any) -> QuantizedGraph:
    """`quantize.quantize_graph`."""
    made = quantize.quantize_graph(ir.from_proto(model), *arguments, **options)
    return QuantizedGraph(message(made.model), made.plan)


def map_interface(
    graph: ModelProto, num_classes: int, pixel_shape: tuple[int, int, int]
) -> external_graph.MatchedGraph:
    """`external_graph.map_interface`."""
    return external_graph.map_interface(ir.from_proto(graph), classifier(num_classes), pixel_shape)

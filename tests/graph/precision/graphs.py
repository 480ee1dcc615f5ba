"""Graphs for the tests of precision: hand-made ones, and small SPACH models whose stream is scaled."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from spach_deploy.graph.editing import owner
from spach_deploy.graph.passes.group_norm import split_group_norm
from spach_deploy.graph.passes.shift_depthwise import shift_depthwise
from spach_deploy.graph.precision.decision import KeptFp32
from spach_deploy.graph.precision.ranges import Ranges
from tests.protos import TypedGraph, constant, in_place, initializers, measure_ranges
from tests.static_models import canonical_bytes, images

Array = NDArray[Any]

KINDS = ("hybrid", "hybrid_stem", "mlp", "ms_mlp")
"""Small models that have every kind of node between them."""


def node(op_type: str, inputs: Sequence[str], name: str, outputs: Sequence[str] = (), **options: Any) -> NodeProto:
    """A node called `name`, with an output of that name unless others are given."""
    return helper.make_node(op_type, list(inputs), list(outputs) or [name], name=name, **options)


def graph(
    nodes: Iterable[NodeProto],
    outputs: Iterable[str],
    width: int = 4,
    element_type: int = TensorProto.FLOAT,
    **constants: Array,
) -> ModelProto:
    """A model: `input` (batch, width) -> outputs of unknown shape; keyword names have `__` for a dot."""
    inputs = [helper.make_tensor_value_info("input", element_type, ["batch", width])]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    weights = [constant(name.replace("__", "."), value) for name, value in constants.items()]
    made = helper.make_graph(list(nodes), "test", inputs, results, weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def array(*values: float) -> NDArray[np.float32]:
    """A float32 vector."""
    return np.array(values, np.float32)


def feed(*rows: Sequence[float]) -> dict[str, Array]:
    """One batch for the input."""
    return {"input": np.array(rows, np.float32)}


def measured(model: ModelProto, *rows: Sequence[float]) -> Ranges:
    """Ranges over one batch."""
    return measure_ranges(model, [feed(*rows)], threads=1)


def types_of(model: ModelProto) -> dict[str, str]:
    """fp32, fp16, bf16 of every tensor that a node makes, by full inference, which mixed types would fail."""
    names = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.output)
    return {v.name: names.get(v.type.tensor_type.elem_type, "other") for v in values}


@functools.cache
def _target_bytes(kind: str, scale: float) -> bytes:
    model = onnx.load_from_string(canonical_bytes(kind))
    scale_stream(model, scale)
    in_place(split_group_norm, model)
    in_place(shift_depthwise, model)
    content: bytes = model.SerializeToString()
    return content


def target_graph(kind: str, scale: float = 1.0) -> ModelProto:
    """The FP32 graph of a small model in its form for TensorRT, its token stream `scale` times as large as it was."""
    return onnx.load_from_string(_target_bytes(kind, scale))


def scale_stream(model: ModelProto, scale: float) -> None:
    """Multiply the token stream by `scale`; what the model computes stays the same.

    What writes into the stream is scaled: norm1 behind the stem, the last layer of each branch, GroupNorm. LayerNorm at
    the start of each branch and before the head divides the scale out again.
    """
    weights = initializers(model.graph)
    for name in {name for n in model.graph.node for name in n.input if _writes_the_stream(n, name, weights)}:
        values = numpy_helper.to_array(weights[name]) * np.float32(scale)
        weights[name].CopyFrom(constant(name, values))


def _writes_the_stream(reader: NodeProto, name: str, weights: dict[str, TensorProto]) -> bool:
    tensor = weights.get(name)
    if tensor is None or tensor.data_type != TensorProto.FLOAT:
        return False
    path = owner(reader.name)
    if path.endswith(".cpe_net.net.1"):
        return name.endswith(".bias")
    return (
        path == "norm1"
        or path.endswith((".channel_func.fc2", ".spatial_func.proj", ".net.1.1"))
        or (name.endswith("gamma_1"))
    )


def batches(count: int = 8, size: int = 4) -> list[dict[str, Array]]:
    """Images for a small SPACH model, in batches."""
    return [{"input": images(size, seed)} for seed in range(count // size)]


def kept_for(typed: TypedGraph, reason: str) -> tuple[KeptFp32, ...]:
    """Nodes of a typed graph that stay in FP32 for one reason."""
    return tuple(kept for kept in typed.policy.kept if kept.reason == reason)

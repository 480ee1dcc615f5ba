"""Facts of nodes and tensors: element types, which operators only move numbers, which precision a layer asks for."""

from __future__ import annotations

import dataclasses

import onnx
import onnx_ir as ir

from spach_deploy.common.errors import PrecisionError
from spach_deploy.graph.editing import made_values, name_of, operand, without_weights
from spach_deploy.graph.names import owner
from spach_deploy.graph.precision.formats import FP16, decode

VIEWS = frozenset(
    ("Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Concat", "Pad")
)
"""Operators that move numbers and compute none: their outputs lie within the range of their inputs."""

_INTEGERS = frozenset((ir.DataType.INT8, ir.DataType.UINT8))


def infer_types(model: ir.Model) -> tuple[str, ...]:
    """Set the element type of every node's outputs, in place; returns the names of those that onnx cannot infer."""
    inferred = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    values = (*inferred.value_info, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    for value in made_values(model.graph):
        dtype = ir.DataType(types.get(name_of(value), ir.DataType.UNDEFINED))
        value.type = ir.TensorType(dtype) if dtype else None
    return tuple(name_of(value) for value in made_values(model.graph) if value.dtype is None)


def infer_all_types(model: ir.Model) -> None:
    """Set the element type of every node's outputs, in place. Raises PrecisionError for one that cannot be inferred."""
    unknown = infer_types(model)
    if unknown:
        raise PrecisionError(f"The element type of {unknown[0]} cannot be told, so the graph cannot be typed.")


def quantizes_fp16(model: ir.Model) -> bool:
    """Whether `model` quantizes FP16 to integers, which some ONNX Runtimes do by truncation (`runtime.truncation`).

    A tensor whose type onnx cannot infer does not count as FP16.
    """
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    if quantizers:
        infer_types(model)
    return any(operand(node, 0).dtype == FP16.dtype and node.outputs[0].dtype in _INTEGERS for node in quantizers)


def is_view(node: ir.Node) -> bool:
    """Whether `node` only moves numbers. A Pad does if it pads with zeros."""
    added = node.inputs[2] if node.op_type == "Pad" and len(node.inputs) > 2 else None
    if added is None:
        return node.op_type in VIEWS
    return added.const_value is not None and not decode(added.const_value).any()


def shown(view: ir.Node) -> tuple[ir.Value, ...]:
    """The inputs of a view whose numbers it moves: all of a Concat, the first of any other."""
    inputs = view.inputs if view.op_type == "Concat" else view.inputs[:1]
    return tuple(value for value in inputs if value is not None)


KINDS = {
    "Gemm": "linear",
    "MatMul": "product",
    "Einsum": "product",
    "Conv": "convolution",
    "ConvTranspose": "convolution",
}
"""By operator that multiplies: what a report calls such a layer."""

_NAMES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
}


@dataclasses.dataclass(frozen=True)
class LayerPrecision:
    """One matrix product or convolution, and the precision that the graph states for its inputs.

    `asked`: fp32, fp16, bf16, int8 or fp8; empty where it cannot be inferred.
    """

    node: str
    module: str
    kind: str
    asked: str


def weighted_layers(model: ir.Model) -> tuple[LayerPrecision, ...]:
    """All matrix products and convolutions, in the order of the graph.

    One whose first input a DequantizeLinear makes counts as int8 or fp8.
    """
    infer_types(model)
    return tuple(
        LayerPrecision(name_of(node), owner(name_of(node)), KINDS[node.op_type], _precision(operand(node, 0)))
        for node in model.graph
        if node.op_type in KINDS
    )


def _precision(value: ir.Value) -> str:
    made = value.producer()
    stored = operand(made, 0) if made is not None and made.op_type == "DequantizeLinear" else value
    return _NAMES.get(stored.dtype or ir.DataType.UNDEFINED, "")

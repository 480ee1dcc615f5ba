"""What the typing of a graph asks of its nodes and tensors: element types, and which operators only move numbers.

The precision of every weighted layer, as a typed graph states it: what a compiler is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from spach_deploy.common.errors import PrecisionError
from spach_deploy.graph.edit import initializers
from spach_deploy.graph.names import owner
from spach_deploy.graph.precision.formats import FP16, decode, is_float

VIEWS = frozenset(
    ("Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Concat", "Pad")
)
"""Operators that move numbers and compute none: what they make lies within the range of what they read."""

_INTEGERS = frozenset((int(TensorProto.INT8), int(TensorProto.UINT8)))


def element_types(model: ModelProto) -> dict[str, int]:
    """ONNX element type of every tensor: inputs, constants and what nodes make.

    Raises PrecisionError for a tensor whose type cannot be told.
    """
    types = _known_types(model)
    unknown = [name for node in model.graph.node for name in node.output if name and not types.get(name)]
    if unknown:
        raise PrecisionError(f"The element type of {unknown[0]} cannot be told, so the graph cannot be typed.")
    return types


def _known_types(model: ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    types = {value.name: int(value.type.tensor_type.elem_type) for value in values}
    types.update((tensor.name, int(tensor.data_type)) for tensor in model.graph.initializer)
    return types


def quantizes_fp16(model: ModelProto) -> bool:
    """Whether integers are made of FP16 in `model`, which some ONNX Runtimes truncate (`runtime.truncation`).

    What ONNX cannot tell the type of counts as something else.
    """
    forth = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    if not forth:
        return False
    types = _known_types(model)
    return any(types.get(node.input[0]) == FP16.onnx_type and types.get(node.output[0]) in _INTEGERS for node in forth)


def without_weights(model: ModelProto) -> ModelProto:
    """The graph with its floating-point constants as inputs: types do not depend on their values."""
    light = ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    graph = light.graph
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if is_float(tensor.data_type):
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            graph.initializer.append(tensor)
    return light


def is_view(node: NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    """Whether `node` only moves numbers. Padding counts when what it adds is zero."""
    if node.op_type != "Pad" or len(node.input) < 3 or not node.input[2]:
        return node.op_type in VIEWS
    value = constants.get(node.input[2])
    return value is not None and not decode(value).any()


def view_sources(model: ModelProto) -> dict[str, tuple[str, ...]]:
    """For every tensor that a view makes, the tensors it shows."""
    constants = initializers(model.graph)
    return {
        output: tuple(node.input) if node.op_type == "Concat" else (node.input[0],)
        for node in model.graph.node
        if is_view(node, constants)
        for output in node.output
    }


KINDS = {
    "Gemm": "linear",
    "MatMul": "product",
    "Einsum": "product",
    "Conv": "convolution",
    "ConvTranspose": "convolution",
}
"""Operators that carry the arithmetic, in words."""

_NAMES = {
    int(TensorProto.FLOAT): "fp32",
    int(TensorProto.FLOAT16): "fp16",
    int(TensorProto.BFLOAT16): "bf16",
    int(TensorProto.INT8): "int8",
    int(TensorProto.UINT8): "int8",
    int(TensorProto.FLOAT8E4M3FN): "fp8",
}


@dataclasses.dataclass(frozen=True)
class LayerPrecision:
    """One matrix product or convolution. `asked`: fp32, fp16, bf16, int8 or fp8; empty where it cannot be told."""

    node: str
    module: str
    kind: str
    asked: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def weighted_layers(model: ModelProto) -> tuple[LayerPrecision, ...]:
    """All of them in the order of the graph. Inputs that come out of eight bits make a layer one of eight bits."""
    inferred = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    types = {value.name: int(value.type.tensor_type.elem_type) for value in values}
    types.update((tensor.name, int(tensor.data_type)) for tensor in model.graph.initializer)
    stored = {node.output[0]: types.get(node.input[0], 0) for node in model.graph.node if _widens(node)}
    return tuple(
        LayerPrecision(node.name, owner(node.name), KINDS[node.op_type], _precision(node, types, stored))
        for node in model.graph.node
        if node.op_type in KINDS
    )


def _widens(node: NodeProto) -> bool:
    return node.op_type == "DequantizeLinear"


def _precision(node: NodeProto, types: dict[str, int], stored: dict[str, int]) -> str:
    first = node.input[0]
    return _NAMES.get(stored.get(first, types.get(first, 0)), "")

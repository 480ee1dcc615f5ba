"""The precision of every weighted layer, as a typed graph states it: what a compiler is asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from spach_deploy.onnx_graph.names import owner
from spach_deploy.precision.elements import without_weights

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

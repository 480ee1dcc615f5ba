"""The 16-bit number formats FP16 and bfloat16, and the element types of nodes and tensors.

FP16 is IEEE 754 binary16. bfloat16 is the upper half of binary32. Both are rounded to nearest, ties to even, and what
is beyond the largest finite number becomes infinite, as on a GPU. NumPy converts; if PyTorch is loaded already, it
converts FP16, to the same bits in less time.

Of nodes and tensors: element types, which operators only move numbers, which precision a layer asks for.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.common.errors import PrecisionError
from spach_deploy.graph.editing import made_values, name_of, operand, owner, without_weights
from spach_deploy.options.specs import Precision

Float32 = NDArray[np.float32]
Bits = NDArray[np.uint16]

FLOAT = ir.DataType.FLOAT


@dataclasses.dataclass(frozen=True)
class HalfFormat:
    """A 16-bit format.

    `limit`: largest finite number. `roundoff`: largest relative error of rounding a normal number. `encode`: float32
    values to the format's bits, uint16. `decode`: bits to float32.
    """

    name: str
    dtype: ir.DataType
    limit: float
    smallest_normal: float
    roundoff: float
    encode: Callable[[Float32], Bits] = dataclasses.field(repr=False)
    decode: Callable[[Bits], Float32] = dataclasses.field(repr=False)

    def round(self, values: Float32) -> Float32:
        """`values` rounded to this format, as float32."""
        return self.decode(self.encode(values))

    def tensor(self, name: str, bits: Bits) -> ir.TensorProtocol:
        """`bits` as the data of an initializer, without a copy."""
        return ir.Tensor(bits.view(self.dtype.numpy()), self.dtype, name=name)


def _encode_fp16(values: Float32) -> Bits:
    if (torch := _torch_for(values)) is not None:
        half: Bits = torch.from_numpy(values).half().numpy().view(np.uint16)
        return half
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16).view(np.uint16)


def _decode_fp16(bits: Bits) -> Float32:
    if (torch := _torch_for(bits)) is not None:
        values: Float32 = torch.from_numpy(bits.view(np.float16)).float().numpy()
        return values
    return bits.view(np.float16).astype(np.float32)


def _torch_for(array: NDArray[Any]) -> Any:
    """The torch module if it is loaded and can share the memory of `array`, else None.

    An array that is not writeable gives None: PyTorch would warn.
    """
    return sys.modules.get("torch") if array.flags.writeable and array.flags.c_contiguous else None


def _encode_bf16(values: Float32) -> Bits:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + nearest_even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _decode_bf16(bits: Bits) -> Float32:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


FP16 = HalfFormat("fp16", ir.DataType.FLOAT16, 65504.0, 2.0**-14, 2.0**-11, _encode_fp16, _decode_fp16)
BF16 = HalfFormat(
    "bf16", ir.DataType.BFLOAT16, float(2.0**127 * (2 - 2.0**-7)), 2.0**-126, 2.0**-8, _encode_bf16, _decode_bf16
)
HALF_FORMATS = {FP16.dtype: FP16, BF16.dtype: BF16}


def half_format(precision: Precision) -> HalfFormat | None:
    """The format of FP16 or BF16, None for other precisions."""
    return {Precision.FP16: FP16, Precision.BF16: BF16}.get(precision)


def type_name(dtype: ir.DataType) -> str:
    """`fp32`, `fp16` or `bf16`."""
    return "fp32" if dtype == FLOAT else HALF_FORMATS[dtype].name


def is_float(dtype: ir.DataType | None) -> bool:
    """Whether this is FP32, FP16 or bfloat16, whose tensors typing may give another type."""
    return dtype == FLOAT or dtype in HALF_FORMATS


def decode(tensor: ir.TensorProtocol) -> Float32:
    """Values of an initializer in FP32, FP16 or bfloat16, as float32."""
    if tensor.dtype in HALF_FORMATS:
        return HALF_FORMATS[tensor.dtype].decode(tensor.numpy().view(np.uint16))
    return tensor.numpy().astype(np.float32, copy=False)


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

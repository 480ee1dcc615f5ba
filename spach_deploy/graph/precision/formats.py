"""The 16-bit number formats FP16 and bfloat16: rounding, limits, storage.

FP16 is IEEE 754 binary16. bfloat16 is the upper half of binary32. Both are rounded to nearest, ties to even, and what
is beyond the largest finite number becomes infinite, as on a GPU. NumPy converts; if PyTorch is loaded already, it
converts FP16, to the same bits in less time.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

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

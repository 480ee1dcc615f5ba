"""The two eight-bit formats: INT8, and FP8 in the E4M3 form without infinities (arXiv 2209.05433)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.options.specs import Precision

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class EightBitFormat:
    """A symmetric format: x is stored as round(x / scale), and what lies beyond `limit` becomes `limit`.

    `step` gives the distance between neighbours at |x| / scale, for magnitudes below `limit`.
    """

    name: str
    dtype: ir.DataType
    limit: float
    step: Callable[[Float64], Float64] = dataclasses.field(repr=False)

    def scale_of(self, largest: float) -> float:
        """The scale at which `largest` is the last number that is not clipped."""
        return largest / self.limit

    def noise(self, magnitude: Float64) -> Float64:
        """Expected squared error of storing numbers of `magnitude`, in units of the scale.

        Rounding errors are taken as uniform within a step, as they are where a histogram's bin spans several; what is
        below half a step becomes zero, and what is beyond the limit becomes the limit.
        """
        step = self.step(magnitude)
        rounded = np.where(magnitude < step / 2, magnitude**2, step**2 / 12)
        noise: Float64 = np.where(magnitude > self.limit, (magnitude - self.limit) ** 2, rounded)
        return noise


def _integer_step(magnitude: Float64) -> Float64:
    return np.ones_like(magnitude)


def _e4m3_step(magnitude: Float64) -> Float64:
    """Three bits of mantissa; below 2^-6 numbers are subnormal and 2^-9 apart."""
    exponent = np.floor(np.log2(np.maximum(magnitude, 2.0**-6)))
    step: Float64 = np.exp2(exponent - 3)
    return step


INT8 = EightBitFormat("int8", ir.DataType.INT8, 127.0, _integer_step)
FP8 = EightBitFormat("fp8", ir.DataType.FLOAT8E4M3FN, 448.0, _e4m3_step)


def eight_bits(precision: Precision) -> EightBitFormat | None:
    """The format of a quantized precision, None for the others."""
    return {Precision.INT8: INT8, Precision.FP8: FP8}.get(precision)

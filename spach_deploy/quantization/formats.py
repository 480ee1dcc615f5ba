"""The eight-bit number formats: INT8, and FP8 as E4M3 without infinities (arXiv 2209.05433)."""

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
    """A symmetric format: x is stored as round(x / scale), clipped to `limit`.

    `step`: distance between neighbouring numbers at the magnitude |x| / scale, below `limit`.
    """

    name: str
    dtype: ir.DataType
    limit: float
    step: Callable[[Float64], Float64] = dataclasses.field(repr=False)

    def scale_of(self, largest: float) -> float:
        """The scale at which numbers up to `largest` are not clipped."""
        return largest / self.limit

    def squared_error(self, magnitude: Float64) -> Float64:
        """Expected squared error of storing numbers of `magnitude`; both in units of the scale.

        Rounding errors are assumed uniform within a step: step^2 / 12. Numbers below half a step become zero, and
        numbers beyond the limit become the limit.
        """
        step = self.step(magnitude)
        rounded = np.where(magnitude < step / 2, magnitude**2, step**2 / 12)
        error: Float64 = np.where(magnitude > self.limit, (magnitude - self.limit) ** 2, rounded)
        return error


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
    """The format of INT8 or FP8, None for other precisions."""
    return {Precision.INT8: INT8, Precision.FP8: FP8}.get(precision)

"""Round weights to a 16-bit format, count what does not fit, and say whether a tensor may be stored so.

A weight beyond the limit becomes infinite, one below the smallest number becomes zero, one below the smallest normal
number loses digits. A few small weights among large ones do not matter. A tensor that consists of small weights loses
its values, which the relative L2 of rounding shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_ir as ir

from spach_deploy.common.errors import PrecisionError
from spach_deploy.graph.editing import name_of, tensor_of
from spach_deploy.graph.precision.formats import Bits, Float32, HalfFormat, decode

LOST = 1e-2
"""Relative L2 of rounding above which a tensor stays in FP32. Weights that fit have 2e-4 in FP16, 2e-3 in BF16."""

NOTABLE_SHARE = 1e-2
"""Share of a tensor's weights that may underflow or become subnormal before a report names the tensor."""

_PIECE = 1 << 15
"""Elements that are encoded at a time: they fit a core's caches, and PyTorch converts them in one thread."""

_ADDED = {"Add": (0, 1), "Sub": (0, 1), "Gemm": (2,), "Conv": (2,), "LayerNormalization": (2,)}
"""By operator: the inputs that are added, where an underflow changes next to nothing, whatever its share."""


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """How one tensor of weights fits a format: counts of weights that do not.

    `error`: relative L2 of rounding the tensor; inf when a weight overflows.
    """

    tensor: str
    count: int
    overflow: int
    underflow: int
    subnormal: int
    max_abs: float
    error: float

    @property
    def is_notable(self) -> bool:
        """Whether a report should name it."""
        return self.overflow > 0 or self.underflow + self.subnormal > NOTABLE_SHARE * self.count

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON for the manifest; `error` is None where a weight overflows, JSON has no infinity."""
        return {**dataclasses.asdict(self), "error": None if self.overflow else self.error}


def encode(name: str, values: Float32, form: HalfFormat) -> tuple[Bits, WeightReport]:
    """`values`, float32, as bits of `form` (uint16, same shape), and the report on them.

    Works in pieces that fit the processor's caches. Raises PrecisionError when `values` are not finite.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    largest = max(float(flat.max(initial=0.0)), -float(flat.min(initial=0.0)))
    if not np.isfinite(largest):
        raise PrecisionError(f"The weights {name} hold NaN or infinity.", "Export a checkpoint that is not damaged.")
    unit = np.float32(1.0 / max(largest, 1e-30))  # keeps squares inside float32
    bits = np.empty(flat.size, np.uint16)
    sums = np.zeros(5)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE].copy()  # a graph's arrays are read-only, and PyTorch wants writeable ones
        rounded = form.encode(piece)
        bits[start : start + _PIECE] = rounded
        sums += _compare(piece, form.decode(rounded), form, unit)
    overflow, underflow, subnormal = (int(count) for count in sums[:3])
    error = float("inf") if overflow else float(np.sqrt(sums[3] / sums[4])) if sums[4] else 0.0
    report = WeightReport(name, flat.size, overflow, underflow, subnormal, largest, error)
    return bits.reshape(values.shape), report


def _compare(values: Float32, rounded: Float32, form: HalfFormat, unit: np.float32) -> tuple[float, ...]:
    """(overflows, underflows, subnormals, squared difference, squared values); squares of numbers times `unit`."""
    magnitude = np.abs(rounded)
    zeros = np.count_nonzero(magnitude == 0)
    overflow = np.count_nonzero(magnitude > form.limit)
    subnormal = np.count_nonzero(magnitude < form.smallest_normal) - zeros
    underflow = zeros - np.count_nonzero(values == 0)
    scaled = values * unit
    difference = scaled - rounded * unit
    counts = (float(overflow), float(underflow), float(subnormal))
    # Not by BLAS (np.dot), whose threads spin after it.
    return *counts, float(np.square(difference).sum()), float(np.square(scaled).sum())


class EncodedWeights:
    """Weights in a 16-bit format; each tensor is encoded once, on first use."""

    def __init__(self, form: HalfFormat, constants: Mapping[str, ir.Value]) -> None:
        self._form = form
        self._constants = constants
        self._tensors: dict[str, ir.TensorProtocol] = {}
        self.reports: dict[str, WeightReport] = {}

    def report(self, name: str) -> WeightReport:
        """How the weights called `name` fit the format. Raises PrecisionError when they are not finite in FP32."""
        if name not in self.reports:
            bits, self.reports[name] = encode(name, decode(tensor_of(self._constants[name])), self._form)
            self._tensors[name] = self._form.tensor(name, bits)
        return self.reports[name]

    def prepare(self, names: Iterable[str]) -> None:
        """Encode many tensors on all cores, in threads: NumPy releases the interpreter's lock."""
        ordered = tuple(dict.fromkeys(names))
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.report, ordered))
        # In the order of `names`, not in that in which threads ended.
        self.reports = {name: self.reports[name] for name in (*ordered, *self.reports)}

    def fits(self, node: ir.Node, name: str) -> bool:
        """Whether `node` may read the weights called `name` in this format: none overflows, and `error` is small."""
        report = self.report(name)
        places = _ADDED.get(node.op_type, ())
        added = any(name_of(node.inputs[index]) == name for index in places if index < len(node.inputs))
        return report.overflow == 0 and (added or report.error <= LOST)

    def tensor(self, name: str) -> ir.TensorProtocol:
        """The weights called `name` in this format."""
        self.report(name)
        return self._tensors[name]

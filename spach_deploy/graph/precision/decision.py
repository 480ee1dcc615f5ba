"""Decide which nodes of a graph stay in FP32 and why (`Decision`), and the record of it (`PrecisionPolicy`).

`typed_graph.py` carries the decision out. A node is computed in half precision unless one of these reasons holds:

- *marked*: an earlier pass marked it (sums of shifted products, explicit statistics, nodes for inputs and outputs).
- *statistics*: it sums over many numbers, or ranks them, and compilers keep no FP32 sums for it. LayerNormalization is
  no such node: TensorRT keeps its statistics in FP32.
- *cast*: it converts between number formats already, such as uint8 pixels to float.
- *asked*: its module matches a pattern of the caller's.
- *weight*: its weights overflow in the format, or rounding changes them by more than `LOST`.
- *range*: a number that it reads or makes, times the margin, is beyond the format's limit. Some numbers are in no
  tensor: compilers add a bias to a result that is half already, and GELU computes 2 x (seen in TensorRT RTX 1.7's
  plans).

A tensor beyond the limit is never cast to half, so all its readers stay in FP32. Their outputs are cast to half as soon
as they fit.

`encode` counts what does not fit. A weight beyond the limit becomes infinite, one below the smallest number
becomes zero, one below the smallest normal number loses digits. A few small weights among large ones do not matter. A
tensor that consists of small weights loses its values, which the relative L2 of rounding shows.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_ir as ir

from spach_deploy.common.errors import PrecisionError, UsageError
from spach_deploy.graph.editing import is_marked_float32, name_of, owner, tensor_of
from spach_deploy.graph.precision.formats import FLOAT, Bits, Float32, HalfFormat, decode, is_view
from spach_deploy.graph.precision.ranges import Ranges
from spach_deploy.options.specs import IODtype, Precision

STATISTICS = frozenset(
    ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "GlobalAveragePool",
     "InstanceNormalization", "GroupNormalization", "BatchNormalization", "LpNormalization", "CumSum", "TopK",
     "Softmax", "LogSoftmax")
)  # fmt: skip
"""Operators that are computed in FP32 whatever the ranges of their tensors."""

_BIASES = {"Gemm": 2, "Conv": 2, "LayerNormalization": 2}


@dataclasses.dataclass(frozen=True)
class TypingOptions:
    """How to type a graph.

    `margin`: by which factor numbers may exceed the measured ones. Over all 1,797 digits (a data set), tensors of a
    small trained model reached up to 3.4 times their maximum over eight of them (1.9 times that over 64). In
    ms_hybrid_s, black, white, striped and noise images reached up to 1.8 times the maximum over eight photographs.
    `keep`: patterns of module paths (`layer4.*`) that stay in FP32. `io_dtype` FP16: float inputs and outputs are fp16;
    else they stay as they are.
    """

    margin: float = 8.0
    io_dtype: IODtype = IODtype.FP32
    keep: tuple[str, ...] = ()


class Decision:
    """The nodes of an FP32 graph that stay in FP32, by name, in the order of the graph.

    The types of all tensors of `model` must be known (`formats.infer_types`). `ranges` are those of all its tensors;
    with None no node is kept for its range. Raises PrecisionError for a tensor that would become half and has no range,
    UsageError for a pattern that matches no module.
    """

    def __init__(
        self,
        model: ir.Model,
        form: HalfFormat,
        ranges: Ranges | None,
        options: TypingOptions,
    ) -> None:
        self.form, self.options = form, options
        self._max_abs = None if ranges is None else ranges.max_abs
        self._views = {node for node in model.graph if is_view(node)}
        self.kept: dict[str, KeptFp32] = {}
        self.weights = EncodedWeights(form, model.graph.initializers)
        self._check_patterns(model)
        self._keep_by_rule(model)
        self._keep_by_number(model)

    def is_fp32(self, node: ir.Node) -> bool:
        """Whether `node` stays in FP32. A view does if its maker and all its readers do, which saves casts."""
        return node.name in self.kept or (node in self._views and self._inside_island(node))

    def _inside_island(self, view: ir.Node) -> bool:
        source = view.inputs[0]
        made = None if source is None else source.producer()
        readers = view.successors()
        return made is not None and self.is_fp32(made) and bool(readers) and all(map(self._reads_fp32, readers))

    def _reads_fp32(self, reader: ir.Node) -> bool:
        if reader.name in self.kept:
            return True
        readers = reader.successors()
        return reader in self._views and bool(readers) and all(map(self._reads_fp32, readers))

    def range_of(self, tensor: str) -> float | None:
        """Largest |x| measured of a tensor; None without a measurement."""
        return None if self._max_abs is None else self._max_abs.get(tensor)

    def _passes(self, value: float) -> bool:
        return value * self.options.margin > self.form.limit

    def _keep(self, node: ir.Node, reason: str, tensor: str | None = None, value: float | None = None) -> None:
        name = name_of(node)
        self.kept[name] = KeptFp32(name, owner(name), reason, tensor, value)

    def _check_patterns(self, model: ir.Model) -> None:
        modules = {owner(name_of(node)) for node in model.graph}
        for pattern in self.options.keep:
            if not fnmatch.filter(modules, pattern):
                raise UsageError(
                    f"No module matches {pattern!r}, which was to stay in FP32.",
                    f"Modules are named like {', '.join(sorted(modules)[:3])}.",
                )

    def _keep_by_rule(self, model: ir.Model) -> None:
        for node in model.graph:
            if is_marked_float32(node):
                self._keep(node, "marked")
            elif node.op_type in STATISTICS:
                self._keep(node, "statistics")
            elif node.op_type == "Cast":
                self._keep(node, "cast")
            elif any(fnmatch.fnmatchcase(owner(name_of(node)), pattern) for pattern in self.options.keep):
                self._keep(node, "asked")

    def _keep_by_number(self, model: ir.Model) -> None:
        remaining = [node for node in model.graph if node.name not in self.kept]
        self.weights.prepare(name for node in remaining for name in _weights_of(node))
        for node in remaining:
            unfit = next((name for name in _weights_of(node) if not self.weights.fits(node, name)), None)
            if unfit is not None:
                self._keep(node, "weight", unfit, self.weights.report(unfit).max_abs)
            else:
                self._keep_by_range(node)
        order = {node.name: index for index, node in enumerate(model.graph)}
        self.kept = dict(sorted(self.kept.items(), key=lambda item: order[item[0]]))

    def _keep_by_range(self, node: ir.Node) -> None:
        if self._max_abs is None:
            return
        for name, value in self._numbers(node):
            if self._passes(value):
                self._keep(node, "range", name, self.range_of(name))
                return

    def _numbers(self, node: ir.Node) -> Iterator[tuple[str, float]]:
        """(tensor, largest |x|) of the inputs and outputs of `node`, and of what it computes on the way to them."""
        for value in node.inputs:
            if value is not None and not value.is_initializer() and value.dtype == FLOAT:
                yield name_of(value), self._known(value, node) * (2.0 if node.op_type == "Gelu" else 1.0)
        for value in node.outputs:
            if value.dtype == FLOAT:
                yield name_of(value), self._known(value, node) + _bias(node)

    def _known(self, value: ir.Value, node: ir.Node) -> float:
        assert self._max_abs is not None
        if name_of(value) not in self._max_abs:
            raise PrecisionError(
                f"No range was measured for {value.name}, which {node.name} would hold in {self.form.name}.",
                "Measure ranges on this graph.",
            )
        return self._max_abs[name_of(value)]


def _weights_of(node: ir.Node) -> Iterator[str]:
    constants = (value for value in node.inputs if value is not None and value.is_initializer())
    return (name_of(value) for value in constants if value.dtype == FLOAT)


def _bias(node: ir.Node) -> float:
    """Largest |x| of the bias of `node`, by which the result may be larger before the bias is added; 0 without one."""
    index = _BIASES.get(node.op_type)
    value = node.inputs[index] if index is not None and index < len(node.inputs) else None
    if value is None or not value.is_initializer():
        return 0.0
    return float(np.abs(decode(tensor_of(value))).max(initial=0.0))


_SUMMARY = {"marked": "products and sums in registers", "range": "for their range", "weight": "for their weights"}
"""Wording of some reasons in the summary."""


@dataclasses.dataclass(frozen=True)
class KeptFp32:
    """A node that stays in FP32.

    `reason`: marked, statistics, cast, asked, weight or range. `tensor`, `max_abs`: the tensor that is the reason, and
    its largest |x|, for weight and range.
    """

    node: str
    module: str
    reason: str
    tensor: str | None = None
    max_abs: float | None = None

    def __str__(self) -> str:
        blame = (
            ""
            if self.tensor is None
            else f" ({self.tensor}" + (")" if self.max_abs is None else f" reaches {self.max_abs:.4g})")
        )
        return f"{self.node}: {self.reason}{blame}"


@dataclasses.dataclass(frozen=True)
class WeightCounts:
    """Counts over the weights of all nodes that no rule keeps in FP32: how many there are, and how many do not fit.

    `notable`: reports of tensors that overflow, or of which more than 1 % underflow or become subnormal.
    """

    count: int = 0
    overflow: int = 0
    underflow: int = 0
    subnormal: int = 0
    notable: tuple[WeightReport, ...] = ()

    @classmethod
    def of(cls, reports: tuple[WeightReport, ...]) -> WeightCounts:
        """Sums over `reports`; the notable ones are kept whole."""
        return cls(
            count=sum(report.count for report in reports),
            overflow=sum(report.overflow for report in reports),
            underflow=sum(report.underflow for report in reports),
            subnormal=sum(report.subnormal for report in reports),
            notable=tuple(report for report in reports if report.is_notable),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON for the manifest."""
        return {**dataclasses.asdict(self), "notable": [report.to_dict() for report in self.notable]}


@dataclasses.dataclass(frozen=True)
class PrecisionPolicy:
    """The record of a typed graph's precision, for manifest and report.

    `precision`: of all that is not quantized. `quantized`: INT8, FP8 or None; `quantized_summary`: which layers, in
    words. `limit`: largest finite number of the half format, None with FP32. `nodes`: how many compute or move
    floating-point numbers, casts not counted; `half_nodes`: how many of these in half. `margin`, `ranges_source`,
    `images`: how ranges were used and on which images measured. `closest`: the tensors in half that are closest to the
    limit, with their largest |x|.
    """

    precision: Precision
    io_dtype: IODtype
    nodes: int
    half_nodes: int = 0
    casts: int = 0
    margin: float | None = None
    limit: float | None = None
    ranges_source: str | None = None
    images: int = 0
    kept: tuple[KeptFp32, ...] = ()
    weights: WeightCounts = WeightCounts()
    closest: tuple[tuple[str, float], ...] = ()
    quantized: Precision | None = None
    quantized_summary: str = ""

    @property
    def summary(self) -> str:
        """One line: precision, and how many nodes stay in FP32 for which reasons."""
        if self.quantized is not None:
            rest = dataclasses.replace(self, quantized=None)
            return f"{self.quantized_summary}, the rest {rest.summary}"
        if not self.precision.is_half:
            return "fp32"
        counts = Counter(_SUMMARY.get(kept.reason, kept.reason) for kept in self.kept)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        return f"{self.precision.value}, {self.nodes - self.half_nodes} of {self.nodes} nodes in fp32" + (
            f" ({reasons})" if reasons else ""
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON for manifest and report; nodes in FP32 are grouped by module, reason and tensor."""
        return {
            "asked": (self.quantized or self.precision).value,
            "rest": self.precision.value,
            "summary": self.summary,
            "io_dtype": self.io_dtype.value,
            "nodes": self.nodes,
            "half_nodes": self.half_nodes,
            "casts": self.casts,
            "margin": self.margin,
            "limit": self.limit,
            "ranges": {"source": self.ranges_source, "images": self.images},
            "kept": self._kept_groups(),
            "weights": self.weights.to_dict(),
            "closest": [{"tensor": tensor, "max_abs": value} for tensor, value in self.closest],
        }

    def _kept_groups(self) -> list[dict[str, Any]]:
        groups = Counter((kept.module, kept.reason, kept.tensor, kept.max_abs) for kept in self.kept)
        return [
            {"module": module, "reason": reason, "tensor": tensor, "max_abs": value, "nodes": nodes}
            for (module, reason, tensor, value), nodes in groups.items()
        ]


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

"""What was decided about precision, as the manifest and the report tell it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from spach_deploy.precision.weights import WeightReport
from spach_deploy.specs import IODtype, Precision

_SUMMARY = {"marked": "products and sums in registers", "range": "for their range", "weight": "for their weights"}
"""How the summary words some reasons."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """A node that stays in FP32.

    `reason`: marked, statistics, cast, asked, weight or range. `tensor` and its largest |x| where one is to blame.
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
    """Weights of the nodes that were judged: how many, and how many do not fit."""

    count: int = 0
    overflow: int = 0
    underflow: int = 0
    subnormal: int = 0
    notable: tuple[WeightReport, ...] = ()

    @classmethod
    def of(cls, reports: tuple[WeightReport, ...]) -> WeightCounts:
        """Sums over `reports`; those that a reader should see by name stay whole."""
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
    """Which precision was asked for, and what came of it.

    `limit`: largest finite number of the half format, None with FP32. `nodes`: those that compute or move
    floating-point numbers, casts not counted; `half_nodes`: of these in half. `closest`: the tensors in half that come
    closest to the limit, with their largest |x|. `quantized`: INT8 or FP8 for the layers that `quantized_summary`
    counts in words; `precision` is then that of all the rest.
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
    kept: tuple[Kept, ...] = ()
    weights: WeightCounts = WeightCounts()
    closest: tuple[tuple[str, float], ...] = ()
    quantized: Precision | None = None
    quantized_summary: str = ""

    def kept_for(self, reason: str) -> tuple[Kept, ...]:
        """Nodes that stay in FP32 for one reason."""
        return tuple(kept for kept in self.kept if kept.reason == reason)

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
        """Plain JSON for manifest and report; nodes that were kept are grouped by module, reason and tensor."""
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

"""How large the numbers get, against what FP16 can hold."""

from __future__ import annotations

import math
from typing import Any

from spach_deploy.report.content import Json, ReportContent
from spach_deploy.report.plots import Chart, Limit, Line, draw

LARGEST_FP16 = 65_504.0


def view(content: ReportContent) -> dict[str, Any] | None:
    """A plot of the largest magnitude by module, the tensors nearest to the limit, and what stays in FP32 for it."""
    precision = content.section("precision")
    modules = (content.report.get("trace") or {}).get("modules") or []
    limit = float(precision.get("limit") or LARGEST_FP16)
    closest = [_tensor(entry, limit) for entry in precision.get("closest") or ()]
    kept = [entry for entry in precision.get("kept") or () if entry["reason"] in ("range", "weight")]
    if not modules and not closest and not kept:
        return None
    peaks = [float(module["peak"]) for module in modules]
    return {
        "plot": draw(_chart(modules), "ranges") if modules else None,
        "peak": max(peaks, default=None),
        "peak_at": modules[peaks.index(max(peaks))]["module"] if peaks else "",
        "limit": limit,
        "fp16": LARGEST_FP16,
        "asked": str(content.report["precision"]),
        "closest": closest,
        "kept": kept,
        "source": (precision.get("ranges") or {}).get("source"),
        "margin": precision.get("margin"),
        "weights": precision.get("weights") or {},
    }


def _chart(modules: list[Json]) -> Chart:
    parts = tuple(str(module["module"]) for module in modules)
    peaks = tuple(module["peak"] for module in modules)
    line = Line("largest magnitude of the output", peaks, "ours", dots=True)
    return Chart(parts, (line,), "magnitude", (Limit("largest number of FP16, 65,504", LARGEST_FP16),))


def _tensor(entry: Json, limit: float) -> dict[str, Any]:
    peak = float(entry["max_abs"])
    times = limit / peak if peak > 0 else math.inf
    return {"tensor": entry["tensor"], "max_abs": peak, "times": times, "bits": math.log2(times)}

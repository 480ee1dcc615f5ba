"""The error along the depth of the network: where it leaves what rounding explains is where to look."""

from __future__ import annotations

from typing import Any

from spach_deploy.report.content import Json, ReportContent
from spach_deploy.report.plots import Chart, Line, draw


def view(content: ReportContent) -> dict[str, Any] | None:
    """A plot of error, noise and tolerance, and the same as a table; None where it was not measured."""
    trace = content.report.get("trace")
    modules = (trace or {}).get("modules") or []
    if not trace or not modules:
        return None
    drawn = draw(chart_of(modules), "depth")
    return {
        "what": trace["what"],
        "images": list(trace["images"]),
        "plot": drawn,
        "modules": [{**module, "is_over": _is_over(module)} for module in modules],
        "first_over": next((module["module"] for module in modules if _is_over(module)), None),
    }


def chart_of(modules: list[Json]) -> Chart:
    """Error, tolerance and noise by module."""
    parts = tuple(str(module["module"]) for module in modules)

    def values(key: str) -> tuple[float | None, ...]:
        return tuple(module[key] for module in modules)

    over = tuple(index for index, module in enumerate(modules) if _is_over(module))
    return Chart(
        parts,
        (
            Line("this graph", values("error"), "ours", dots=True, marked=over),
            Line("allowed", values("allowed"), "bound", "dashed"),
            Line("noise of FP32", values("noise"), "noise", "dotted"),
        ),
        "relative L2 of the output",
    )


def _is_over(module: Json) -> bool:
    return module["error"] is not None and not float(module["error"]) <= float(module["allowed"])

"""Where a disagreement begins: the stage, the module, the kind."""

from __future__ import annotations

from typing import Any

from spach_deploy.report.content import Json, ReportContent
from spach_deploy.report.plots import Chart, Line, draw


def view(content: ReportContent) -> dict[str, Any] | None:
    """Sentences, stages, suspects, and every module with its inherited and its own error; None without a bisection."""
    bisect = content.report.get("bisect")
    if not bisect:
        return None
    modules = [{**module, "is_over": _is_over(module)} for module in bisect["modules"]]
    return {
        "title": "Module by module" if bisect["passed"] else "Where it begins",
        "passed": bool(bisect["passed"]),
        "lines": list(bisect["lines"]),
        "first_stage": bisect.get("first_stage"),
        "stages": list(bisect["stages"]),
        "suspects": list(bisect["suspects"]),
        "modules": modules,
        "plot": draw(_chart(modules), "bisect") if modules else None,
        "unmapped": list(bisect["unmapped"]),
    }


def _chart(modules: list[dict[str, Any]]) -> Chart:
    parts = tuple(str(module["module"]) or "model" for module in modules)

    def values(key: str) -> tuple[float | None, ...]:
        return tuple(module[key] for module in modules)

    over = tuple(index for index, module in enumerate(modules) if module["is_over"] and module["local"] is not None)
    return Chart(
        parts,
        (
            Line("inherited, in the whole run", values("inherited"), "other"),
            Line("its own, given right inputs", values("local"), "ours", dots=True, marked=over),
            Line("allowed", values("allowed"), "bound", "dashed"),
        ),
        "relative L2 of the output",
    )


def _is_over(module: Json) -> bool:
    """An error that is not finite is written as null."""
    return module["local"] is None or not float(module["local"]) <= float(module["allowed"])

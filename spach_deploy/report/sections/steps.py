"""The pipeline: what each step's result differs by from the reference, what is allowed, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spach_deploy.report.content import Json, ReportContent

_PHASES = {
    "Reference": ("load the model", "read images", "run the reference", "reference, bounds (alongside)"),
    "Static model": ("rewrite the model",),
    "Exported graph": ("hash, load modules", "export the graph", "prove the graph"),
    "Calibration": ("calibrate", "choose the layers"),
    "Graph in its target's form": ("give the graph its form", "measure ranges, set types"),
    "Typed graph": ("write the graph", "derive tolerances", "validate the graph"),
    "Engine": ("engine build (alongside)", "validate the engine"),
}
"""What the export's phases belong to."""

_PROVEN = {
    "Static model": "static model",
    "Exported graph": "exported graph",
    "Graph in its target's form": "graph in its target's form",
}
"""Steps that a manifest has errors of, by its names."""

_ROUNDED = "every half tensor rounded"
_ABOUT = {
    "Reference": "PyTorch in FP32, held against FP64",
    "Static model": "einops calls are static reshapes, algebra is folded into weights",
    "Exported graph": "ONNX in FP32",
    "Calibration": "scales for eight bits",
    "Graph in its target's form": "the form in which its compiler fuses it, FP32",
}


def view(content: ReportContent) -> dict[str, Any] | None:
    """Rows of the table; phases with their time and memory."""
    rows = [*_exported(content), *_run(content)]
    phases = [phase for phase in content.manifest.get("phases") or () if phase["seconds"] >= 0.005]
    if not rows and not phases:
        return None
    longest = max((float(phase["seconds"]) for phase in phases), default=1.0)
    return {
        "rows": rows,
        "phases": [{**phase, "share": float(phase["seconds"]) / longest} for phase in phases],
        "total": sum(float(phase["seconds"]) for phase in phases if "alongside" not in phase["name"]),
    }


def _exported(content: ReportContent) -> Iterator[dict[str, Any]]:
    """The steps up to the FP32 graph, as the export proved them."""
    errors, limit = content.section("graph", "relative_l2"), content.section("graph").get("relative_l2_limit")
    noise = content.first.get("tolerances", {}).get("derivation", {}).get("noise", {})
    if noise.get("images"):
        yield _row(content, "Reference", noise["rel_l2"], None, "")
    for name, proven in _PROVEN.items():
        if name == "Graph in its target's form" and _seconds(content, "Calibration"):
            yield _row(content, "Calibration", None, None, "")
        if by_batch := errors.get(proven):
            worst = max(map(float, by_batch.values()))
            yield _row(content, name, worst, limit, "agrees" if limit is None or worst <= limit else "disagrees")
        elif name == "Exported graph" and errors:
            yield {**_row(content, name, None, None, ""), "about": "ONNX in FP32, proven in its target's form"}


def _run(content: ReportContent) -> Iterator[dict[str, Any]]:
    """What this validation ran."""
    runs = sorted(content.evidence, key=lambda item: item["level"] == "engine")
    for item in runs:
        is_rounded = _ROUNDED in item["ran"]
        step = "Engine" if item["level"] == "engine" else "Typed graph"
        row = _row(content, step, *_figures(item), "agrees" if item["passed"] else "disagrees")
        ran = {"about": item["ran"].removeprefix("typed graph, ").removeprefix("typed graph ")}
        yield {**row, **ran, **({"step": "Typed graph, rounded", "seconds": None} if is_rounded else {})}
    missing = content.report.get("engine_did_not_run")
    if missing:
        yield {**_row(content, "Engine", None, None, "did not run"), "about": missing["reason"]}


def _figures(item: Json) -> tuple[Any, Any]:
    logits: Json = next((o for o in item["comparison"]["outputs"] if o["name"] == "logits"), {})
    return logits.get("rel_l2_worst"), (item["tolerances"]["outputs"].get("logits") or {}).get("rel_l2")


def _row(content: ReportContent, step: str, error: Any, allowed: Any, verdict: str) -> dict[str, Any]:
    return {
        "step": step,
        "about": _ABOUT.get(step, ""),
        "error": error,
        "allowed": allowed,
        "verdict": verdict,
        "seconds": _seconds(content, step),
    }


def _seconds(content: ReportContent, step: str) -> float | None:
    known = {phase["name"]: float(phase["seconds"]) for phase in content.manifest.get("phases") or ()}
    found = [known[name] for name in _PHASES[step] if name in known]
    return sum(found) if found else None

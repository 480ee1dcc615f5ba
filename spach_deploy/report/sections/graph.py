"""The graph's operators, and what the compiler made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spach_deploy.report.content import ReportContent

_SHOWN = 14


def view(content: ReportContent) -> dict[str, Any] | None:
    """Operators by number, rewrites that were applied, the plan's size and kernels."""
    certificate, engine = content.section("graph", "certificate"), content.section("engine")
    if not certificate and not engine:
        return None
    operators = _bars(certificate.get("operators") or {})
    return {
        "certificate": certificate,
        "operators": operators[:_SHOWN],
        "others": operators[_SHOWN:],
        "rewrites": _rewrites(content),
        "engine": engine,
        "kernels": _bars(content.section("engine", "kernels").get("by_kind") or {}),
        "facts": content.section("engine", "kernels"),
        "build_seconds": engine.get("build_seconds"),
    }


def _bars(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """The most frequent first, each with its share of the first."""
    ordered = sorted(counts.items(), key=lambda entry: -int(entry[1]))
    return [{"name": name, "count": int(number), "share": number / ordered[0][1]} for name, number in ordered]


def _rewrites(content: ReportContent) -> list[dict[str, Any]]:
    """PyTorch rewrites with the modules that each changed and its error in FP64, then passes over the graph."""
    rewrites = content.section("graph", "rewrites")
    found = [
        {"name": name, "changed": entry["modules"], "what": "modules", "error": entry["worst_fp64"]}
        for name, entry in rewrites.items()
        if entry["modules"]
    ]
    passes = content.section("graph", "passes")
    return found + [{"name": n, "changed": c, "what": "places", "error": None} for n, c in passes.items() if c]

"""Which layer computes in which precision: what the graph asks for, and what the engine's network states."""

from __future__ import annotations

from collections import Counter
from typing import Any

from spach_deploy.report.content import Json, ReportContent
from spach_deploy.report.plots import groups_of

_REASONS = {
    "marked": "products and sums that stay in registers",
    "statistics": "means and variances",
    "cast": "casts at the boundary",
    "asked": "asked for",
    "weight": "for their weights",
    "range": "for their range",
}
"""Why nodes stay in FP32, by the policy's short names."""


def view(content: ReportContent) -> dict[str, Any] | None:
    """A strip of weighted layers in the order of the network, a table of them, and what stays in FP32."""
    precision = content.section("precision")
    if not precision:
        return None
    layers = _layers(content)
    return {
        "asked": str(precision["asked"]),
        "rest": str(precision.get("rest", precision["asked"])),
        "summary": precision["summary"],
        "layers": layers,
        "groups": _groups(layers),
        "counts": Counter(layer["dtype"] for layer in layers).most_common(),
        "is_checked": any(layer["achieved"] for layer in layers),
        "differ": [layer for layer in layers if layer["achieved"] and layer["achieved"] != layer["asked"]],
        "by_engine": content.section("engine", "layers_by_dtype"),
        "reasons": _reasons(precision),
        "nodes": (precision.get("nodes"), precision.get("half_nodes"), precision.get("casts")),
    }


def _layers(content: ReportContent) -> list[dict[str, Any]]:
    """Weighted layers with what was asked of each and what came of it."""
    achieved = content.section("engine", "layers")
    why = {entry["node"]: entry["reason"] for entry in content.section("quantization").get("kept_float") or ()}
    found = []
    for layer in content.section("precision").get("layers") or ():
        dtype = achieved.get(layer["node"])
        shown = dtype or layer["asked"]
        found.append({**layer, "achieved": dtype, "dtype": shown, "why": why.get(layer["node"], "")})
    return found


def _groups(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The strip, stage by stage."""
    stages = groups_of([str(layer["module"]) for layer in layers])
    return [{"name": stage.name, "layers": layers[stage.start : stage.stop]} for stage in stages]


def _reasons(precision: Json) -> list[dict[str, Any]]:
    """How many nodes stay in FP32 for which reason, in how many modules."""
    nodes: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for entry in precision.get("kept") or ():
        nodes[entry["reason"]] += int(entry["nodes"])
        modules[entry["reason"]] += 1
    return [
        {"reason": _REASONS.get(reason, reason), "nodes": total, "modules": modules[reason]}
        for reason, total in nodes.most_common()
    ]

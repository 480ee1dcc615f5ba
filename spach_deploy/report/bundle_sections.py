"""Sections of the page about the bundle: its graph and engine, precision, ranges, export steps, and how to do it again.

Each function takes the page's content and returns what its template shows; None leaves the section out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import structs

from spach_deploy.bundle.schema import KernelsEntry, Manifest, PeakEntry, PhaseEntry, PrecisionSection
from spach_deploy.engine.cost_model import error_in_words
from spach_deploy.graph.levels import described
from spach_deploy.options.specs import Precision
from spach_deploy.report.content import Json, ReportContent, main_output
from spach_deploy.report.plots import Chart, Limit, Line, draw, groups_of

_OPERATORS_SHOWN = 14


def graph(content: ReportContent) -> dict[str, Any] | None:
    """The graph's operators, the rewrites that were applied, and the engine's size and kernels."""
    if content.manifest is None:
        return None
    certificate, engine = content.graph.certificate, content.engine
    kernels = engine.kernels or KernelsEntry()
    operators = _bars(certificate.operators)
    return {
        "certificate": certificate,
        "blocks": described(content.graph.levels),
        "operators": operators[:_OPERATORS_SHOWN],
        "others": operators[_OPERATORS_SHOWN:],
        "rewrites": _rewrites(content),
        "engine": engine,
        "kernels": _bars(kernels.by_kind),
        "facts": kernels,
        "predicted": kernels.predicted_ms,
        "error": error_in_words(),
        "build_seconds": engine.build_seconds,
    }


def _bars(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Counts, largest first, each with its share of the largest."""
    ordered = sorted(counts.items(), key=lambda entry: -entry[1])
    return [{"name": name, "count": number, "share": number / ordered[0][1]} for name, number in ordered]


def _rewrites(content: ReportContent) -> list[dict[str, Any]]:
    """PyTorch rewrites, with the number of modules that each changed and its error in FP64; then ONNX passes."""
    found = [
        {"name": name, "changed": entry.modules, "what": "modules", "error": entry.worst_fp64}
        for name, entry in content.graph.rewrites.items()
        if entry.modules
    ]
    passes = content.graph.passes
    return found + [{"name": n, "changed": c, "what": "places", "error": None} for n, c in passes.items() if c]


_REASONS = {
    "marked": "products and sums that stay in registers",
    "statistics": "means and variances",
    "cast": "casts at the boundary",
    "asked": "asked for",
    "weight": "for their weights",
    "range": "for their range",
}
"""Why nodes stay in FP32, by the precision policy's short names."""


def precision(content: ReportContent) -> dict[str, Any] | None:
    """The precision of each layer with weights, in the order of the network, and which nodes stay in FP32."""
    if content.manifest is None:
        return None
    precision = content.manifest.precision
    layers = _layers(content.manifest)
    return {
        "asked": precision.asked.value,
        "rest": (precision.rest or precision.asked).value,
        "summary": precision.summary,
        "layers": layers,
        "groups": _layer_groups(layers),
        "counts": Counter(layer["dtype"] for layer in layers).most_common(),
        "is_checked": any(layer["achieved"] for layer in layers),
        "differ": [layer for layer in layers if layer["achieved"] and layer["achieved"] != layer["asked"]],
        "by_engine": content.engine.layers_by_dtype,
        "reasons": _reasons(precision),
        "nodes": (precision.nodes, precision.half_nodes, precision.casts),
    }


def _layers(manifest: Manifest) -> list[dict[str, Any]]:
    """Layers with weights: the precision that the graph asks for, and the one that the engine states."""
    kept = () if manifest.quantization is None else manifest.quantization.kept_float
    why = {entry.node: entry.reason for entry in kept}
    found = []
    for layer in manifest.precision.layers:
        dtype = manifest.engine.layers.get(layer.node)
        shown = {"achieved": dtype, "dtype": dtype or layer.asked, "why": why.get(layer.node, "")}
        found.append({**structs.asdict(layer), **shown})
    return found


def _layer_groups(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers by network stage."""
    stages = groups_of([str(layer["module"]) for layer in layers])
    return [{"name": stage.name, "layers": layers[stage.start : stage.stop]} for stage in stages]


def _reasons(precision: PrecisionSection) -> list[dict[str, Any]]:
    """For each reason, how many nodes in how many modules stay in FP32."""
    nodes: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for entry in precision.kept:
        nodes[entry.reason] += entry.nodes
        modules[entry.reason] += 1
    return [
        {"reason": _REASONS.get(reason, reason), "nodes": total, "modules": modules[reason]}
        for reason, total in nodes.most_common()
    ]


LARGEST_FP16 = 65_504.0


def ranges(content: ReportContent) -> dict[str, Any] | None:
    """The largest magnitude of each module, the tensors closest to FP16's limit, and what stays in FP32 for its
    range.
    """
    precision = PrecisionSection(asked=Precision.FP32) if content.manifest is None else content.manifest.precision
    modules = (content.report.get("trace") or {}).get("modules") or []
    limit = precision.limit or LARGEST_FP16
    closest = [_tensor(entry, limit) for entry in precision.closest]
    kept = [entry for entry in precision.kept if entry.reason in ("range", "weight")]
    if not modules and not closest and not kept:
        return None
    peaks = [float(module["peak"]) for module in modules]
    return {
        "plot": draw(_peak_chart(modules), "ranges") if modules else None,
        "peak": max(peaks, default=None),
        "peak_at": modules[peaks.index(max(peaks))]["module"] if peaks else "",
        "limit": limit,
        "fp16": LARGEST_FP16,
        "asked": str(content.report["precision"]),
        "closest": closest,
        "kept": kept,
        "source": precision.ranges.source,
        "margin": precision.margin,
        "weights": precision.weights,
    }


def _peak_chart(modules: list[Json]) -> Chart:
    parts = tuple(str(module["module"]) for module in modules)
    peaks = tuple(module["peak"] for module in modules)
    line = Line("largest magnitude of the output", peaks, "ours", dots=True)
    return Chart(parts, (line,), "magnitude", (Limit("largest number of FP16, 65,504", LARGEST_FP16),))


def _tensor(entry: PeakEntry, limit: float) -> dict[str, Any]:
    peak = entry.max_abs
    times = limit / peak if peak > 0 else math.inf
    return {"tensor": entry.tensor, "max_abs": peak, "times": times, "bits": math.log2(times)}


_PHASES = {
    "Reference": ("load the model", "read images", "run the reference", "reference, bounds (alongside)"),
    "Static model": ("rewrite the model",),
    "Exported graph": ("hash, load modules", "export the graph", "prove the graph"),
    "Calibration": ("calibrate", "choose the layers"),
    "Graph in its target's form": (
        "give the graph its form",
        "measure ranges",
        "set types",
        "measure ranges, set types",
    ),
    "Typed graph": ("write the graph", "derive tolerances", "validate the graph"),
    "Engine": ("engine build (alongside)", "validate the engine"),
}
"""The phases of an export that belong to each step."""

_MANIFEST_STEPS = {
    "Static model": "static model",
    "Exported graph": "exported graph",
    "Graph in its target's form": "graph in its target's form",
}
"""Steps whose errors a manifest records, by its names."""

_ROUNDED = "every half tensor rounded"
_STEP_NOTES = {
    "Reference": "PyTorch in FP32, held against FP64",
    "Static model": "einops calls are static reshapes, algebra is folded into weights",
    "Exported graph": "ONNX in FP32",
    "Calibration": "scales for eight bits",
    "Graph in its target's form": "the form in which its compiler fuses it, FP32",
}


def steps(content: ReportContent) -> dict[str, Any] | None:
    """The export's steps with their errors and limits, and its phases with time and memory."""
    rows = [*_steps_of_export(content), *_steps_of_validation(content)]
    phases = [phase for phase in _phases(content) if phase.seconds >= 0.005]
    if not rows and not phases:
        return None
    longest = max((phase.seconds for phase in phases), default=1.0)
    return {
        "rows": rows,
        "phases": [{**structs.asdict(phase), "share": phase.seconds / longest} for phase in phases],
        "total": sum(phase.seconds for phase in phases if "alongside" not in phase.name),
    }


def _phases(content: ReportContent) -> tuple[PhaseEntry, ...]:
    return () if content.manifest is None else content.manifest.phases


def _steps_of_export(content: ReportContent) -> Iterator[dict[str, Any]]:
    """The steps up to the FP32 graph, with the errors that the export measured."""
    errors, limit = content.graph.relative_l2, content.graph.relative_l2_limit
    noise = content.first.get("tolerances", {}).get("derivation", {}).get("noise", {})
    if noise.get("images"):
        yield _row(content, "Reference", noise["rel_l2"], None, "")
    for name, proven in _MANIFEST_STEPS.items():
        if name == "Graph in its target's form" and _seconds(content, "Calibration"):
            yield _row(content, "Calibration", None, None, "")
        if by_batch := errors.get(proven):
            worst = max(by_batch.values())
            yield _row(content, name, worst, limit, "agrees" if limit is None or worst <= limit else "disagrees")
        elif name == "Exported graph" and errors:
            yield {**_row(content, name, None, None, ""), "about": "ONNX in FP32, proven in its target's form"}


def _steps_of_validation(content: ReportContent) -> Iterator[dict[str, Any]]:
    """The steps that this validation ran."""
    runs = sorted(content.evidence, key=lambda item: item["level"] == "engine")
    for item in runs:
        is_rounded = _ROUNDED in item["ran"]
        step = "Engine" if item["level"] == "engine" else "Typed graph"
        row = _row(content, step, *_error_and_allowed(item), "agrees" if item["passed"] else "disagrees")
        ran = {"about": item["ran"].removeprefix("typed graph, ").removeprefix("typed graph ")}
        yield {**row, **ran, **({"step": "Typed graph, rounded", "seconds": None} if is_rounded else {})}
    missing = content.report.get("engine_did_not_run")
    if missing:
        yield {**_row(content, "Engine", None, None, "did not run"), "about": missing["reason"]}


def _error_and_allowed(item: Json) -> tuple[Any, Any]:
    main = main_output(item)
    return main.get("rel_l2_worst"), (item["tolerances"]["outputs"].get(main.get("name")) or {}).get("rel_l2")


def _row(content: ReportContent, step: str, error: Any, allowed: Any, verdict: str) -> dict[str, Any]:
    return {
        "step": step,
        "about": _STEP_NOTES.get(step, ""),
        "error": error,
        "allowed": allowed,
        "verdict": verdict,
        "seconds": _seconds(content, step),
    }


def _seconds(content: ReportContent, step: str) -> float | None:
    known = {phase.name: phase.seconds for phase in _phases(content)}
    found = [known[name] for name in _PHASES[step] if name in known]
    return sum(found) if found else None


def again(content: ReportContent) -> dict[str, Any]:
    """Commands in order, versions at export and at validation, and files with their SHA-256."""
    run = content.report.get("run") or {}
    manifest, here = content.manifest, dict(run.get("tools") or {})
    exported = {} if manifest is None else manifest.tools
    model = None if manifest is None else manifest.model
    return {
        "commands": list(_commands(content)),
        "created": None if manifest is None else manifest.created,
        "validated": content.made,
        "versions": [
            {"name": name, "export": exported.get(name), "here": here.get(name)}
            for name in dict.fromkeys((*exported, *here))
        ],
        "has_both": bool(exported and here) and exported != here,
        "files": {} if manifest is None else manifest.files,
        "weights": None if model is None else model.weights_sha256,
        "checkpoint": None if model is None else model.checkpoint_sha256,
        "checkpoint_name": None if model is None else model.checkpoint,
        "calibration": manifest.quantization.calibration if manifest is not None and manifest.quantization else None,
        "preprocessing": None if manifest is None else manifest.preprocessing,
    }


def _commands(content: ReportContent) -> Iterator[dict[str, str]]:
    if content.manifest is not None and content.manifest.command:
        yield {"title": "Export it", "text": content.manifest.command}
    run = content.report.get("run") or {}
    if validated := run.get("command"):
        yield {"title": "Validate it", "text": str(validated)}

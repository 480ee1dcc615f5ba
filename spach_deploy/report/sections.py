"""The top of the page: what came out, how far the evidence reaches, and why, in a sentence.

What was compared with what, and every figure of it.

Accuracy on labelled images, of PyTorch and of the candidate.

The images that change class, or come closest to it, as pictures with both sets of best classes.

The error along the depth of the network: where it leaves what rounding explains is where to look.

The graph's operators, and what the compiler made of them.

Which layer computes in which precision: what the graph asks for, and what the engine's network states.

How large the numbers get, against what FP16 can hold.

Where a disagreement begins: the stage, the module, the kind.

The pipeline: what each step's result differs by from the reference, what is allowed, and what it cost.

Everything that is needed to do it again: commands, versions, hashes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import convert, structs

from spach_deploy.bundle.schema import (
    KernelsEntry,
    Manifest,
    ModelSection,
    PeakEntry,
    PhaseEntry,
    PrecisionSection,
    SettingEntry,
)
from spach_deploy.models.hyperparameters import lines, read_section
from spach_deploy.options.specs import Precision
from spach_deploy.report.content import Json, ReportContent, count, percent, plural, scientific, sentence, size
from spach_deploy.report.plots import Chart, Limit, Line, draw, groups_of
from spach_deploy.validation.runs import and_listed

GOOD, PARTIAL, BAD = "good", "partial", "bad"
"""States that the style sheet has a colour and a sign for."""

_SHOWN = 6


def verdict(content: ReportContent) -> dict[str, Any]:
    """State, heading, level of evidence, the reason, figures and findings."""
    report = content.report
    findings = list(report.get("findings") or ())
    return {
        "state": state_of(report),
        "heading": heading_of(report),
        "level": report["level"],
        "level_sentence": level_sentence(report),
        "answers": report.get("answers_sentence") or "",
        "reason": reason_of(content),
        "tiles": [tile for tile in (_error(content), _classes(content), _top5(content), _engine(content)) if tile],
        "begins": begins(report),
        "findings": findings[1 : 1 + _SHOWN],
        "more": findings[1 + _SHOWN :],
        "is_demo": bool(report.get("is_demo")),
    }


def state_of(report: Json) -> str:
    """`partial`: all that ran agreed, and the engine did not run."""
    if not report["passed"]:
        return BAD
    return PARTIAL if report.get("engine_did_not_run") else GOOD


def heading_of(report: Json) -> str:
    """The verdict in a few words."""
    if not report["passed"]:
        if not report.get("evidence"):
            return "Nothing could be compared"
        if (report.get("answers") or {}).get("agrees") is False and all(run["passed"] for run in report["evidence"]):
            return "Agrees with PyTorch in FP32, but not with your answers"
        if report.get("agreed"):
            return "Agrees with PyTorch, but loses more accuracy than allowed"
        return "Does not agree with PyTorch in FP32"
    yours = " and with your answers" if (report.get("answers") or {}).get("agrees") else ""
    if report.get("engine_did_not_run"):
        return f"The graph agrees with PyTorch{yours}; the engine did not run"
    return f"Agrees with PyTorch in FP32{yours}"


def level_sentence(report: Json) -> str:
    """Without the words that stand beside it already."""
    return str(report["level_sentence"]).removeprefix(f"Level of evidence: {report['level']}. ")


def reason_of(content: ReportContent) -> str:
    """Why, in one sentence."""
    findings = list(content.report.get("findings") or ())
    if findings:
        return sentence(str(findings[0]))
    logits, bounds = content.logits, content.bounds
    if not logits or not bounds:
        return "Nothing was compared."
    share = float(logits["rel_l2_worst"]) / float(bounds["rel_l2"]) if bounds["rel_l2"] else 0.0
    flips = len(flips_of(logits))
    changed = "none" if not flips else "one" if flips == 1 else str(flips)
    return (
        f"In the worst image the logits differ by a relative L2 of {scientific(logits['rel_l2_worst'])},"
        f" {percent(share, 0)} of what is allowed, and {changed} of {plural(logits['shape'][0], 'image')}"
        f" {'change' if flips > 1 else 'changes'} class."
    )


def begins(report: Json) -> str:
    """Where a bisection saw it begin, in a sentence; empty without one."""
    bisect = report.get("bisect") or {}
    suspects, stage = bisect.get("suspects") or (), bisect.get("first_stage")
    where = [f"in the {stage}"] if stage else []
    if suspects:
        where.append(f"at {suspects[0]['module'] or 'the model itself'} ({suspects[0]['kind']})")
    return f"It begins {', '.join(where)}." if where else ""


def flips_of(logits: Json) -> list[Json]:
    """The images whose best class differs."""
    scores = logits.get("scores") or {}
    return list(scores.get("flips") or ())


def _error(content: ReportContent) -> dict[str, Any] | None:
    logits, allowed = content.logits, content.bounds.get("rel_l2")
    if not logits or allowed is None:
        return None
    error = float(logits["rel_l2_worst"])
    return {
        "label": "Relative L2, worst image",
        "value": scientific(error),
        "note": f"{scientific(allowed)} allowed",
        "share": min(1.0, error / float(allowed)) if allowed else 1.0,
        "is_bad": not error <= float(allowed),
    }


def _classes(content: ReportContent) -> dict[str, Any] | None:
    logits = content.logits
    if not logits.get("scores"):
        return None
    flips, margin = flips_of(logits), float(content.bounds.get("flip_margin", 0.0))
    return {
        "label": "Images that change class",
        "value": f"{len(flips)} of {logits['shape'][0]}",
        "note": f"ties up to a margin of {scientific(margin)} may",
        "is_bad": any(not float(flip["reference_margin"]) <= margin for flip in flips),
    }


def _top5(content: ReportContent) -> dict[str, Any] | None:
    agreement = (content.logits.get("scores") or {}).get("top5_agreement")
    if agreement is None:
        return None
    return {"label": "Top-5 agreement", "value": percent(agreement, 1), "note": "of the best five classes, shared"}


def _engine(content: ReportContent) -> dict[str, Any] | None:
    engine, kernels = content.engine, content.engine.kernels
    if engine.bytes is None:
        return None
    total = None if kernels is None else kernels.total
    known = "kernels not known" if total is None else f"{count(total)} kernels"
    return {"label": "Engine", "value": size(engine.bytes), "note": known}


Row = tuple[str, str, str, str]


def compared(content: ReportContent) -> dict[str, Any]:
    """Facts by name, and a table per run and output."""
    return {"facts": list(_facts(content)), "runs": [_run(item) for item in content.evidence]}


def _facts(content: ReportContent) -> Iterator[tuple[str, str]]:
    report, model = content.report, None if content.manifest is None else content.manifest.model
    yield "Candidate", sentence(str(content.first.get("ran", "nothing ran")))
    yield "Reference", sentence(str(report["reference"]))
    yield "Model", ", ".join(_model(report, model))
    yield "Weights", _weights(report, model)
    if settings := lines(read_section(convert(report.get("hyperparameters") or {}, dict[str, SettingEntry]))):
        yield "Not in the weights", sentence("; ".join(settings))
    images = report["images"]
    yield "Images", f"{plural(images['count'], 'image')}: {images['description']}."
    batches = sorted(set(content.first.get("batches", ())))
    if batches:
        yield "Batches", " ".join(filter(None, (f"Sizes {and_listed(batches)}.", content.first.get("left_out"))))
    derivation = content.first.get("tolerances", {}).get("derivation", {})
    if derivation:
        yield "Tolerance", sentence(str(derivation["sentence"]))


def _model(report: Json, model: ModelSection | None) -> Iterator[str]:
    yield str(report["model"])
    yield str(report["precision"]).upper()
    if model is not None:
        yield f"{model.image_size} px"
        yield f"{count(model.num_classes)} classes"


def _weights(report: Json, model: ModelSection | None) -> str:
    if report.get("is_demo"):
        return "Demo weights, made up and not trained: the comparison is as strict, the answers mean nothing."
    if model is None:
        return "From a checkpoint (model)."
    return f"From {model.checkpoint or 'a checkpoint'} ({model.weights.value})."


def _run(item: Json) -> dict[str, Any]:
    comparison, bounds = item["comparison"], item["tolerances"]["outputs"]
    outputs = [
        {
            "name": output["name"],
            "form": f"{output['dtype']} {' × '.join(map(str, output['shape']))}",
            "rows": list(_rows(output, bounds.get(output["name"]) or {})),
        }
        for output in comparison["outputs"]
    ]
    return {
        "ran": sentence(str(item["ran"])),
        "passed": bool(item["passed"]),
        "outputs": outputs,
        "indices": [_index(index) for index in comparison["indices"]],
        "problems": list(comparison["problems"]),
    }


def _rows(output: Json, bounds: Json) -> Iterator[Row]:
    """Figure, measured, allowed, and where or what that is."""
    worst = str(output["worst_name"] or f"image {output['worst_image']}")
    yield "Relative L2, worst image", scientific(output["rel_l2_worst"]), scientific(bounds.get("rel_l2")), worst
    yield "Relative L2, all images", scientific(output["rel_l2"]), "", ""
    yield "Largest absolute error", scientific(output["max_abs"]), _optional(bounds.get("max_abs"), ".2e"), ""
    yield "Mean absolute error", scientific(output["mean_abs"]), "", ""
    cosine = _optional(bounds.get("cosine_min"), ".8f")
    yield "Cosine, worst image", f"{float(output['cosine_worst']):.8f}", cosine, ""
    yield "Signal to noise", f"{float(output['snr_db']):.1f} dB", "", ""
    if output.get("scores"):
        yield from _scores(output, bounds)


def _scores(output: Json, bounds: Json) -> Iterator[Row]:
    scores = output["scores"]
    yield "Top-1 agreement", percent(scores["top1_agreement"]), "", ""
    if scores["top5_agreement"] is not None:
        yield "Top-5 agreement", percent(scores["top5_agreement"]), "", ""
    yield "KL divergence, mean", f"{float(scores['kl_mean']):.1e} nat", "", ""
    yield "KL divergence, worst", f"{float(scores['kl_worst']):.1e} nat", "", ""
    changed = f"{len(flips_of(output))} of {output['shape'][0]}"
    yield "Images that change class", changed, _optional(bounds.get("flip_margin"), ".2e"), "allowed up to this margin"


def _index(index: Json) -> dict[str, Any]:
    return {
        "name": index["name"],
        "form": f"{index['dtype']} {' × '.join(map(str, index['shape']))}",
        "agreement": percent(index["agreement"]),
        "ranks": index["ranks"],
        "differences": len(index["differences"]),
    }


def _optional(value: Any, form: str) -> str:
    return "" if value is None else format(float(value), form)


def accuracy(content: ReportContent) -> dict[str, Any] | None:
    """A row for top-1 and top-5; None without labels."""
    accuracy = content.report.get("accuracy")
    if not accuracy:
        return None
    rows = [
        {
            "name": name,
            "reference": accuracy[f"{key}_reference"],
            "candidate": accuracy[f"{key}_candidate"],
            "drop": drop,
            "interval": interval,
        }
        for name, key, drop, interval in (
            ("Top-1", "top1", accuracy["drop_points"], accuracy["interval"]),
            ("Top-5", "top5", accuracy["top5_drop_points"], accuracy["top5_interval"]),
        )
        if drop is not None
    ]
    return {**accuracy, "rows": rows}


def answers(content: ReportContent) -> dict[str, Any] | None:
    """One entry an image; None where nothing was ranked."""
    answers = list(content.first.get("answers") or ())
    if not answers:
        return None
    flips = flips_of(content.logits)
    margin = float(content.bounds.get("flip_margin", 0.0))
    return {
        "title": "Images that change class" if answers[0]["flipped"] else "Images that come closest to another class",
        "flipped": bool(answers[0]["flipped"]),
        "images": [_entry(answer, content, margin) for answer in answers],
        "left_out": max(0, len(flips) - len(answers)) if answers[0]["flipped"] else 0,
        "count": content.report["images"]["count"],
        "margin": margin,
        "is_demo": bool(content.report.get("is_demo")),
    }


def _entry(answer: Json, content: ReportContent, margin: float) -> dict[str, Any]:
    shared = {ranked["index"] for ranked in answer["reference"]} & {ranked["index"] for ranked in answer["candidate"]}
    largest = max((ranked["probability"] for ranked in (*answer["reference"], *answer["candidate"])), default=0.0)
    return {
        **answer,
        "name": answer["name"] or f"image {answer['image']}",
        "picture": content.pictures.get(int(answer["image"])),
        "is_tie": bool(answer["flipped"]) and float(answer["reference_margin"]) <= margin,
        "shared": shared,
        "largest": largest or 1.0,
    }


def depth(content: ReportContent) -> dict[str, Any] | None:
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


_GRAPH_SHOWN = 14


def graph(content: ReportContent) -> dict[str, Any] | None:
    """Operators by number, rewrites that were applied, the plan's size and kernels."""
    if content.manifest is None:
        return None
    certificate, engine = content.graph.certificate, content.engine
    kernels = engine.kernels or KernelsEntry()
    operators = _bars(certificate.operators)
    return {
        "certificate": certificate,
        "operators": operators[:_GRAPH_SHOWN],
        "others": operators[_GRAPH_SHOWN:],
        "rewrites": _rewrites(content),
        "engine": engine,
        "kernels": _bars(kernels.by_kind),
        "facts": kernels,
        "build_seconds": engine.build_seconds,
    }


def _bars(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """The most frequent first, each with its share of the first."""
    ordered = sorted(counts.items(), key=lambda entry: -entry[1])
    return [{"name": name, "count": number, "share": number / ordered[0][1]} for name, number in ordered]


def _rewrites(content: ReportContent) -> list[dict[str, Any]]:
    """PyTorch rewrites with the modules that each changed and its error in FP64, then passes over the graph."""
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
"""Why nodes stay in FP32, by the policy's short names."""


def precision(content: ReportContent) -> dict[str, Any] | None:
    """A strip of weighted layers in the order of the network, a table of them, and what stays in FP32."""
    if content.manifest is None:
        return None
    precision = content.manifest.precision
    layers = _layers(content.manifest)
    return {
        "asked": precision.asked.value,
        "rest": (precision.rest or precision.asked).value,
        "summary": precision.summary,
        "layers": layers,
        "groups": _groups(layers),
        "counts": Counter(layer["dtype"] for layer in layers).most_common(),
        "is_checked": any(layer["achieved"] for layer in layers),
        "differ": [layer for layer in layers if layer["achieved"] and layer["achieved"] != layer["asked"]],
        "by_engine": content.engine.layers_by_dtype,
        "reasons": _reasons(precision),
        "nodes": (precision.nodes, precision.half_nodes, precision.casts),
    }


def _layers(manifest: Manifest) -> list[dict[str, Any]]:
    """Weighted layers with what was asked of each and what came of it."""
    kept = () if manifest.quantization is None else manifest.quantization.kept_float
    why = {entry.node: entry.reason for entry in kept}
    found = []
    for layer in manifest.precision.layers:
        dtype = manifest.engine.layers.get(layer.node)
        shown = {"achieved": dtype, "dtype": dtype or layer.asked, "why": why.get(layer.node, "")}
        found.append({**structs.asdict(layer), **shown})
    return found


def _groups(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The strip, stage by stage."""
    stages = groups_of([str(layer["module"]) for layer in layers])
    return [{"name": stage.name, "layers": layers[stage.start : stage.stop]} for stage in stages]


def _reasons(precision: PrecisionSection) -> list[dict[str, Any]]:
    """How many nodes stay in FP32 for which reason, in how many modules."""
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
    """A plot of the largest magnitude by module, the tensors nearest to the limit, and what stays in FP32 for it."""
    precision = PrecisionSection(asked=Precision.FP32) if content.manifest is None else content.manifest.precision
    modules = (content.report.get("trace") or {}).get("modules") or []
    limit = precision.limit or LARGEST_FP16
    closest = [_tensor(entry, limit) for entry in precision.closest]
    kept = [entry for entry in precision.kept if entry.reason in ("range", "weight")]
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
        "source": precision.ranges.source,
        "margin": precision.margin,
        "weights": precision.weights,
    }


def _chart(modules: list[Json]) -> Chart:
    parts = tuple(str(module["module"]) for module in modules)
    peaks = tuple(module["peak"] for module in modules)
    line = Line("largest magnitude of the output", peaks, "ours", dots=True)
    return Chart(parts, (line,), "magnitude", (Limit("largest number of FP16, 65,504", LARGEST_FP16),))


def _tensor(entry: PeakEntry, limit: float) -> dict[str, Any]:
    peak = entry.max_abs
    times = limit / peak if peak > 0 else math.inf
    return {"tensor": entry.tensor, "max_abs": peak, "times": times, "bits": math.log2(times)}


def bisect(content: ReportContent) -> dict[str, Any] | None:
    """Sentences, stages, suspects, and every module with its inherited and its own error; None without a bisection."""
    bisect = content.report.get("bisect")
    if not bisect:
        return None
    modules = [{**module, "is_over": _bisect_is_over(module)} for module in bisect["modules"]]
    return {
        "title": "Module by module" if bisect["passed"] else "Where it begins",
        "passed": bool(bisect["passed"]),
        "lines": list(bisect["lines"]),
        "first_stage": bisect.get("first_stage"),
        "stages": list(bisect["stages"]),
        "suspects": list(bisect["suspects"]),
        "modules": modules,
        "plot": draw(_bisect_chart(modules), "bisect") if modules else None,
        "unmapped": list(bisect["unmapped"]),
    }


def _bisect_chart(modules: list[dict[str, Any]]) -> Chart:
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


def _bisect_is_over(module: Json) -> bool:
    """An error that is not finite is written as null."""
    return module["local"] is None or not float(module["local"]) <= float(module["allowed"])


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


def steps(content: ReportContent) -> dict[str, Any] | None:
    """Rows of the table; phases with their time and memory."""
    rows = [*_exported(content), *_steps_run(content)]
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


def _exported(content: ReportContent) -> Iterator[dict[str, Any]]:
    """The steps up to the FP32 graph, as the export proved them."""
    errors, limit = content.graph.relative_l2, content.graph.relative_l2_limit
    noise = content.first.get("tolerances", {}).get("derivation", {}).get("noise", {})
    if noise.get("images"):
        yield _row(content, "Reference", noise["rel_l2"], None, "")
    for name, proven in _PROVEN.items():
        if name == "Graph in its target's form" and _seconds(content, "Calibration"):
            yield _row(content, "Calibration", None, None, "")
        if by_batch := errors.get(proven):
            worst = max(by_batch.values())
            yield _row(content, name, worst, limit, "agrees" if limit is None or worst <= limit else "disagrees")
        elif name == "Exported graph" and errors:
            yield {**_row(content, name, None, None, ""), "about": "ONNX in FP32, proven in its target's form"}


def _steps_run(content: ReportContent) -> Iterator[dict[str, Any]]:
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
    known = {phase.name: phase.seconds for phase in _phases(content)}
    found = [known[name] for name in _PHASES[step] if name in known]
    return sum(found) if found else None


def again(content: ReportContent) -> dict[str, Any]:
    """Commands in order, versions at export and at validation, files with their SHA-256."""
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

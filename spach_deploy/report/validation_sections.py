"""Sections of the page about the validation: verdict, comparison, accuracy, changed images, error trace and bisection.

Each function takes the page's content and returns what its template shows; None leaves the section out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import convert

from spach_deploy.bundle.schema import ModelSection, SettingEntry
from spach_deploy.common.text import counted
from spach_deploy.models.hyperparameters import lines, read_section
from spach_deploy.options.specs import size_in_words
from spach_deploy.report.content import Json, ReportContent, count, percent, plural, scientific, sentence, size
from spach_deploy.report.plots import Chart, Line, draw
from spach_deploy.validation.runs import and_listed

GOOD, PARTIAL, BAD = "good", "partial", "bad"
"""States that the style sheet has a colour and a sign for."""

_FINDINGS_SHOWN = 6


def verdict(content: ReportContent) -> dict[str, Any]:
    """The top of the page: state, heading, level of evidence, reason, figures and findings."""
    report = content.report
    findings = list(report.get("findings") or ())
    return {
        "state": state_of(report),
        "heading": heading_of(report),
        "level": report["level"],
        "level_sentence": level_sentence(report),
        "answers": report.get("answers_sentence") or "",
        "reason": reason_of(content),
        "tiles": [
            tile
            for tile in (_error_tile(content), _classes_tile(content), _top5_tile(content), _engine_tile(content))
            if tile
        ],
        "begins": bisected_to(report),
        "findings": findings[1 : 1 + _FINDINGS_SHOWN],
        "more": findings[1 + _FINDINGS_SHOWN :],
        "is_demo": bool(report.get("is_demo")),
    }


def state_of(report: Json) -> str:
    """`good`, `bad`, or `partial` where all runs agree and the engine did not run."""
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
    """The level of evidence, without the words that the page shows next to it."""
    return str(report["level_sentence"]).removeprefix(f"Level of evidence: {report['level']}. ")


def reason_of(content: ReportContent) -> str:
    """The reason for the verdict, in one sentence."""
    findings = list(content.report.get("findings") or ())
    if findings:
        return sentence(str(findings[0]))
    logits, bounds = content.main, content.bounds
    if not logits or not bounds:
        return "Nothing was compared."
    share = float(logits["rel_l2_worst"]) / float(bounds["rel_l2"]) if bounds["rel_l2"] else 0.0
    flips = len(flips_of(logits))
    changed = "none" if not flips else "one" if flips == 1 else str(flips)
    subject = "the logits differ" if logits["name"] == "logits" else f"{logits['name']} differs"
    differ = (
        f"In the worst image {subject} by a relative L2 of {scientific(logits['rel_l2_worst'])},"
        f" {percent(share, 0)} of what is allowed"
    )
    if not logits.get("scores"):
        return f"{differ}."
    images = plural(logits["shape"][0], "image")
    return f"{differ}, and {changed} of {images} {'change' if flips > 1 else 'changes'} class."


def bisected_to(report: Json) -> str:
    """Where the bisection found the fault, in a sentence; empty without one."""
    bisect = report.get("bisect") or {}
    suspects, stage = bisect.get("suspects") or (), bisect.get("first_stage")
    where = [f"in the {stage}"] if stage else []
    if suspects:
        where.append(f"at {suspects[0]['module'] or 'the model itself'} ({suspects[0]['kind']})")
    return f"It bisected_to {', '.join(where)}." if where else ""


def flips_of(logits: Json) -> list[Json]:
    """The images whose best class differs."""
    scores = logits.get("scores") or {}
    return list(scores.get("flips") or ())


def _error_tile(content: ReportContent) -> dict[str, Any] | None:
    logits, allowed = content.main, content.bounds.get("rel_l2")
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


def _classes_tile(content: ReportContent) -> dict[str, Any] | None:
    logits = content.main
    if not logits.get("scores"):
        return None
    flips, margin = flips_of(logits), float(content.bounds.get("flip_margin", 0.0))
    return {
        "label": "Images that change class",
        "value": f"{len(flips)} of {logits['shape'][0]}",
        "note": f"ties up to a margin of {scientific(margin)} may",
        "is_bad": any(not float(flip["reference_margin"]) <= margin for flip in flips),
    }


def _top5_tile(content: ReportContent) -> dict[str, Any] | None:
    agreement = (content.main.get("scores") or {}).get("top5_agreement")
    if agreement is None:
        return None
    return {"label": "Top-5 agreement", "value": percent(agreement, 1), "note": "of the best five classes, shared"}


def _engine_tile(content: ReportContent) -> dict[str, Any] | None:
    engine, kernels = content.engine, content.engine.kernels
    if engine.bytes is None:
        return None
    total = None if kernels is None else kernels.total
    known = "kernels not known" if total is None else f"{count(total)} kernels"
    return {"label": "Engine", "value": size(engine.bytes), "note": known}


_TILES = (_error_tile, _classes_tile, _top5_tile, _engine_tile)

Row = tuple[str, str, str, str]


def compared(content: ReportContent) -> dict[str, Any]:
    """What was compared: facts by name, and a table for each run and output."""
    return {"facts": list(_facts(content)), "runs": [_run_tables(item) for item in content.evidence]}


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
    for name, other in content.first.get("tolerances", {}).get("others", {}).items():
        yield f"Tolerance of {name}", sentence(str(other["sentence"]))


def _model(report: Json, model: ModelSection | None) -> Iterator[str]:
    yield str(report["model"])
    yield str(report["precision"]).upper()
    if model is not None:
        yield f"{size_in_words(model.image_size)} px"
        yield counted(model.num_classes, "class") if model.num_classes else "no head"


def _weights(report: Json, model: ModelSection | None) -> str:
    if report.get("is_demo"):
        return "Demo weights, made up and not trained: the comparison is as strict, the answers mean nothing."
    if model is None:
        return "From a checkpoint (model)."
    return f"From {model.checkpoint or 'a checkpoint'} ({model.weights.value})."


def _run_tables(item: Json) -> dict[str, Any]:
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
    """Rows of a table: figure, measured, allowed, and a note."""
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
    """A row for top-1 and one for top-5; None without labels."""
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
    """The images that change class, or nearly; None where classes were not ranked."""
    answers = list(content.first.get("answers") or ())
    if not answers:
        return None
    flips = flips_of(content.main)
    margin = float(content.bounds.get("flip_margin", 0.0))
    return {
        "title": "Images that change class" if answers[0]["flipped"] else "Images that come closest to another class",
        "flipped": bool(answers[0]["flipped"]),
        "images": [_image_entry(answer, content, margin) for answer in answers],
        "left_out": max(0, len(flips) - len(answers)) if answers[0]["flipped"] else 0,
        "count": content.report["images"]["count"],
        "margin": margin,
        "is_demo": bool(content.report.get("is_demo")),
    }


def _image_entry(answer: Json, content: ReportContent, margin: float) -> dict[str, Any]:
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
    """The error trace as a plot and as a table; None where it was not measured."""
    trace = content.report.get("trace")
    modules = (trace or {}).get("modules") or []
    if not trace or not modules:
        return None
    drawn = draw(error_chart(modules), "depth")
    return {
        "what": trace["what"],
        "images": list(trace["images"]),
        "plot": drawn,
        "modules": [{**module, "is_over": _exceeds(module)} for module in modules],
        "first_over": next((module["module"] for module in modules if _exceeds(module)), None),
    }


def error_chart(modules: list[Json]) -> Chart:
    """Error, tolerance and FP32 error by module."""
    parts = tuple(str(module["module"]) for module in modules)

    def values(key: str) -> tuple[float | None, ...]:
        return tuple(module[key] for module in modules)

    over = tuple(index for index, module in enumerate(modules) if _exceeds(module))
    return Chart(
        parts,
        (
            Line("this graph", values("error"), "ours", dots=True, marked=over),
            Line("allowed", values("allowed"), "bound", "dashed"),
            Line("noise of FP32", values("noise"), "noise", "dotted"),
        ),
        "relative L2 of the output",
    )


def _exceeds(module: Json) -> bool:
    return module["error"] is not None and not float(module["error"]) <= float(module["allowed"])


def bisect(content: ReportContent) -> dict[str, Any] | None:
    """The bisection: sentences, steps, suspects, and each module with its inherited and local error; None without
    one.
    """
    bisect = content.report.get("bisect")
    if not bisect:
        return None
    modules = [{**module, "is_over": _exceeds_locally(module)} for module in bisect["modules"]]
    return {
        "title": "Module by module" if bisect["passed"] else "Where it begins",
        "passed": bool(bisect["passed"]),
        "lines": list(bisect["lines"]),
        "first_stage": bisect.get("first_stage"),
        "stages": list(bisect["stages"]),
        "suspects": list(bisect["suspects"]),
        "modules": modules,
        "plot": draw(_module_error_chart(modules), "bisect") if modules else None,
        "unmapped": list(bisect["unmapped"]),
    }


def _module_error_chart(modules: list[dict[str, Any]]) -> Chart:
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


def _exceeds_locally(module: Json) -> bool:
    """Whether the local error exceeds what is allowed. An error that is not finite is null in the report."""
    return module["local"] is None or not float(module["local"]) <= float(module["allowed"])

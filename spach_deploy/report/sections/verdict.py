"""The top of the page: what came out, how far the evidence reaches, and why, in a sentence."""

from __future__ import annotations

from typing import Any

from spach_deploy.report.content import Json, ReportContent
from spach_deploy.report.formats import count, percent, plural, scientific, sentence, size

GOOD, PARTIAL, BAD = "good", "partial", "bad"
"""States that the style sheet has a colour and a sign for."""

_SHOWN = 6


def view(content: ReportContent) -> dict[str, Any]:
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
    engine, kernels = content.section("engine"), content.section("engine", "kernels")
    if "bytes" not in engine:
        return None
    known = f"{count(kernels['total'])} kernels" if "total" in kernels else "kernels not known"
    return {"label": "Engine", "value": size(engine["bytes"]), "note": known}

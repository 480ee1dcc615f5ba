"""The images that change class, or come closest to it, as pictures with both sets of best classes."""

from __future__ import annotations

from typing import Any

from spach_deploy.report.content import Json, ReportContent
from spach_deploy.report.sections.verdict import flips_of


def view(content: ReportContent) -> dict[str, Any] | None:
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

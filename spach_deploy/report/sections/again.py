"""Everything that is needed to do it again: commands, versions, hashes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spach_deploy.report.content import ReportContent


def view(content: ReportContent) -> dict[str, Any]:
    """Commands in order, versions at export and at validation, files with their SHA-256."""
    run = content.report.get("run") or {}
    exported, here = dict(content.section("tools")), dict(run.get("tools") or {})
    return {
        "commands": list(_commands(content)),
        "created": content.manifest.get("created"),
        "validated": content.made,
        "versions": [
            {"name": name, "export": exported.get(name), "here": here.get(name)}
            for name in dict.fromkeys((*exported, *here))
        ],
        "has_both": bool(exported and here) and exported != here,
        "files": content.section("files"),
        "weights": content.section("model").get("weights_sha256"),
        "checkpoint": content.section("model").get("checkpoint_sha256"),
        "checkpoint_name": content.section("model").get("checkpoint"),
        "calibration": content.section("quantization", "calibration"),
        "preprocessing": content.section("preprocessing"),
    }


def _commands(content: ReportContent) -> Iterator[dict[str, str]]:
    if exported := content.manifest.get("command"):
        yield {"title": "Export it", "text": str(exported)}
    run = content.report.get("run") or {}
    if validated := run.get("command"):
        yield {"title": "Validate it", "text": str(validated)}

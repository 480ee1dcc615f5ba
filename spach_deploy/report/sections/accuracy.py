"""Accuracy on labelled images, of PyTorch and of the candidate."""

from __future__ import annotations

from typing import Any

from spach_deploy.report.content import ReportContent


def view(content: ReportContent) -> dict[str, Any] | None:
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

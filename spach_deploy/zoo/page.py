"""The zoo's page: one table with a link to each bundle's own report."""

from __future__ import annotations

import os
import urllib.parse

from spach_deploy.report.formats import plural
from spach_deploy.report.page import fill
from spach_deploy.zoo.outcome import Row, Summary, Verdict

_STATES = {Verdict.AGREED: "good", Verdict.DISAGREED: "bad", Verdict.FAILED: "bad"}


def page_of_zoo(summary: Summary) -> str:
    """The page as text. Raises MissingPackageError without jinja2."""
    made = [row for row in summary.rows if row.verdict is Verdict.AGREED]
    return fill(
        "zoo.html.jinja",
        title=f"{plural(len(summary.rows), 'bundle')}: {heading(summary)}",
        state=state(summary),
        heading=heading(summary),
        sentence=summary.sentence(),
        graph_only=sum(row.level == "graph" and row.plan_bytes is not None for row in made),
        rows=[{"row": row, "state": _STATES.get(row.verdict, "partial"), "link": link(row)} for row in summary.rows],
        failed=[row for row in summary.rows if row.said],
        total_bytes=sum(row.bundle_bytes or 0 for row in summary.rows),
        summary=summary,
    )


def state(summary: Summary) -> str:
    """`bad` where a bundle disagreed or could not be made, `partial` where one is not done."""
    verdicts = set(summary.counts)
    if verdicts & {Verdict.DISAGREED, Verdict.FAILED}:
        return "bad"
    return "partial" if verdicts & {Verdict.RUNNING, Verdict.WAITING} else "good"


def heading(summary: Summary) -> str:
    """The verdict in a few words."""
    counts = summary.counts
    if counts.get(Verdict.DISAGREED):
        return f"{plural(counts[Verdict.DISAGREED], 'model')} disagreed with PyTorch"
    if counts.get(Verdict.FAILED):
        return f"{plural(counts[Verdict.FAILED], 'bundle')} could not be made"
    if set(counts) - {Verdict.AGREED}:
        return "Not all bundles are made yet"
    return "All bundles agree with PyTorch in FP32"


def link(row: Row) -> str | None:
    """The report's page, as a browser takes it: relative, so that the directory may move."""
    return None if row.report is None else urllib.parse.quote(os.fsencode(row.report))

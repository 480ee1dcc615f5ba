"""The summary of a zoo: the outcome of each build, as a table, JSON and an HTML page with links to the reports."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spach_deploy.bundle.store import PAGE, REPORT, Bundle
from spach_deploy.common.errors import BundleError
from spach_deploy.common.files import read_json
from spach_deploy.common.text import escaped
from spach_deploy.common.versions import tool_versions
from spach_deploy.engine.cost_model import in_brief
from spach_deploy.pipeline.zoo.child import ProcessEnd
from spach_deploy.pipeline.zoo.folder import KIND
from spach_deploy.pipeline.zoo.plan import Build
from spach_deploy.report.content import plural
from spach_deploy.report.page import fill

SCHEMA = 1
DISAGREED_CODE, COULD_NOT_CODE = 1, 3


class BuildStatus(str, enum.Enum):
    """Status of a build: not begun, running, or how it ended."""

    AGREED = "agreed"
    DISAGREED = "disagreed"
    FAILED = "failed"
    RUNNING = "running"
    WAITING = "waiting"

    @property
    def exit_code(self) -> int:
        """The exit code that this status gives the command: 3 for every bundle that was not made."""
        return {BuildStatus.AGREED: 0, BuildStatus.DISAGREED: DISAGREED_CODE}.get(self, COULD_NOT_CODE)


@dataclasses.dataclass(frozen=True)
class Row:
    """One build in the summary.

    `exit_code`: of the export, negative for a signal, None where it did not run. `level`: what was compared with the
    reference, graph or engine. `rel_l2`: of its logits over all golden images. `problem`: why there is no bundle, as a
    sentence; `said`: the last lines of a failed export. `bundle_bytes`, `plan_bytes`: sizes of all files and of the
    plan; `peak_bytes`: peak memory of the export; `expected_bytes`: its estimate. `is_kept`: made by an earlier run.
    `report`: the bundle's page, relative to the zoo. `node`: the machine that it ran on, if not this one.
    """

    name: str
    model: str
    precision: str
    gpus: tuple[str, ...]
    verdict: BuildStatus = BuildStatus.WAITING
    is_kept: bool = False
    exit_code: int | None = None
    problem: str = ""
    said: tuple[str, ...] = ()
    level: str | None = None
    rel_l2: float | None = None
    bundle_bytes: int | None = None
    plan_bytes: int | None = None
    kernels: int | None = None
    predicted_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float | None = None
    peak_bytes: int | None = None
    expected_bytes: float | None = None
    report: str | None = None
    node: str | None = None

    @classmethod
    def waiting(cls, build: Build) -> Row:
        """The row of a build that has not begun."""
        gpus = tuple(map(str, build.options.engine.gpus))
        choice = build.choice
        return cls(build.name, choice.model, choice.precision.value, gpus, expected_bytes=build.memory_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**dataclasses.asdict(self), "verdict": self.verdict.value}


def ended_row(row: Row, ended: ProcessEnd, target: Path) -> Row:
    """`row` after its export ended, with the bundle at `target` where it succeeded."""
    facts = {"exit_code": ended.code, "seconds": ended.seconds, "peak_bytes": ended.peak_bytes, "node": ended.node}
    row = dataclasses.replace(row, **facts)  # type: ignore[arg-type]
    if ended.code == 0:
        return finished_row(row, target)
    verdict = BuildStatus.DISAGREED if ended.code == DISAGREED_CODE else BuildStatus.FAILED
    return dataclasses.replace(row, verdict=verdict, problem=ended.sentence, said=ended.said)


def kept_row(row: Row, target: Path) -> Row:
    """`row` with the bundle at `target`, which an earlier run made."""
    return dataclasses.replace(finished_row(row, target), is_kept=True)


def finished_row(row: Row, target: Path) -> Row:
    """`row` with the figures from the bundle's manifest and report."""
    try:
        manifest = Bundle.open(target, verify=False).manifest
    except BundleError as error:
        return dataclasses.replace(row, verdict=BuildStatus.FAILED, problem=str(error))
    engine, validation = manifest.engine, manifest.validation
    return dataclasses.replace(
        row,
        verdict=BuildStatus.AGREED if validation.passed else BuildStatus.DISAGREED,
        gpus=engine.gpus or row.gpus,
        level=validation.level,
        rel_l2=_rel_l2(target / REPORT),
        bundle_bytes=sum(file.stat().st_size for file in target.iterdir()),
        plan_bytes=engine.bytes,
        kernels=None if engine.kernels is None else engine.kernels.total,
        predicted_ms={} if engine.kernels is None else engine.kernels.predicted_ms,
        report=f"{target.name}/{PAGE}" if (target / PAGE).is_file() else None,
    )


def _rel_l2(report: Path) -> float | None:
    """Relative L2 of the first output, the logits, in the report's last comparison (the engine's, if it ran)."""
    try:
        outputs = read_json(report)["evidence"][-1]["comparison"]["outputs"]
        return float(outputs[0]["rel_l2"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


@dataclasses.dataclass(frozen=True)
class Summary:
    """All rows, models first. `command`: the command that makes this zoo, and continues it."""

    rows: tuple[Row, ...]
    command: str
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """1 where any bundle disagreed, else 3 where any could not be made, else 0."""
        codes = {row.verdict.exit_code for row in self.rows}
        return next((code for code in (DISAGREED_CODE, COULD_NOT_CODE) if code in codes), 0)

    @property
    def counts(self) -> Mapping[BuildStatus, int]:
        """Number of rows by status, in the order of `BuildStatus`."""
        counts = collections.Counter(row.verdict for row in self.rows)
        return {verdict: counts[verdict] for verdict in BuildStatus if counts[verdict]}

    @property
    def kept(self) -> int:
        """Number of bundles that an earlier run made."""
        return sum(row.is_kept for row in self.rows)

    def sentence(self) -> str:
        """The counts as a sentence: `24 bundles: 22 agreed (20 kept from before), 2 failed.`"""
        parts = []
        for verdict, count in self.counts.items():
            kept = f" ({self.kept} kept from before)" if verdict is BuildStatus.AGREED and self.kept else ""
            parts.append(f"{count} {verdict.value}{kept}")
        return f"{len(self.rows)} bundle{'' if len(self.rows) == 1 else 's'}: {', '.join(parts)}."

    def replacing(self, row: Row) -> Summary:
        """A copy with the row of the same name replaced."""
        rows = tuple(row if other.name == row.name else other for other in self.rows)
        return dataclasses.replace(self, rows=rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for summary.json."""
        return {
            "schema_version": SCHEMA,
            "kind": KIND,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "tools": tool_versions(),
            "command": self.command,
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 1),
            "counts": {verdict.value: count for verdict, count in self.counts.items()},
            "kept": self.kept,
            "bundles": [row.to_dict() for row in self.rows],
        }


def as_table(rows: Sequence[Row]) -> str:
    """The rows as a table for the terminal; problems stand below their rows."""
    width = max((len(row.name) for row in rows), default=0)
    head = f"{'bundle':<{width}}  verdict    evidence   rel. L2       MB  kernels    time  predicted"
    lines = [head.rstrip()]
    for row in rows:
        lines.append(f"{row.name:<{width}}  {_cells(row)}".rstrip())
        if row.problem:
            lines.append(f"{'':4}{row.problem}")
    if any(row.predicted_ms for row in rows):
        lines.append("Predicted: the time of one usual batch on that card, not measured.")
    return escaped(lines)


def _cells(row: Row) -> str:
    error = "" if row.rel_l2 is None else f"{row.rel_l2:.2e}"
    size = "" if row.bundle_bytes is None else f"{row.bundle_bytes / 1e6:,.1f}"
    kernels = "" if row.kernels is None else f"{row.kernels}"
    time = "kept" if row.is_kept else "" if row.seconds is None else f"{row.seconds:.0f} s"
    predicted = in_brief(row.predicted_ms)
    return f"{row.verdict.value:<10} {row.level or '':<9} {error:>9} {size:>8} {kernels:>8} {time:>7}  {predicted}"


_STATES = {BuildStatus.AGREED: "good", BuildStatus.DISAGREED: "bad", BuildStatus.FAILED: "bad"}


def page_of_zoo(summary: Summary) -> str:
    """summary.html as text. Raises MissingPackageError without jinja2."""
    made = [row for row in summary.rows if row.verdict is BuildStatus.AGREED]
    return fill(
        "zoo.html.jinja",
        title=f"{plural(len(summary.rows), 'bundle')}: {heading(summary)}",
        state=state(summary),
        heading=heading(summary),
        sentence=summary.sentence(),
        graph_only=sum(row.level == "graph" and row.plan_bytes is not None for row in made),
        rows=[_shown(row) for row in summary.rows],
        failed=[row for row in summary.rows if row.said],
        total_bytes=sum(row.bundle_bytes or 0 for row in summary.rows),
        summary=summary,
    )


def _shown(row: Row) -> dict[str, Any]:
    return {
        "row": row,
        "state": _STATES.get(row.verdict, "partial"),
        "link": link(row),
        "predicted": in_brief(row.predicted_ms) or "–",
    }


def state(summary: Summary) -> str:
    """`bad` where a bundle disagreed or could not be made, `partial` where one is not done."""
    verdicts = set(summary.counts)
    if verdicts & {BuildStatus.DISAGREED, BuildStatus.FAILED}:
        return "bad"
    return "partial" if verdicts & {BuildStatus.RUNNING, BuildStatus.WAITING} else "good"


def heading(summary: Summary) -> str:
    """The result in a few words."""
    counts = summary.counts
    if counts.get(BuildStatus.DISAGREED):
        return f"{plural(counts[BuildStatus.DISAGREED], 'model')} disagreed with PyTorch"
    if counts.get(BuildStatus.FAILED):
        return f"{plural(counts[BuildStatus.FAILED], 'bundle')} could not be made"
    if set(counts) - {BuildStatus.AGREED}:
        return "Not all bundles are made yet"
    return "All bundles agree with PyTorch in FP32"


def link(row: Row) -> str | None:
    """The URL of the report's page, relative, so that the directory may be moved."""
    return None if row.report is None else urllib.parse.quote(os.fsencode(row.report))

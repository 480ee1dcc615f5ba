"""What came of each build, and of all of them.

The zoo's page: one table with a link to each bundle's own report.
"""

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
from spach_deploy.pipeline.zoo.child import ProcessEnd
from spach_deploy.pipeline.zoo.folder import KIND
from spach_deploy.pipeline.zoo.plan import Build
from spach_deploy.report.content import plural
from spach_deploy.report.page import fill

SCHEMA = 1
DISAGREED_CODE, COULD_NOT_CODE = 1, 3


class BuildStatus(str, enum.Enum):
    """What came of a build."""

    AGREED = "agreed"
    DISAGREED = "disagreed"
    FAILED = "failed"
    RUNNING = "running"
    WAITING = "waiting"

    @property
    def exit_code(self) -> int:
        """What it counts for when the command ends: a bundle that is not there could not be made here."""
        return {BuildStatus.AGREED: 0, BuildStatus.DISAGREED: DISAGREED_CODE}.get(self, COULD_NOT_CODE)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the summary.

    `exit_code`: the export's own, negative for a signal that ended it, None where it did not run. `level`: how far the
    evidence reaches, graph or engine. `rel_l2`: of the logits, all golden images, by that evidence. `problem`: why
    there is no bundle, in a sentence; `said`: the last lines of an export that failed. Bytes are of the whole bundle,
    and of the plan; `peak_bytes`: the memory that the export took at most. `is_kept`: made by an earlier run.
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
    seconds: float | None = None
    peak_bytes: int | None = None
    expected_bytes: float | None = None
    report: str | None = None
    node: str | None = None

    @classmethod
    def waiting(cls, build: Build) -> Row:
        """Of a build that did not begin yet."""
        gpus = tuple(map(str, build.options.engine.gpus))
        choice = build.choice
        return cls(build.name, choice.model, choice.precision.value, gpus, expected_bytes=build.memory_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**dataclasses.asdict(self), "verdict": self.verdict.value}


def ended_row(row: Row, ended: ProcessEnd, target: Path) -> Row:
    """`row` of an export that ended, its bundle at `target` if it succeeded."""
    facts = {"exit_code": ended.code, "seconds": ended.seconds, "peak_bytes": ended.peak_bytes, "node": ended.node}
    row = dataclasses.replace(row, **facts)  # type: ignore[arg-type]
    if ended.code == 0:
        return finished_row(row, target)
    verdict = BuildStatus.DISAGREED if ended.code == DISAGREED_CODE else BuildStatus.FAILED
    return dataclasses.replace(row, verdict=verdict, problem=ended.sentence, said=ended.said)


def kept_row(row: Row, target: Path) -> Row:
    """`row` of a bundle that an earlier run made."""
    return dataclasses.replace(finished_row(row, target), is_kept=True)


def finished_row(row: Row, target: Path) -> Row:
    """`row` with what the bundle says of itself."""
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
        report=f"{target.name}/{PAGE}" if (target / PAGE).is_file() else None,
    )


def _rel_l2(report: Path) -> float | None:
    """Of the logits, by the strongest evidence; None where the report does not tell."""
    try:
        outputs = read_json(report)["evidence"][-1]["comparison"]["outputs"]
        return next(float(output["rel_l2"]) for output in outputs if output["name"] == "logits")
    except (OSError, ValueError, KeyError, IndexError, TypeError, StopIteration):
        return None


@dataclasses.dataclass(frozen=True)
class Summary:
    """All rows, in the order of the product. `command`: how to do it again, and how to go on."""

    rows: tuple[Row, ...]
    command: str
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """1 where any disagreed, else 3 where any could not be made, else 0."""
        codes = {row.verdict.exit_code for row in self.rows}
        return next((code for code in (DISAGREED_CODE, COULD_NOT_CODE) if code in codes), 0)

    @property
    def counts(self) -> Mapping[BuildStatus, int]:
        """Rows by verdict, in the order of `Verdict`."""
        found = collections.Counter(row.verdict for row in self.rows)
        return {verdict: found[verdict] for verdict in BuildStatus if found[verdict]}

    @property
    def kept(self) -> int:
        """Bundles that an earlier run made."""
        return sum(row.is_kept for row in self.rows)

    def sentence(self) -> str:
        """Such as `24 bundles: 22 agreed (20 kept from before), 2 failed.`"""
        parts = []
        for verdict, count in self.counts.items():
            kept = f" ({self.kept} kept from before)" if verdict is BuildStatus.AGREED and self.kept else ""
            parts.append(f"{count} {verdict.value}{kept}")
        return f"{len(self.rows)} bundle{'' if len(self.rows) == 1 else 's'}: {', '.join(parts)}."

    def replacing(self, row: Row) -> Summary:
        """With one row changed, found by its name."""
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
    """For a terminal; why there is no bundle stands below its row."""
    width = max((len(row.name) for row in rows), default=0)
    head = f"{'bundle':<{width}}  verdict    evidence   rel. L2       MB  kernels    time"
    lines = [head.rstrip()]
    for row in rows:
        lines.append(f"{row.name:<{width}}  {_cells(row)}".rstrip())
        if row.problem:
            lines.append(f"{'':4}{row.problem}")
    return escaped(lines)


def _cells(row: Row) -> str:
    error = "" if row.rel_l2 is None else f"{row.rel_l2:.2e}"
    size = "" if row.bundle_bytes is None else f"{row.bundle_bytes / 1e6:,.1f}"
    kernels = "" if row.kernels is None else f"{row.kernels}"
    time = "kept" if row.is_kept else "" if row.seconds is None else f"{row.seconds:.0f} s"
    return f"{row.verdict.value:<10} {row.level or '':<9} {error:>9} {size:>8} {kernels:>8} {time:>7}"


_STATES = {BuildStatus.AGREED: "good", BuildStatus.DISAGREED: "bad", BuildStatus.FAILED: "bad"}


def page_of_zoo(summary: Summary) -> str:
    """The page as text. Raises MissingPackageError without jinja2."""
    made = [row for row in summary.rows if row.verdict is BuildStatus.AGREED]
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
    if verdicts & {BuildStatus.DISAGREED, BuildStatus.FAILED}:
        return "bad"
    return "partial" if verdicts & {BuildStatus.RUNNING, BuildStatus.WAITING} else "good"


def heading(summary: Summary) -> str:
    """The verdict in a few words."""
    counts = summary.counts
    if counts.get(BuildStatus.DISAGREED):
        return f"{plural(counts[BuildStatus.DISAGREED], 'model')} disagreed with PyTorch"
    if counts.get(BuildStatus.FAILED):
        return f"{plural(counts[BuildStatus.FAILED], 'bundle')} could not be made"
    if set(counts) - {BuildStatus.AGREED}:
        return "Not all bundles are made yet"
    return "All bundles agree with PyTorch in FP32"


def link(row: Row) -> str | None:
    """The report's page, as a browser takes it: relative, so that the directory may move."""
    return None if row.report is None else urllib.parse.quote(os.fsencode(row.report))

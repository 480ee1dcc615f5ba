"""The page of a zoo in every state, and in a real browser where there is one."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from spach_deploy.pipeline.zoo.child import ProcessEnd
from spach_deploy.pipeline.zoo.outcome import (
    BuildStatus,
    Row,
    Summary,
    as_table,
    ended_row,
    heading,
    link,
    page_of_zoo,
    state,
)
from tests.report.browser import PROGRAM, Browser

AGREED = Row(
    "ms_hybrid_s+-fp16-sm89",
    "ms_hybrid_s+",
    "fp16",
    ("sm89",),
    BuildStatus.AGREED,
    level="graph",
    rel_l2=1.2e-3,
    bundle_bytes=142_000_000,
    plan_bytes=71_000_000,
    kernels=155,
    seconds=41.0,
    report="ms_hybrid_s+-fp16-sm89/report.html",
)
FAILED = dataclasses.replace(
    AGREED, name="b", verdict=BuildStatus.FAILED, problem="It cannot be.", said=("Error: It cannot be.",), report=None
)


def of(*verdicts: BuildStatus) -> Summary:
    rows = (dataclasses.replace(AGREED, name=f"b{n}", verdict=verdict) for n, verdict in enumerate(verdicts))
    return Summary(tuple(rows), "spach-export --zoo 'ms_*' -o zoo")


@pytest.mark.parametrize(
    ("verdicts", "code", "colour", "words"),
    [
        ((BuildStatus.AGREED, BuildStatus.AGREED), 0, "good", "All bundles agree with PyTorch in FP32"),
        ((BuildStatus.AGREED, BuildStatus.FAILED), 3, "bad", "1 bundle could not be made"),
        ((BuildStatus.FAILED, BuildStatus.DISAGREED), 1, "bad", "1 model disagreed with PyTorch"),
        ((BuildStatus.AGREED, BuildStatus.WAITING), 3, "partial", "Not all bundles are made yet"),
        ((BuildStatus.AGREED, BuildStatus.RUNNING), 3, "partial", "Not all bundles are made yet"),
    ],
)
def test_the_worst_decides(verdicts: tuple[BuildStatus, ...], code: int, colour: str, words: str) -> None:
    summary = of(*verdicts)
    assert (summary.exit_code, state(summary), heading(summary)) == (code, colour, words)
    assert words in page_of_zoo(summary)


def test_a_link_is_one_that_a_browser_takes() -> None:
    assert link(AGREED) == "ms_hybrid_s%2B-fp16-sm89/report.html"
    assert link(FAILED) is None


def test_graphs_without_an_engine_are_not_said_to_lack_a_gpu() -> None:
    with_plan, without = AGREED, dataclasses.replace(AGREED, plan_bytes=None)
    assert "because no GPU" in page_of_zoo(Summary((with_plan,), "spach-export"))
    assert "because no GPU" not in page_of_zoo(Summary((without,), "spach-export"))


def test_the_table_says_why_there_is_no_bundle() -> None:
    lines = as_table((AGREED, FAILED)).splitlines()
    assert lines[1].split() == ["ms_hybrid_s+-fp16-sm89", "agreed", "graph", "1.20e-03", "142.0", "155", "41", "s"]
    assert lines[-1].strip() == "It cannot be."


def test_an_export_that_says_it_succeeded_without_a_bundle_failed(tmp_path: Path) -> None:
    row = ended_row(AGREED, ProcessEnd(0, (), 1.0), tmp_path / "nothing")
    assert row.verdict is BuildStatus.FAILED
    assert "does not exist" in row.problem


@pytest.mark.browser
@pytest.mark.skipif(
    not PROGRAM and not os.environ.get("SPACH_REQUIRE_BROWSER"), reason="no Chromium here (apt install chromium)"
)
def test_the_page_is_quiet_and_fits_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "summary.html"
    page.write_text(page_of_zoo(Summary((AGREED, FAILED), "spach-export --zoo 'ms_*' -o zoo")))
    with Browser() as browser:
        for width in (1280, 400):
            for scheme in ("light", "dark"):
                seen = browser.open(page, width=width, scheme=scheme)
                assert (seen.console, seen.requests, seen.wide) == ((), (page.as_uri(),), ())
                assert seen.scroll_width == seen.client_width == width

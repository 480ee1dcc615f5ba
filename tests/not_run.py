"""The last line of a test run: how many tests of each kind were not run here, and what would run them.

Hooks of pytest, imported by conftest.py. With xdist the workers leave tests out, and say so at their end.
"""

from __future__ import annotations

import collections
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import pytest

HOW = {
    "slow": "scripts/test -m slow",
    "triton": "scripts/test -m triton",
    "helm": "scripts/test -m helm",
    "ray": ".venv/bin/pip install -c constraints.txt ray && scripts/test -m ray",
    "browser": "apt-get install chromium && scripts/test -m browser",
    "mingw": "apt-get install g++-mingw-w64-x86-64 cmake ninja-build && scripts/test -m mingw",
    "wine": "apt-get install wine64 g++-mingw-w64-x86-64 && scripts/windows_python && scripts/test -m wine",
    "cpp": "apt-get install g++ cmake ninja-build && scripts/onnxruntime_headers && scripts/test -m cpp",
    "gpu": "scripts/test -m gpu, where there is an NVIDIA GPU",
}
"""What runs the tests of each mark that are left out by pyproject.toml's selection or skip themselves."""

_MARK = "mark"
_KEY = pytest.StashKey[dict[str, int]]()


def as_line(skipped: Iterable[pytest.TestReport | pytest.CollectReport], left_out: dict[str, int]) -> str:
    """`skipped` by their marks or reasons, and the numbers that were `left_out` by mark; empty where all were run."""
    numbers = collections.Counter(left_out)
    numbers.update(_kind(report) for report in skipped)
    ordered = sorted(numbers, key=lambda kind: (kind not in HOW, kind))
    said = (f"{numbers[kind]} {kind}" + (f": {HOW[kind]}" if kind in HOW else "") for kind in ordered)
    return f"Not run: {'; '.join(said)}." if numbers else ""


def _kind(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Its mark, else the reason it gives. A module that skips itself has no mark."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    mark = dict(getattr(report, "user_properties", ())).get(_MARK)
    return str(mark) if mark else f"({reason.removeprefix('Skipped: ')})"


def _mark(item: pytest.Item) -> str:
    return next((mark for mark in HOW if item.get_closest_marker(mark)), "")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A report's keywords are its marks and the names of its folders: of both, say which is the mark."""
    report = yield
    report.user_properties.append((_MARK, _mark(item)))
    return report


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count those that pyproject.toml's selection leaves out; what -k leaves out was not wanted."""
    config = items[0].config
    if not config.option.keyword:
        config.stash[_KEY] = dict(collections.Counter(mark for mark in map(_mark, items) if mark))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that started this worker."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_KEY, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker has left out the same."""
    node.config.stash[_KEY] = getattr(node, "workeroutput", {}).get("left_out", {})


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
    """After everything else."""
    yield
    if line := as_line(terminalreporter.stats.get("skipped", ()), config.stash.get(_KEY, {})):
        terminalreporter.write_line(line, yellow=True)

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.not_run import HOW

TESTS = """
import pytest

@pytest.mark.slow
def test_benchmark(): pass

@pytest.mark.triton
@pytest.mark.parametrize("n", range(3))
def test_server(n): pass

@pytest.mark.ray
def test_cluster(): pytest.skip("ray is not installed")

def test_linter(): pytest.skip("hadolint is not installed")

def test_sum(): assert 1 + 1 == 2
"""
SELECTION = "[pytest]\naddopts = -m 'not slow and not triton'\nmarkers =\n slow\n triton\n ray\n"
MODULE = "import pytest\npytest.importorskip('no_such_package')\ndef test_nothing(): pass\n"


def last_lines(folder: Path, *options: str) -> list[str]:
    (folder / "conftest.py").write_text("from tests.not_run import *\n")
    (folder / "pytest.ini").write_text(
        "[pytest]\naddopts = -m 'not slow and not triton'\nmarkers =\n slow\n triton\n ray\n"
    )
    (folder / "triton").mkdir()  # the name of a folder is no mark
    (folder / "triton/test_some.py").write_text(TESTS)
    (folder / "triton/test_module.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *options, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()[-2:]


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_a_run_ends_with_what_was_not_run_and_what_would_run_it(workers: tuple[str, ...], tmp_path: Path) -> None:
    line, summary = last_lines(tmp_path, *workers)
    assert line == (
        f"Not run: 1 ray: {HOW['ray']}; 1 slow: {HOW['slow']}; 3 triton: {HOW['triton']};"
        " 1 (could not import 'no_such_package': No module named 'no_such_package'); 1 (hadolint is not installed)."
    )
    assert "1 passed, 3 skipped" in summary


def test_what_was_not_asked_for_is_not_missed(tmp_path: Path) -> None:
    line, summary = last_lines(tmp_path, "-k", "sum", "-n", "0", "--ignore", str(tmp_path / "triton/test_module.py"))
    assert "Not run" not in line
    assert "1 passed, 6 deselected" in summary


def test_every_mark_says_what_runs_it() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\nmarkers = [")[2].partition("\n]")[0]
    assert set(re.findall(r'^ +"(\w+):', text, re.MULTILINE)) == set(HOW)

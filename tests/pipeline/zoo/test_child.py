"""One export in a process of its own: how it ends is told, and it does not outlive its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spach_deploy.common.processes import environment
from spach_deploy.pipeline.zoo.child import ExportProcess, ProcessEnd
from tests.commands import ROOT

PATIENCE_S = 30.0


def python(code: str, cores: frozenset[int] | None = None) -> ExportProcess:
    return ExportProcess([sys.executable, "-c", code], cores=cores)


def end_of(child: ExportProcess) -> ProcessEnd:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if (ended := child.poll()) is not None:
            return ended
        time.sleep(0.01)
    raise AssertionError("it did not end")


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit('Note\\nError: It cannot be. Do this.')", 1, "It cannot be. Do this."),
        ("import sys; print('odd', file=sys.stderr); sys.exit(7)", 7, "Ended with exit code 7, saying: odd"),
        ("import sys; sys.exit(3)", 3, "Ended with exit code 3 without a word."),
        ("import os; os.kill(os.getpid(), 9)", -9, "too little memory"),
        ("import os; os.kill(os.getpid(), 11)", -11, "SIGSEGV: a crash in native code."),
        ("import os; os.kill(os.getpid(), 44)", -44, "Ended by signal 44."),
    ],
)
def test_how_it_ended_is_told(code: str, exit_code: int, words: str) -> None:
    ended = end_of(python(code))
    assert ended.code == exit_code
    assert words in ended.sentence
    assert bool(ended.sentence) == bool(exit_code)
    assert ended.peak_bytes is None or ended.peak_bytes > 1e6


def test_only_its_last_lines_are_kept() -> None:
    ended = end_of(python("import sys\nfor i in range(9999): print('line', i, file=sys.stderr)"))
    assert len(ended.said) == 20
    assert ended.said[-1] == "line 9998"


def test_it_computes_on_the_cores_it_is_given() -> None:
    core = min(os.sched_getaffinity(0))
    code = f"import os, sys; sys.exit(os.sched_getaffinity(0) != {{{core}}} or os.environ['OMP_NUM_THREADS'] != '1')"
    assert end_of(python(code, cores=frozenset({core}))).code == 0


def test_an_interrupted_one_may_clean_up_and_a_deaf_one_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spach_deploy.pipeline.zoo.child._GRACE_S", 0.5)
    good = python("import time, sys\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    sys.exit(130)")
    deaf = python("import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)")
    time.sleep(0.4)
    for child in (good, deaf):
        child.interrupt()
    for child in (good, deaf):
        child.stop()
    assert end_of(good).code == 130
    assert end_of(deaf).code == -signal.SIGKILL


CHILD = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w', 1)); time.sleep(60)"
PARENT = f"""
import sys, time
from spach_deploy.pipeline.zoo.child import ExportProcess
child = ExportProcess([sys.executable, "-c", {CHILD!r}, sys.argv[1]])
time.sleep(60)
"""


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(file)], cwd=ROOT)
    end = time.monotonic() + PATIENCE_S
    while not (file.exists() and file.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.02)
    pid = int(file.read_text())
    parent.kill()
    parent.wait()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_nothing_is_imported_from_where_the_user_stands() -> None:
    assert environment(None)["PYTHONSAFEPATH"] == "1"
    assert environment(3)["OMP_NUM_THREADS"] == "3"

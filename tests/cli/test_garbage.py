"""A command in a process of its own seldom looks for garbage; one that is called from Python changes nothing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from spach_deploy.cli.export import main
from spach_deploy.cli.garbage import THRESHOLDS

ROOT = Path(__file__).parents[2]
PROGRAM = """
import atexit, gc, sys

class Last:
    def __del__(self):
        print("taken apart", flush=True)

last = Last()
from spach_deploy.cli import garbage
with garbage.seldom_searched():
    atexit.register(lambda: print(gc.get_threshold(), flush=True))
    sys.stdout.write("said, not flushed\\n")
    END
"""


def run(script: Path, program: str) -> subprocess.CompletedProcess[str]:
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("end", "code", "is_quick"),
    [
        ("sys.exit(3)", 3, True),
        ("sys.exit(0)", 0, True),
        ("sys.exit()", 0, True),
        ("sys.exit('words')", 1, True),
        ("raise ValueError", 1, False),
        ("pass", 0, False),
    ],
)
def test_the_end_of_a_process(end: str, code: int, is_quick: bool, tmp_path: Path) -> None:
    done = run(tmp_path / "spach-test", PROGRAM.replace("END", end))
    assert done.returncode == code
    expected = ["said, not flushed", str(THRESHOLDS), *([] if is_quick else ["taken apart"])]
    assert done.stdout.splitlines() == expected
    assert ("words" in done.stderr) == ("words" in end)


@pytest.mark.parametrize(("name", "change"), [("another", ""), ("spach-test", "; sys.argv = ['spach-other']")])
def test_a_part_of_another_program_ends_as_python_does(name: str, change: str, tmp_path: Path) -> None:
    program = PROGRAM.replace("last = Last()", f"last = Last(){change}").replace("END", "sys.exit(3)")
    done = run(tmp_path / name, program)
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1] == "taken apart"
    assert (str(THRESHOLDS) in done.stdout) == (not change)


def test_a_command_ends_so(tmp_path: Path) -> None:
    program = "import sys; from spach_deploy.cli.export import main; sys.argv.append('--list'); main()"
    done = run(tmp_path / "spach-export", program)
    assert done.returncode == 0
    assert "ms_hybrid_s" in done.stdout
    assert done.stderr == ""


LOADING = """
import gc, sys
from spach_deploy.cli import garbage
with garbage.not_searched_while_loading():
    print(gc.isenabled())
print(gc.isenabled(), gc.get_freeze_count() > 0)
"""


@pytest.mark.parametrize(
    ("change", "said"), [("", ["False", "True True"]), ("sys.argv = ['spach-other']", ["True", "True False"])]
)
def test_nothing_is_searched_while_modules_load(change: str, said: list[str], tmp_path: Path) -> None:
    program = LOADING.replace("import gc, sys", f"import gc, sys\n{change}")
    assert run(tmp_path / "spach-test", program).stdout.splitlines() == said


def test_called_from_python() -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    CliRunner().invoke(main, ["--list"])
    assert (gc.get_threshold(), gc.get_freeze_count()) == before

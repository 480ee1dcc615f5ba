"""A command in a process of its own seldom looks for garbage; one that is called from Python changes nothing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from spach_deploy.cli.export import main
from spach_deploy.cli.garbage import THRESHOLDS

ROOT = Path(__file__).parents[2]
PROGRAM = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_threshold(), gc.get_freeze_count() > 0))  # runs last: registered first
from spach_deploy.cli.export import main
sys.argv = ["spach-export", "--list"]
main()
"""


def test_a_process_of_its_own() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{THRESHOLDS} True"


def test_called_from_python() -> None:
    before = gc.get_threshold()
    CliRunner().invoke(main, ["--list"])
    assert gc.get_threshold() == before

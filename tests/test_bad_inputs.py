"""A sample of the thousand bad inputs of `benchmarks/bad_inputs.py`: of many kinds, and what once broke something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from pathlib import Path
from benchmarks.bad_inputs import KINDS, SEED, Id, run_all, sample, warm_up

BROKE = {"graph, bytes": 22, "graph, edited": 15, "graph, weights elsewhere": 2, "manifest": 45, "target": 5,
         "recipe, values": 11, "recipe, other file": 5, "labels, names": 10, "repository, config.pbtxt": 2}
folder = Path(sys.argv[1])
warm_up(folder)
known = [Id(kind, BROKE[kind.name], SEED) for kind in KINDS if kind.name in BROKE]
assert len(known) == len(BROKE)
found = {str(judged.id): judged.findings for judged in run_all([*known, *sample(12, seed=1)], folder, workers=1)}
assert len(found) >= 18, found
for name, findings in found.items():
    for finding in findings:
        print(f"{name}: {finding}")
"""


def test_none_of_a_sample_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "boxes").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "boxes")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""

"""ONNX Runtime's wheels report to their maker unless told otherwise; nobody who converts a model asked for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUPPRESSING = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI")


def imported(program: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in SUPPRESSING}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True).stdout


def test_onnx_runtime_leaves_no_identity_of_this_machine(tmp_path: Path) -> None:
    imported("import spach_deploy, onnxruntime", TMPDIR=str(tmp_path), HOME=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_user_who_wants_to_report_may() -> None:
    program = "import spach_deploy, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert imported(program, ORT_DISABLE_TELEMETRY="0") == "0\n"

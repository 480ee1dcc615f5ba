from __future__ import annotations

import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from spach_deploy.benchmark import rounds


def fake_nvidia_smi(folder: Path, body: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_clocks_of_gpus_come_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = "NVIDIA A10, 580.1, 1695 MHz, 1710 MHz, 6251 MHz, 41, 88.20 W, 812 MiB"
    fake_nvidia_smi(tmp_path, f"echo '{row}'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (gpu,) = rounds.gpus()
    assert (gpu["name"], gpu["clocks.sm"], gpu["memory.used"]) == ("NVIDIA A10", "1695 MHz", "812 MiB")
    assert rounds.facts_after()["gpus_after"] == [gpu]


def test_a_driver_that_fails_or_hangs_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, "echo 'NVIDIA-SMI has failed'; exit 9")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert rounds.gpus() == []

    def hangs(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert rounds.gpus() == []


def test_without_nvidia_smi_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert rounds.gpus() == []

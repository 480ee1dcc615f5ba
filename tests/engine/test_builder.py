"""The process that builds an engine: its result, its errors, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spach_deploy.common.errors import BuildError, MissingPackageError
from spach_deploy.engine.build import start_build
from spach_deploy.engine.flavours import TensorRT
from spach_deploy.options.specs import ComputeCapability, EngineTarget, Precision
from spach_deploy.runtime.devices import LocalGpu

ROOT = Path(__file__).parents[2]
FAKES = Path(__file__).parent / "fakes/site-packages"
HERE = TensorRT(gpus=(LocalGpu("NVIDIA A10", ComputeCapability(8, 6)),))
PATIENCE_S = 30


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A graph that a fake of TensorRT builds."""
    parts = (str(FAKES / "tensorrt_11_4"), str(FAKES / "common"), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, parts)))
    layers = [{"name": "head", "kind": "MATRIX_MULTIPLY", "dtype": "HALF"}]
    path = tmp_path / "graph"
    path.write_text(
        json.dumps({"inputs": [["images", "FLOAT", [-1, 3, 8, 8]]], "layers": layers, "version": [11, 4, 0]})
    )
    return path


def children() -> set[int]:
    """Processes of this one."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


def is_gone(pid: int) -> bool:
    """Whether a process ends soon."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_a_process_of_its_own_builds_and_is_gone(graph: Path) -> None:
    with start_build(graph, EngineTarget(), HERE, precision=Precision.FP16) as build:
        result = build.result()
    assert result.flavour_version.startswith("11.4.0")
    assert result.plan


def test_a_block_that_is_left_ends_the_build(graph: Path) -> None:
    before = children()
    with start_build(graph, EngineTarget(), HERE, precision=Precision.FP16) as build:
        (pid,) = children() - before
    assert is_gone(pid)
    assert build.done()


def test_one_that_was_killed_is_an_error(graph: Path) -> None:
    before = children()
    with start_build(graph, EngineTarget(), HERE, precision=Precision.FP16) as build:
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(BuildError, match="ended by SIGKILL"):
            build.result()


def test_a_compiler_that_is_missing_is_told(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKES / "common"))
    with (
        start_build(graph, EngineTarget(), HERE, precision=Precision.FP16) as build,
        pytest.raises(MissingPackageError, match="tensorrt"),
    ):
        build.result()


def test_it_does_not_outlive_a_parent_that_is_killed(graph: Path) -> None:
    program = f"""
import os, sys
from pathlib import Path
from spach_deploy.engine.build import start_build
from spach_deploy.options.specs import EngineTarget, Precision
from tests.engine.test_builder import HERE, children
with start_build(Path({str(graph)!r}), EngineTarget(), HERE, precision=Precision.FP16):
    print(*children(), flush=True)
    os.kill(os.getpid(), 9)
"""
    paths = os.pathsep.join((str(ROOT), os.environ["PYTHONPATH"]))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    (pid,) = map(int, done.stdout.split())
    assert is_gone(pid)

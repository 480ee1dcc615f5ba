"""A process that is there to build before there is anything to build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spach_deploy.common.errors import BuildError, MissingPackageError
from spach_deploy.engine import flavours
from spach_deploy.engine.build import Builder, start_build
from spach_deploy.engine.flavours import TensorRT
from spach_deploy.options.specs import ComputeCapability, EngineTarget, Flavour, Precision
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


def test_the_process_that_waits_builds(graph: Path) -> None:
    with (
        Builder(Flavour.TENSORRT) as builder,
        start_build(graph, EngineTarget(), HERE, precision=Precision.FP16, builder=builder) as build,
    ):
        result = build.wait()
    assert result.flavour_version.startswith("11.4.0")
    assert result.plan
    assert is_gone(builder.process.pid)


def test_one_that_is_not_needed_ends(graph: Path) -> None:
    with Builder(Flavour.TENSORRT) as builder:
        assert builder.process.poll() is None
    assert builder.process.returncode is not None


def test_there_is_none_where_no_engine_is_wanted() -> None:
    with Builder.for_flavour(Flavour.NONE) as builder:
        assert builder is None


def test_one_that_cannot_build_here_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavours, "is_installed", lambda flavour: False)
    with pytest.raises(MissingPackageError, match="tensorrt"):
        Builder.for_flavour(Flavour.TENSORRT)


def test_one_that_was_killed_before_there_was_a_graph_is_an_error(graph: Path) -> None:
    with Builder(Flavour.TENSORRT) as builder:
        builder.end()
        with (
            start_build(graph, EngineTarget(), HERE, precision=Precision.FP16, builder=builder) as build,
            pytest.raises(BuildError, match="ended by SIGKILL"),
        ):
            build.wait()


def test_a_compiler_that_is_missing_is_told_when_an_engine_is_wanted(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKES / "common"))
    with (
        Builder(Flavour.TENSORRT) as builder,
        start_build(graph, EngineTarget(), HERE, precision=Precision.FP16, builder=builder) as build,
        pytest.raises(MissingPackageError, match="tensorrt"),
    ):
        build.wait()


def test_it_does_not_outlive_a_parent_that_is_killed() -> None:
    program = """
import os
from spach_deploy.engine import flavours
from spach_deploy.engine.build import Builder
from spach_deploy.options.specs import Flavour
builder = Builder(Flavour.TENSORRT)
print(builder.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert is_gone(int(done.stdout))

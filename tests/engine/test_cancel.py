"""Ctrl-C, and the death of the process that waits, end a build that would otherwise go on for ten minutes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

FAKES = Path(__file__).parent / "fakes/site-packages"
ROOT = Path(__file__).parents[2]
FOREVER_S = 600
PATIENCE_S = 30

SCRIPT = """
import signal, subprocess, sys
from pathlib import Path
from spach_deploy.engine.build import start_build
from spach_deploy.engine.flavours import TensorRT
from spach_deploy.runtime.devices import LocalGpu
from spach_deploy.options.specs import ComputeCapability, EngineTarget, Precision

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
here = TensorRT(gpus=(LocalGpu("NVIDIA A10", ComputeCapability(8, 6)),))


def tell(event):
    print("under way", flush=True)


try:
    graph = Path(sys.argv[1])
    with start_build(graph, EngineTarget(), here, precision=Precision.FP16, on_progress=tell) as build:
        build.result()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that waits for an endless build, which has begun."""
    graph = tmp_path / "graph"
    graph.write_text(
        json.dumps({"inputs": [["x", "FLOAT", [-1, 4]]], "version": [11, 4, 0], "builder_sleeps": FOREVER_S})
    )
    path = os.pathsep.join([str(ROOT), str(FAKES / "tensorrt_11_4"), str(FAKES / "common")])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(graph)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "under way\n"
    with process:
        yield process
        process.kill()


def worker_of(process: subprocess.Popen[str]) -> int:
    """The child that builds."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the build goes on"
        time.sleep(0.02)


def test_ctrl_c_ends_the_build_and_raises_keyboard_interrupt(waiting: subprocess.Popen[str]) -> None:
    worker = worker_of(waiting)
    waiting.send_signal(signal.SIGINT)
    output, _ = waiting.communicate(timeout=PATIENCE_S)
    assert output.splitlines()[-1] == "interrupted"
    assert waiting.returncode == 0
    wait_until_gone(worker)


def test_the_build_does_not_outlive_the_process_that_waits(waiting: subprocess.Popen[str]) -> None:
    worker = worker_of(waiting)
    waiting.kill()
    waiting.wait(timeout=PATIENCE_S)
    wait_until_gone(worker)

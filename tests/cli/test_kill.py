"""Exports that are killed and interrupted: whatever happens, the old bundle or the new one is there, whole."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spach_deploy.bundle import Bundle
from tests.commands import console_script, contents
from tests.test_bundle import write

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)

# A small model of the tests' own, so that a whole export takes seconds; everything else is the command itself.
REGISTER = """
from spach_deploy.models.configs import CONFIGS, SpachConfig
CONFIGS["small"] = SpachConfig(16, 8, 2, (("conv", "trans"),), num_heads=2)
"""
SMALL = "--model small --image-size 32 --num-classes 11 -v --overwrite"
ENGINE = ("--engine", "tensorrt-rtx", "--gpu", "sm89")
PATIENCE_S = 60.0


class Running:
    """An export of its own session, whose progress is read as it comes."""

    def __init__(self, script: Path, target: Path, engine: tuple[str, ...] = ENGINE) -> None:
        call = [str(script), *SMALL.split(), *engine, "-o", str(target)]
        self.process = subprocess.Popen(
            call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._readers = [threading.Thread(target=self._read), threading.Thread(target=self._drain)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()

    def _drain(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.read()

    def wait_for(self, phase: str) -> None:
        """Until the phase has ended."""
        with self._news:
            came = self._news.wait_for(lambda: any(line.startswith(phase) for line in self.lines), PATIENCE_S)
        assert came, self.lines

    def wait_for_builder(self) -> list[int]:
        """Until the process that builds the engine is there; its id."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and self.process.poll() is None:
            if found := children(self.process.pid):
                return found
            time.sleep(0.01)
        raise AssertionError(self.lines)

    def end(self) -> int:
        """Wait for it; its exit code."""
        code = self.process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        return code


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    return console_script("spach-export", tmp_path / "bin", before=REGISTER)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A bundle, alone in its directory."""
    write(tmp_path / "bundles" / "b", b"first")
    return tmp_path / "bundles" / "b"


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(status[1]) == pid and status[0] != "Z":
                    found.append(int(entry.name))
    return found


def gone(pids: list[int]) -> bool:
    """Whether all of the processes end soon."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.02)
    return False


def kill(running: Running, after_s: float) -> list[int]:
    """SIGKILL after a while; the children that it had then."""
    time.sleep(after_s)
    orphans = children(running.process.pid)
    running.process.kill()
    running.end()
    return orphans


MOMENTS = (
    "load the model",
    "rewrite and prove",
    "write the graph",
    "validate the graph",
    "wait for the engine",
    "validate the engine",
)
"""Phases at whose end, or soon after, the kills of the quick test fall."""


def test_kills_at_random_moments_leave_a_whole_bundle_and_no_process(script: Path, target: Path) -> None:
    chance = random.Random(20)
    orphans = leftovers = 0
    for moment in MOMENTS:
        running = Running(script, target)
        running.wait_for(moment)
        left = kill(running, chance.uniform(0.0, 0.3))
        assert gone(left), moment
        orphans += len(left)
        leftovers += len(os.listdir(target.parent)) - 1
        assert Bundle.open(target).plan is not None, moment
    assert orphans > 0  # at least one kill fell into the build
    assert leftovers > 0  # and what some had begun was lying beside the bundle
    last = Running(script, target, ("--engine", "none"))
    assert last.end() == 0
    assert os.listdir(target.parent) == ["b"]
    assert Bundle.open(target).manifest.model["name"] == "small"


@pytest.mark.slow
def test_kills_at_many_random_moments(script: Path, target: Path) -> None:
    """Over the whole length of an export, from start to end."""
    start = time.monotonic()
    assert Running(script, target).end() == 0
    whole_s = time.monotonic() - start
    chance = random.Random(21)
    for _ in range(40):
        left = kill(Running(script, target), chance.uniform(0.0, 1.1 * whole_s))
        assert gone(left)
        assert Bundle.open(target).plan is not None
    assert Running(script, target).end() == 0
    assert os.listdir(target.parent) == ["b"]


@contextlib.contextmanager
def interrupted(script: Path, target: Path) -> Iterator[Running]:
    """An export that the block brings to a moment, at which Ctrl-C strikes; what must hold afterwards."""
    before = contents(target.parent)
    running = Running(script, target)
    yield running
    builders = children(running.process.pid)
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 130
    assert gone(builders)
    assert running.lines[-1] == f"Interrupted. Nothing was written; {target} is as it was."
    assert not [line for line in running.lines if "Traceback" in line or line.startswith("Error")]
    assert contents(target.parent) == before
    assert os.listdir(target.parent) == ["b"]


def test_ctrl_c_while_the_graph_is_made(script: Path, target: Path) -> None:
    with interrupted(script, target) as running:
        running.wait_for("rewrite and prove")
        time.sleep(0.3)


def test_ctrl_c_while_the_engine_is_built(script: Path, target: Path) -> None:
    with interrupted(script, target) as running:
        builders = running.wait_for_builder()
        time.sleep(0.5)
    assert builders


@pytest.mark.slow
def test_ctrl_c_at_many_random_moments(script: Path, target: Path) -> None:
    """From 0.3 s on: before that Python itself is starting, and has nothing of ours to end well."""
    chance = random.Random(22)
    for _ in range(40):
        with interrupted(script, target):
            time.sleep(chance.uniform(0.3, 8.0))


def test_ctrl_c_where_nothing_was(script: Path, tmp_path: Path) -> None:
    running = Running(script, tmp_path / "new" / "b")
    running.wait_for("load the model")
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 130
    assert running.lines[-1] == "Interrupted. Nothing was written."
    assert not (tmp_path / "new").exists()

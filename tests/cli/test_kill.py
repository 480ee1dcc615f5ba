"""Exports that are killed and interrupted: whatever happens, the old bundle or the new one is there, whole."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from spach_deploy.bundle.store import Bundle
from tests.bundle.test_bundle import write
from tests.commands import console_script, contents

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)

REGISTER = """
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.options.architecture import Architecture
ARCHITECTURES["small"] = Architecture(
    width=16, patch_size=8, channel_ratio=2, stages=((("conv", 1), ("trans", 1)),), heads=2
)
"""
"""A small model of the tests' own, so that an export takes seconds; everything else is the command itself."""

ARGUMENTS = (
    *("--model", "small", "--image-size", "32", "--num-classes", "11", "-v", "--overwrite"),
    *("--engine", "tensorrt-rtx", "--gpu", "sm89"),
)
PATIENCE_S = 60.0


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    return console_script("spach-export", tmp_path / "bin", before=REGISTER)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A bundle, alone in its directory."""
    write(tmp_path / "bundles" / "b", b"first")
    return tmp_path / "bundles" / "b"


def beside(target: Path) -> list[str]:
    """What else lies in the bundle's directory."""
    return [name for name in os.listdir(target.parent) if name != target.name]


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == pid and state != "Z":
                    found.append(int(entry.name))
    return found


def wait_for_build(pid: int, target: Path, lying: Collection[str] = ()) -> list[int]:
    """Until the engine is being built, beside what was `lying` there; the process that builds it, and others below
    `pid`.
    """
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        found = children(pid)
        begun = [target.parent / name / "golden.npz" for name in beside(target) if name not in lying]
        if any(builds(child) for child in found) and any(file.exists() for file in begun):
            return found
        time.sleep(0.01)
    raise AssertionError("no engine was built")


def builds(pid: int) -> bool:
    """Whether a process builds an engine."""
    with contextlib.suppress(OSError):
        return b"spach_deploy.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def gone(pids: list[int]) -> bool:
    """Whether all of the processes end soon."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.02)
    return False


# Many moments: exports that are forks of a process which has loaded and traced everything once

SERVER = """
import json, os

import spach_deploy.pipeline.export
from spach_deploy.cli.export import main as command


def serve():
    for line in sys.stdin:
        arguments, output = json.loads(line)
        process = os.fork()
        if process == 0:
            export(arguments, output)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    os._exit(0)


def export(arguments, output):
    os.setsid()
    written = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.argv[1:] = arguments
    try:
        command()
    except SystemExit as end:  # without Python's own end: threads of C++ libraries did not come along in the fork
        sys.stdout.flush()
        os._exit(end.code)


try:
    command()  # once, so that all is loaded and warm
except SystemExit as end:
    assert not end.code
print("ready", flush=True)
serve()
"""


class Server:
    """Forks exports, one after the other."""

    def __init__(self, folder: Path, target: Path) -> None:
        self._output = folder / "output"
        self._arguments = [*ARGUMENTS, "-o", str(target)]
        script = console_script("spach-export", folder, before=REGISTER + SERVER)
        call = [str(script), *self._arguments]
        self.process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while self._line() != "ready":
            pass

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server ended"
        return line.rstrip("\n")

    def start(self) -> int:
        """Start an export; its process."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([self._arguments, str(self._output)]) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def end(self) -> tuple[int, list[str]]:
        """Exit code of the export, and what it said."""
        code = int(self._line())
        lines = self._output.read_text().splitlines() if self._output.exists() else []
        self._output.unlink(missing_ok=True)
        return code, lines


@pytest.fixture
def server(tmp_path: Path, target: Path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server", target)
    yield server
    with server.process:
        assert server.process.stdin is not None
        server.process.stdin.close()


def strike(server: Server, target: Path, process: int, number: int) -> None:
    """Send a signal to an export, which may have ended; the bundle is whole and no child lives."""
    lying = set(beside(target))
    had = children(process)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
    code, said = server.end()
    assert code in (0, 130 if number == signal.SIGINT else -number), said
    assert gone(had)
    assert Bundle.open(target).plan is not None
    if number == signal.SIGINT and code:
        assert said[-1].startswith("Interrupted."), said  # and nothing else, before anything could be written
        assert "Traceback (most recent call last):" not in said
        assert set(beside(target)) <= lying


def strike_often(server: Server, target: Path, times: int) -> None:
    """Kill or interrupt exports at random moments of their whole length, and once while an engine is built."""
    start = time.monotonic()
    server.start()
    assert server.end()[0] == 0
    whole_s = time.monotonic() - start
    chance = random.Random(20)
    for turn in range(times):
        process = server.start()
        time.sleep(chance.uniform(0.0, 1.1) * whole_s)
        strike(server, target, process, signal.SIGINT if turn % 3 == 2 else signal.SIGKILL)
    lying, before = beside(target), contents(target)
    process = server.start()
    wait_for_build(process, target, lying)
    strike(server, target, process, signal.SIGKILL)
    assert contents(target) == before
    assert beside(target)  # what it had begun
    server.start()
    assert server.end()[0] == 0
    assert not beside(target)


def test_kills_at_random_moments_leave_a_whole_bundle_and_no_process(server: Server, target: Path) -> None:
    strike_often(server, target, 3)


@pytest.mark.slow
def test_kills_at_many_random_moments(server: Server, target: Path) -> None:
    strike_often(server, target, 120)


# A process as a user starts it


class Running:
    """An export in a session of its own, whose progress is read as it comes."""

    def __init__(self, script: Path, target: Path) -> None:
        call = [str(script), *ARGUMENTS, "-o", str(target)]
        self.process = subprocess.Popen(
            call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()

    def wait_for(self, phase: str) -> None:
        """Until the phase has ended."""
        with self._news:
            came = self._news.wait_for(lambda: any(line.startswith(phase) for line in self.lines), PATIENCE_S)
        assert came, self.lines

    def end(self) -> int:
        """Wait for it; its exit code."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code


@contextlib.contextmanager
def interrupted(script: Path, target: Path, *, may_end: bool = False) -> Iterator[Running]:
    """An export that the block brings to a moment, at which Ctrl-C strikes; what must hold afterwards. `may_end`: it
    may have ended by then.
    """
    before = contents(target)
    running = Running(script, target)
    yield running
    builders = children(running.process.pid)
    running.process.send_signal(signal.SIGINT)
    code = running.end()
    assert gone(builders)
    if may_end and code == 0:
        Bundle.open(target)
        return
    assert code == 130
    if running.lines[-1] == f"Interrupted. The new bundle was written before that: {target} is complete.":
        Bundle.open(target)  # a busy machine's signal came after the end; then that has to be so, to the last hash
        return
    assert running.lines[-1] == f"Interrupted. Nothing was written; {target} is as it was."
    assert not [line for line in running.lines if "Traceback" in line or line.startswith("Error")]
    assert contents(target) == before
    assert not beside(target)


def test_ctrl_c_while_the_graph_is_made(script: Path, target: Path) -> None:
    with interrupted(script, target) as running:
        running.wait_for("rewrite the model")


def test_ctrl_c_while_the_engine_is_built(script: Path, target: Path) -> None:
    with interrupted(script, target) as running:
        wait_for_build(running.process.pid, target)


@pytest.mark.slow
def test_ctrl_c_at_many_random_moments(script: Path, target: Path) -> None:
    """From 0.3 s on: before that Python itself is starting, and has nothing of ours to end well."""
    chance = random.Random(22)
    for _ in range(40):
        with interrupted(script, target, may_end=True):
            time.sleep(chance.uniform(0.3, 7.0))


def test_ctrl_c_where_nothing_was(script: Path, tmp_path: Path) -> None:
    running = Running(script, tmp_path / "new" / "b")
    running.wait_for("load the model")
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 130
    assert running.lines[-1] == "Interrupted. Nothing was written."
    assert not (tmp_path / "new").exists()

"""A real tritonserver, started for a test and ended with everything that it started."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.packaging.triton.server_environment import environment, stub

_SHIM = Path(__file__).with_name("backend") / "model.py"
_START_SECONDS = 120
_SHARED_MEMORY = Path("/dev/shm")


class Server:
    """tritonserver on free ports of this machine, in a process group of its own."""

    def __init__(self, repositories: Sequence[Path], folder: Path, *arguments: str) -> None:
        self._repositories = repositories
        self.http, self.grpc, self.metrics = _free_ports(3)
        self._folder = folder
        self._arguments = arguments
        self._prefix = f"spach-test-{secrets.token_hex(4)}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What it said."""
        return (self._folder / "server.log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Its process, and its group."""
        assert self._process is not None
        return self._process.pid

    def start(self, *, wait: bool = True) -> None:
        """Start it and, with `wait`, return once all models are loaded. AssertionError with its log where it ends."""
        packages = environment()
        backends = _backends(packages, self._folder)
        with (self._folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command(packages, backends),
                env=_environ(packages),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if wait:
            assert self.wait_until_ready(), self.log[-6000:]

    def _command(self, packages: Path, backends: Path) -> list[str]:
        server = packages / "pytriton" / "tritonserver"
        return [
            str(server / "bin" / "tritonserver"),
            *(f"--model-repository={repository}" for repository in self._repositories),
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            f"--cache-directory={server / 'caches'}",
            "--disable-auto-complete-config",  # what is served is what is written, nothing guessed
            f"--http-port={self.http}",
            f"--grpc-port={self.grpc}",
            f"--metrics-port={self.metrics}",
            "--http-address=127.0.0.1",
            "--grpc-address=127.0.0.1",
            "--exit-timeout-secs=5",
            *self._arguments,
        ]

    def wait_until_ready(self) -> bool:
        """Whether it became ready before it ended."""
        end = time.monotonic() + _START_SECONDS
        while self.is_running() and time.monotonic() < end:
            if self.is_ready():
                return True
            time.sleep(0.05)
        return False

    def is_running(self) -> bool:
        """Whether the server's process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How its process ended, a signal as its negative number; None while it runs."""
        return None if self._process is None else self._process.poll()

    def is_ready(self) -> bool:
        """Whether it answers and has loaded all models."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """End the whole group at once, in the middle of whatever it does."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """End it: politely, then by force; wait for the whole group, and remove the shared memory that it left."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self.kill()
        end = time.monotonic() + 10
        while self.group_is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        for file in _SHARED_MEMORY.glob(f"{self._prefix}*"):
            file.unlink(missing_ok=True)

    def group_is_alive(self) -> bool:
        """Whether any process that it started is there, zombies left out."""
        assert self._process is not None
        return any(_group_of(entry) == self._process.pid for entry in Path("/proc").glob("[0-9]*"))

    def shared_memory(self) -> list[str]:
        """Names of its regions."""
        return [file.name for file in _SHARED_MEMORY.glob(f"{self._prefix}*")]


@contextlib.contextmanager
def serving(repositories: Sequence[Path], folder: Path, *arguments: str) -> Iterator[Server]:
    """A server of some repositories, ready; ended with the block. `folder` takes its log and backends."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(repositories, folder, *arguments)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _backends(packages: Path, folder: Path) -> Path:
    """A backend directory: the Python backend with the stub for this Python, and the shim under both names."""
    target = folder / "backends"
    if not target.exists():
        shutil.copytree(packages / "pytriton" / "tritonserver" / "backends" / "python", target / "python")
        shutil.copy(stub(packages), target / "python")
        for name in ("onnxruntime", "tensorrt"):
            (target / name).mkdir()
            shutil.copy(_SHIM, target / name)
    return target


def _environ(packages: Path) -> dict[str, str]:
    """Libraries beside the wheel, packages of its environment; nothing of this checkout."""
    root = packages.parents[2]
    return {
        "PATH": f"{root / 'bin'}:/usr/bin:/bin",
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "PYTHONPATH": str(packages),
        "OMP_NUM_THREADS": "1",
        "HOME": os.environ.get("HOME", "/"),
    }


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _group_of(process: Path) -> int | None:
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[2])

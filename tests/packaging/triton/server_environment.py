"""An environment with tritonserver, made once and kept: the wheel nvidia-pytriton carries the server.

It lies below ~/.cache/spach-deploy, or where SPACH_TRITON_ENV says. Where it cannot be made, say for want of a network,
tests are skipped with the reason; with SPACH_REQUIRE_TRITON=1, as in continuous integration, they fail instead.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REQUIREMENTS = (
    "nvidia-pytriton==0.7.0",
    "numpy<2",
    "onnxruntime",
    "pillow",
    "tritonclient[grpc,http]",
)
_STUBS = "pytriton/tritonserver/python_backend_stubs"


@functools.cache
def environment() -> Path:
    """The folder of packages of a complete environment. Skips or fails the test where there is none."""
    root = _root()
    root.parent.mkdir(parents=True, exist_ok=True)
    with (root.parent / f"{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it at once
        if not (root / "complete").exists() and (problem := _make(root)):
            give_up(f"no environment with tritonserver could be made: {problem}")
    packages = next(root.glob("lib/python3*/site-packages"))
    if not stub(packages).is_file():
        give_up(f"nvidia-pytriton has no stub for Python {_python()}")
    return packages


def stub(packages: Path) -> Path:
    """The program that runs Python backends, for this Python."""
    return packages / _STUBS / _python() / "triton_python_backend_stub"


def give_up(reason: str) -> None:
    """Skip, or fail where these tests are required."""
    if os.environ.get("SPACH_REQUIRE_TRITON") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _root() -> Path:
    if given := os.environ.get("SPACH_TRITON_ENV"):
        return Path(given)
    digest = hashlib.sha256(" ".join((*REQUIREMENTS, sys.version)).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "spach-deploy" / f"triton-{digest}"


def _make(root: Path) -> str:
    """Fill `root`; a sentence on what went wrong, or nothing."""
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        return "nvidia-pytriton is for x86-64 Linux"
    shutil.rmtree(root, ignore_errors=True)
    commands = (
        [sys.executable, "-m", "venv", str(root)],
        [str(root / "bin" / "python"), "-m", "pip", "install", "--quiet", "--retries=1", *REQUIREMENTS],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            return lines[-1] if lines else f"{command[1]} ended with {done.returncode}"
    (root / "complete").touch()
    return ""

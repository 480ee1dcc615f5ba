"""Other tools, each in a virtual environment of its own: what is installed, and what went wrong.

A tool that does not install is a reason in words, no error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

Run = Callable[[Sequence[str], float], "Ended"]
"""Runs a command within so many seconds."""

_INSTALL_SECONDS = 1200.0
_SHOWN = 110


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command's exit code and what it wrote."""

    code: int
    text: str


@dataclasses.dataclass(frozen=True)
class Peer:
    """A tool; `installs` are pip's arguments, one call each, in order."""

    name: str
    package: str
    version: str
    installs: tuple[tuple[str, ...], ...]

    @property
    def folder(self) -> str:
        """Of its environment: another one whenever what is installed changes."""
        digest = hashlib.sha256(repr((self.installs, sys.version_info[:2])).encode()).hexdigest()[:8]
        return f"{self.package}-{self.version}-{digest}"

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


# The local version: only a build for CPUs has it, so that where the index has none the tool is said not to install,
# rather than bring gigabytes of CUDA. First, so that what needs torch finds it there.
_TORCH = ("torch==2.13.0+cpu",)

PEERS = {
    "ort": Peer(
        "ONNX Runtime",
        "onnxruntime",
        "1.32.0",
        (_TORCH, ("onnxruntime==1.32.0", "onnx==1.23.2", "numpy==2.4.6", "sympy==1.14.0")),  # optimizer imports torch
    ),
    "olive": Peer(
        "Olive",
        "olive-ai",
        "0.13.0",
        (_TORCH, ("olive-ai==0.13.0", "onnxruntime==1.32.0", "onnx==1.23.2", "requests")),  # which it does not ask for
    ),
    "modelopt": Peer(
        "Model-Optimizer",
        "nvidia-modelopt",
        "0.47.0",
        (
            _TORCH,  # imported where quantized weights are packed
            # Its [onnx] asks for onnxruntime-gpu and cupy; converting and calibrating on a CPU calls neither.
            ("--no-deps", "nvidia-modelopt==0.47.0", "onnx-graphsurgeon==0.6.1", "onnxconverter-common==1.16.0"),
            (
                "onnx==1.21.0",
                "onnxruntime==1.24.2",
                "onnxslim==0.1.98",
                "lief==1.0.0",
                "polygraphy==0.53.6",
                "cppimport",
            ),
            (
                "numpy",
                "ml_dtypes",
                "tqdm",
                "packaging",
                "sympy",
                "onnxscript",
                "protobuf",
                "pyyaml",
                "pydantic",
                "scipy",
            ),
            ("rich", "safetensors", "omegaconf", "pulp<4", "regex", "ninja", "nvidia-ml-py"),
        ),
    ),
}


def run(command: Sequence[str], seconds: float) -> Ended:
    """In a process whose telemetry is off and that sees no modules of ours."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet = {"ORT_DISABLE_TELEMETRY": "1", "OLIVE_DISABLE_TELEMETRY": "1"}
    try:
        done = subprocess.run(
            command, env={**kept, **quiet}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Ended(-1, f"not done after {seconds / 60:.0f} minutes")
    except OSError as error:
        return Ended(-1, str(error))
    return Ended(done.returncode, f"{done.stdout}\n{done.stderr}")


def reason(text: str) -> str:
    """The line that says what went wrong, in few characters: the last that names an error, or the last at all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    words = " ".join((errors or lines or ["without a word"])[-1].replace("|", "/").split())
    return words if len(words) <= _SHOWN else f"{words[: _SHOWN - 1]}…"


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where a tool is installed, or why it is not."""

    python: Path
    problem: str = ""


def environment(peer: Peer, cache: Path, execute: Run = run) -> Environment:
    """`peer`'s environment below `cache`, made unless it is there whole."""
    folder = cache / peer.folder
    python, finished = folder / "bin" / "python", folder / "installed"
    if finished.exists():
        return Environment(python)
    steps = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
    steps += [[str(python), "-m", "pip", "install", "--quiet", *packages] for packages in peer.installs]
    for step in steps:
        ended = execute(step, _INSTALL_SECONDS)
        if ended.code:
            return Environment(python, reason(ended.text))
    finished.touch()
    return Environment(python)

"""The NVIDIA driver and its GPUs; where none works, why, and the command that would change that.

Sources: CUDA Driver API, "CUresult"; NVIDIA, "CUDA Compatibility", "Minor Version Compatibility" (minimum driver of
each major version of CUDA).

It is asked by probes: questions to a child process with a time limit, because a driver may hang and a library may
crash.

A question is a module of this package with a function `answer(*arguments)` that returns plain JSON. A child that hangs
is killed and not waited for: one that hangs inside the driver's kernel code cannot be killed, and waiting for it would
never end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from spach_deploy.common.operating_system import RESTART, crash, setting_variable
from spach_deploy.common.processes import start
from spach_deploy.doctor.driver_question import kernel_module_version
from spach_deploy.options.specs import ComputeCapability

if TYPE_CHECKING:
    from typing_extensions import Self


LEAST_DRIVER = {11: "450", 12: "525", 13: "580"}
"""Minimum driver branch of each major version of CUDA."""

_NO_DEVICE = 100
_ERRORS = {
    34: ("a stub library of the CUDA toolkit stands in for the driver", setting_variable("LD_LIBRARY_PATH", None)),
    802: ("the GPU's fabric is not ready (802)", "sudo systemctl restart nvidia-fabricmanager"),
    803: ("its library and its kernel module are of different versions (803), as after an update", RESTART),
    804: ("a cuda-compat library stands in for the driver, and this GPU does not allow it (804)", None),
    999: ("it failed for a reason that it does not tell (999)", RESTART),
}
"""Results of cuInit with a known remedy: code -> (problem, command)."""

_IN_CONTAINER = "docker run --gpus all IMAGE"
_UNHIDE = setting_variable("CUDA_VISIBLE_DEVICES", None)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver reports it."""

    name: str
    capability: ComputeCapability
    memory_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.capability})"


@dataclasses.dataclass(frozen=True)
class Driver:
    """The driver and its GPUs, in the driver's order.

    Without GPUs: `problem` says why, as a clause; `remedy` is a command, or None; `is_broken` means that something
    needs repair, rather than that there is no GPU. `cuda`: newest CUDA version that the driver supports. `upgrade`: the
    command that installs a newer driver, where this system has a known one.
    """

    gpus: tuple[Gpu, ...] = ()
    version: str | None = None
    cuda: tuple[int, int] | None = None
    problem: str = ""
    remedy: str | None = None
    is_broken: bool = False
    upgrade: str | None = None

    def runs_cuda(self, major: int) -> bool:
        """Whether the driver supports this major version of CUDA; True where its own version is unknown."""
        return self.cuda is None or self.cuda[0] >= major


@dataclasses.dataclass(frozen=True)
class DriverSurroundings:
    """Facts that explain why a driver does not work. `has_card`: the machine has an NVIDIA GPU on its PCI bus."""

    has_card: bool
    has_kernel_module: bool
    in_container: bool
    visible_devices: str | None
    install: str | None

    @classmethod
    def here(cls) -> DriverSurroundings:
        """The facts of this machine."""
        return cls(
            has_card=_has_card(Path("/sys/bus/pci/devices")) or Path("/dev/nvidia0").exists(),
            has_kernel_module=kernel_module_version() is not None or Path("/dev/nvidiactl").exists(),
            in_container=Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
            visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
            install=_driver_install(),
        )


def _has_card(pci: Path) -> bool:
    """Whether the PCI bus has a display or 3D controller (class 03) of NVIDIA (vendor 10de)."""
    try:
        devices = [(_word(device / "vendor"), _word(device / "class")) for device in pci.iterdir()]
    except OSError:
        return False
    return any(vendor == "0x10de" and kind.startswith("0x03") for vendor, kind in devices)


def _word(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _driver_install() -> str | None:
    if shutil.which("ubuntu-drivers"):
        return "sudo ubuntu-drivers install"
    return "sudo apt install nvidia-driver" if shutil.which("apt") else None


def driver_from(answer: ProbeResult, surroundings: DriverSurroundings) -> Driver:
    """The driver, from what `driver_question` reported."""
    if answer.content is None:
        problem = f"the NVIDIA driver does not answer: {answer.failure}"
        return Driver(problem=problem, remedy=RESTART, is_broken=True)
    found = answer.content
    driver = Driver(_gpus(found), found.get("driver"), _cuda(found), upgrade=surroundings.install)
    if driver.gpus:
        return driver
    code = found.get("init")
    absent = _no_library(surroundings) if code is None else _no_gpu(int(code), surroundings)
    return dataclasses.replace(absent, version=driver.version, cuda=driver.cuda)


def _gpus(found: Mapping[str, Any]) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(str(gpu["name"]), ComputeCapability(*gpu["capability"]), gpu["bytes"]) for gpu in found.get("gpus", ())
    )


def _cuda(found: Mapping[str, Any]) -> tuple[int, int] | None:
    number = found.get("cuda")
    return None if not number else (number // 1000, number % 1000 // 10)


def _no_library(surroundings: DriverSurroundings) -> Driver:
    if surroundings.has_kernel_module:
        problem = "the driver's kernel module is loaded, but its library libcuda.so.1 is not here"
        return Driver(
            problem=problem, remedy=_IN_CONTAINER if surroundings.in_container else surroundings.install, is_broken=True
        )
    if surroundings.has_card:
        problem = "an NVIDIA GPU is here, but no driver"
        return Driver(problem=problem, remedy=surroundings.install, is_broken=True)
    if surroundings.in_container:
        return Driver(problem="no NVIDIA GPU is in this container", remedy=_IN_CONTAINER)
    return Driver(problem="no NVIDIA GPU is here")


def _no_gpu(code: int, surroundings: DriverSurroundings) -> Driver:
    """The library exists, but cuInit returned `code`, or there are no GPUs."""
    if code in (0, _NO_DEVICE):
        if surroundings.visible_devices is not None:
            shown = surroundings.visible_devices
            return Driver(problem=f"CUDA_VISIBLE_DEVICES={shown!r} hides every GPU", remedy=_UNHIDE, is_broken=True)
        remedy = _IN_CONTAINER if surroundings.in_container else None
        return Driver(problem="the NVIDIA driver is here, but sees no GPU", remedy=remedy)
    reason, remedy = _ERRORS.get(code, (f"it does not start (CUDA error {code})", RESTART))
    return Driver(problem=f"the NVIDIA driver does not work: {reason}", remedy=remedy, is_broken=True)


_CHILD = (
    "import importlib, json, sys; module, *arguments = sys.argv[1:];"
    "found = importlib.import_module(module).answer(*arguments);"
    "sys.stdout.write('\\n' + json.dumps(found))"
)


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """A child's answer; `failure` says why there is none. `timed_out`: the child may only have been slow."""

    content: dict[str, Any] | None
    failure: str = ""
    timed_out: bool = False


class Probe:
    """A child process that answers one question. It starts at once, so that several run in parallel."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._started = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError):  # no memory left for a process: no answer
            command = [sys.executable, "-c", _CHILD, module, *arguments]
            self._process = start(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def answer(self, limit_s: float) -> ProbeResult:
        """The answer, if it comes within `limit_s` seconds of the start."""
        if self._process is None:
            return ProbeResult(None, "no process could be started")
        try:
            left_s = max(0.0, self._started + limit_s - time.monotonic())
            output, _ = self._process.communicate(timeout=left_s)
        except subprocess.TimeoutExpired:
            self._end()
            return ProbeResult(None, f"nothing within {limit_s:g} s", timed_out=True)
        return _parse(output, self._process.returncode)

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(OSError):
                self._process.kill()


def _parse(output: bytes, returncode: int) -> ProbeResult:
    """The last line of the output; libraries may print others before it."""
    if crashed := crash(returncode):
        return ProbeResult(None, f"it crashed ({crashed.name})")
    try:
        content = json.loads(output.rsplit(b"\n", 1)[-1])
    except ValueError:
        return ProbeResult(None, f"it ended with exit code {returncode}")
    return ProbeResult(content) if isinstance(content, dict) else ProbeResult(None, "its answer cannot be read")

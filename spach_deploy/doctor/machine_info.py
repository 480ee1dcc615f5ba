"""All facts that the doctor knows about this machine, gathered at once."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from spach_deploy.common import versions as required
from spach_deploy.common.machine import FolderCheck, Memory, find_folder, find_memory, temporary_folder
from spach_deploy.doctor.driver import LEAST_DRIVER, Driver, DriverSurroundings, driver_from
from spach_deploy.doctor.packages import InstalledOnnxRuntime, Torch, find_onnxruntime, find_torch
from spach_deploy.doctor.probe import Probe, ProbeResult
from spach_deploy.options.specs import Flavour
from spach_deploy.runtime.packages import MODULE_NAMES, is_installed

LIMIT_S = 3.0
"""Seconds that a child process may take to answer; the whole doctor stays under five seconds."""

_PACKAGE = "spach_deploy.doctor"
_OUTPUT = Path("build")


@dataclasses.dataclass(frozen=True)
class TensorRTPackage:
    """An installed TensorRT. `error`: why its import fails. `cuda`: major version of CUDA that it was built with."""

    version: str
    error: str = ""
    cuda: int | None = None


@dataclasses.dataclass(frozen=True)
class MachineInfo:
    """Facts about this machine. `packages`: version of each required package, None where it is not installed."""

    python: tuple[int, int, int]
    system: str
    machine: str
    requirements: required.Requirements
    packages: Mapping[str, str | None]
    pins: Mapping[str, str]
    torch: Torch | None
    onnxruntime: InstalledOnnxRuntime | None
    tensorrt: Mapping[Flavour, TensorRTPackage]
    driver: Driver
    memory: Memory | None
    output: FolderCheck
    temporary: FolderCheck

    @property
    def is_x86_linux(self) -> bool:
        """Whether this is the platform that tensorrt-rtx is used on."""
        return self.system == "Linux" and self.machine in ("x86_64", "AMD64")


def gather(limit_s: float = LIMIT_S) -> MachineInfo:
    """Gather all facts. Child processes work while this process reads files."""
    wanted = required.requirements()
    with contextlib.ExitStack() as stack:
        driver = stack.enter_context(Probe(f"{_PACKAGE}.driver_question"))
        importing = {
            flavour: stack.enter_context(Probe(f"{_PACKAGE}.tensorrt_question", module))
            for flavour, module in MODULE_NAMES.items()
            if is_installed(flavour)
        }
        return MachineInfo(
            python=sys.version_info[:3],
            system=platform.system(),
            machine=platform.machine(),
            requirements=wanted,
            packages={package.name: required.installed(package.name) for package in wanted.packages},
            pins=required.pins(),
            torch=find_torch(),
            onnxruntime=find_onnxruntime(),
            memory=find_memory(),
            output=find_folder(_OUTPUT),
            temporary=temporary_folder(),
            tensorrt={flavour: _tensorrt(flavour, asked.answer(limit_s)) for flavour, asked in importing.items()},
            driver=driver_from(driver.answer(limit_s), DriverSurroundings.here()),
        )


def _tensorrt(flavour: Flavour, answer: ProbeResult) -> TensorRTPackage:
    """A child that timed out proves no fault of the package: a cold disk is slow."""
    said = answer.content or {}
    version = said.get("version") or required.installed(flavour.value) or ""
    crashed = "" if answer.content is not None or answer.timed_out else answer.failure
    return TensorRTPackage(str(version), str(said.get("error", "")) or crashed, _cuda_of(flavour))


def _cuda_of(flavour: Flavour) -> int | None:
    """The package's major version of CUDA: tensorrt-rtx 1.7 installs tensorrt_rtx_cu13. None where upgrades left
    several.
    """
    names = {major: f"{MODULE_NAMES[flavour]}_cu{major}" for major in LEAST_DRIVER}
    found = [major for major, name in names.items() if required.installed(name) is not None]
    return found[0] if len(found) == 1 else None


def ask_tensorrt(flavour: Flavour, header: bytes, limit_s: float = LIMIT_S / 2) -> ProbeResult:
    """What this TensorRT says of a plan's first bytes."""
    with Probe(f"{_PACKAGE}.tensorrt_question", MODULE_NAMES[flavour], header.hex()) as question:
        return question.answer(limit_s)

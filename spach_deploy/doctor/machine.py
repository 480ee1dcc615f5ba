"""What this machine can do, derived from what is here: a finding a line, and for each task whether it is possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from spach_deploy._version import __version__
from spach_deploy.doctor.capability import builders, runners
from spach_deploy.doctor.finding import Finding, Task, TaskStatus, blockers, reasons
from spach_deploy.doctor.hardware import about_disk, about_driver, about_memory
from spach_deploy.doctor.machine_info import MachineInfo
from spach_deploy.doctor.software import (
    about_core,
    about_onnxruntime,
    about_pins,
    about_python,
    about_reports,
    about_tensorrt,
    about_tensorrt_rtx,
    about_torch,
)
from spach_deploy.options.gpus import format_gpus
from spach_deploy.options.specs import Flavour
from spach_deploy.runtime.devices import RTX_CAPABILITIES

CORE_FLOW = (Task.EXPORT, Task.BUILD, Task.VERIFY)
"""What `spach-export --model ms_hybrid_s --fp16` does; it needs no GPU."""

TOPICS: tuple[Callable[[MachineInfo], Iterator[Finding]], ...] = (
    *(about_python, about_core, about_torch, about_onnxruntime, about_tensorrt_rtx, about_tensorrt),
    *(about_driver, about_memory, about_disk, about_reports, about_pins),
)
"""What is looked at, in the order in which one would mend it."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """All findings, and for each task whether it is possible here."""

    findings: tuple[Finding, ...]
    abilities: tuple[TaskStatus, ...]

    @property
    def exit_code(self) -> int:
        """0 when the core flow can be done here, 3 when it cannot."""
        return 0 if all(ability.possible for ability in self.abilities if ability.task in CORE_FLOW) else 3

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "spach_deploy": __version__,
            "exit_code": self.exit_code,
            "can": {ability.task.value: ability.to_dict() for ability in self.abilities},
            "findings": [finding.to_dict() for finding in self.findings],
        }


def examine_machine(here: MachineInfo) -> Machine:
    """Every finding, in the order in which one would mend them, and what they allow."""
    findings = tuple(finding for topic in TOPICS for finding in topic(here))
    return Machine(findings, tuple(_ability(task, findings, here) for task in Task))


# Abilities


def _ability(task: Task, findings: tuple[Finding, ...], here: MachineInfo) -> TaskStatus:
    in_the_way = blockers(findings, task)
    if in_the_way:
        return TaskStatus(task, False, reasons(in_the_way))
    return TaskStatus(task, True, _HOW[task](here))


def _how_export(here: MachineInfo) -> str:
    return f"checkpoints to graphs, with torch {here.torch.version if here.torch else ''}"


def _how_build(here: MachineInfo) -> str:
    where = {
        Flavour.TENSORRT_RTX: f"on the CPU, for {format_gpus(RTX_CAPABILITIES)}",
        Flavour.TENSORRT: "for the GPU here",
    }
    return "engines with " + "; ".join(f"{flavour.value} {where[flavour]}" for flavour in builders(here))


def _how_run(here: MachineInfo) -> str:
    return f"engines of {' and '.join(flavour.value for flavour in runners(here))} on {here.driver.gpus[0]}"


def _how_verify(here: MachineInfo) -> str:
    version = here.onnxruntime.files_version if here.onnxruntime else ""
    engines = ", and engines by running them" if runners(here) else "; an engine's graph stands in for it"
    return f"graphs in ONNX Runtime {version}{engines}"


_HOW: dict[Task, Callable[[MachineInfo], str]] = {
    Task.EXPORT: _how_export,
    Task.BUILD: _how_build,
    Task.RUN: _how_run,
    Task.VERIFY: _how_verify,
}

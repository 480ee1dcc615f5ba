"""What works here, put together from several facts: which TensorRT builds, and which runs on the first GPU."""

from __future__ import annotations

from spach_deploy.doctor.machine_info import MachineInfo
from spach_deploy.options.gpus import SUPPORTED
from spach_deploy.options.specs import Flavour
from spach_deploy.runtime.devices import RTX_CAPABILITIES

RUNS_ON = {Flavour.TENSORRT: SUPPORTED, Flavour.TENSORRT_RTX: RTX_CAPABILITIES}
"""Compute capabilities that each flavour compiles for and runs on."""


def works(here: MachineInfo, flavour: Flavour) -> bool:
    """Whether that TensorRT is installed, imports and is new enough."""
    package = here.tensorrt.get(flavour)
    if package is None or package.error:
        return False
    return not package.version or here.requirements.get(flavour.value).is_met_by(package.version)


def builders(here: MachineInfo) -> tuple[Flavour, ...]:
    """Flavours that can build engines here: tensorrt-rtx wherever it imports, tensorrt for a GPU that is here."""
    return tuple(
        flavour
        for flavour in RUNS_ON
        if works(here, flavour) and (flavour is Flavour.TENSORRT_RTX or flavour in runners(here))
    )


def runners(here: MachineInfo) -> tuple[Flavour, ...]:
    """Flavours whose engines run here, on the first GPU."""
    return tuple(
        flavour
        for flavour in RUNS_ON
        if works(here, flavour) and runs_on_gpu(here, flavour) and driver_runs(here, flavour)
    )


def runs_on_gpu(here: MachineInfo, flavour: Flavour) -> bool:
    """Whether that TensorRT runs on the first GPU."""
    return bool(here.driver.gpus) and here.driver.gpus[0].capability in RUNS_ON[flavour]


def driver_runs(here: MachineInfo, flavour: Flavour) -> bool:
    """Whether the driver is new enough for the CUDA that the package was made with; True where either is not known."""
    package = here.tensorrt.get(flavour)
    return package is None or package.cuda is None or here.driver.runs_cuda(package.cuda)

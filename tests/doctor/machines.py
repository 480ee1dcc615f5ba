"""Machines that are not this one, for tests of what the doctor says of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from spach_deploy.common.machine import FolderCheck, Memory
from spach_deploy.common.versions import Requirement, Requirements
from spach_deploy.doctor.driver import Driver, Gpu
from spach_deploy.doctor.machine_info import InstalledOnnxRuntime, MachineInfo, TensorRTPackage, Torch
from spach_deploy.options.specs import ComputeCapability, Flavour

GIGABYTE = 10**9
RTX = TensorRTPackage("1.7.1.116", cuda=13)
ORDINARY = TensorRTPackage("10.16.1.11", cuda=12)

L4 = Gpu("NVIDIA L4", ComputeCapability(8, 9), 24 * GIGABYTE)
A100 = Gpu("NVIDIA A100-SXM4-40GB", ComputeCapability(8, 0), 40 * GIGABYTE)
T4 = Gpu("Tesla T4", ComputeCapability(7, 5), 16 * GIGABYTE)
H100 = Gpu("NVIDIA H100 80GB HBM3", ComputeCapability(9, 0), 80 * GIGABYTE)
V100 = Gpu("Tesla V100-SXM2-16GB", ComputeCapability(7, 0), 16 * GIGABYTE)
LATER = Gpu("NVIDIA of some later day", ComputeCapability(13, 0), 80 * GIGABYTE)

REQUIREMENTS = Requirements(
    ">=3.10",
    (
        Requirement("torch", "2.9"),
        Requirement("onnx", "1.18"),
        Requirement("polygraphy", "0.50.3"),
        Requirement("tomli", "2", python_below="3.11"),
        Requirement("onnxruntime", "1.21", "cpu"),
        Requirement("tensorrt-rtx", "1.5.0.114", "cpu"),
        Requirement("tensorrt", "10.8", "gpu"),
        Requirement("matplotlib", "3.9", "report"),
        Requirement("jinja2", "3.1", "report"),
    ),
    "setup.cfg",
)

_CPU_MACHINE = MachineInfo(
    python=(3, 11, 7),
    system="Linux",
    machine="x86_64",
    requirements=REQUIREMENTS,
    packages={
        "torch": "2.13.0+cpu",
        "onnx": "1.23.2",
        "polygraphy": "0.53.6",
        "tomli": None,
        "onnxruntime": "1.32.0",
        "tensorrt-rtx": "1.7.1.116",
        "tensorrt": None,
        "matplotlib": "3.11.2",
        "jinja2": "3.1.6",
    },
    pins={"torch": "2.13.0", "onnx": "1.23.2", "ruff": "0.17.6"},
    torch=Torch("2.13.0+cpu", "CPU"),
    onnxruntime=InstalledOnnxRuntime({"onnxruntime": "1.32.0"}, "onnxruntime", "1.32.0", ("cpu",)),
    tensorrt={Flavour.TENSORRT_RTX: RTX},
    driver=Driver(problem="no NVIDIA GPU is here"),
    memory=Memory(16 * GIGABYTE, 32 * GIGABYTE),
    output=FolderCheck(Path("/home/user"), 100 * GIGABYTE),
    temporary=FolderCheck(Path("/tmp"), 100 * GIGABYTE),
)


def cpu_machine(**changes: Any) -> MachineInfo:
    """All that the core flow takes, and no GPU."""
    return dataclasses.replace(_CPU_MACHINE, **changes)


def gpu_machine(*gpus: Gpu, cuda: tuple[int, int] = (13, 0), **changes: Any) -> MachineInfo:
    """The same with GPUs, a driver that runs `cuda`, and both TensorRTs."""
    driver = Driver(gpus, "580.65.06", cuda, upgrade="sudo apt install nvidia-driver")
    both = {Flavour.TENSORRT: ORDINARY, Flavour.TENSORRT_RTX: RTX}
    return cpu_machine(driver=driver, **{"tensorrt": both, **changes})

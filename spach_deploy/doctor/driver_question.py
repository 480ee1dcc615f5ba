"""What the NVIDIA driver reports of itself and its GPUs. Runs in a child process (`probe`), because a driver may hang.

Sources: CUDA Driver API, "Initialization", "Version Management", "Device Management"; NVML API, "System Queries".
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spach_deploy.common.operating_system import CUDA_DRIVER, NVML
from spach_deploy.runtime.devices import local_gpus

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_TEXT_BYTES = 80

Open = Callable[[str], Any]


def answer() -> dict[str, Any]:
    """The child process's entry point: what this machine's driver reports."""
    return ask()


def ask(open_library: Open = ctypes.CDLL) -> dict[str, Any]:
    """`init`: cuInit's result, None without a driver library; `cuda`: 13010 for CUDA 13.1; `driver`: its version;
    `gpus`.
    """
    version = _driver_version(open_library)
    try:
        driver = open_library(CUDA_DRIVER)
    except OSError as error:
        return {"init": None, "reason": str(error), "driver": version, "cuda": None, "gpus": []}
    code = int(driver.cuInit(0))
    cuda = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(cuda))
    gpus = [] if code else _gpus(driver, open_library)
    return {"init": code, "driver": version, "cuda": cuda.value or None, "gpus": gpus}


def _gpus(driver: Any, open_library: Open) -> list[dict[str, Any]]:
    return [
        {
            "name": gpu.name,
            "capability": [gpu.capability.major, gpu.capability.minor],
            "bytes": _memory_bytes(driver, ordinal),
        }
        for ordinal, gpu in enumerate(local_gpus(open_library))
    ]


def _memory_bytes(driver: Any, ordinal: int) -> int | None:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    failed = driver.cuDeviceGet(ctypes.byref(device), ordinal)
    failed = failed or driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    return None if failed else total.value


def _driver_version(open_library: Open) -> str | None:
    """The driver's version, such as 580.65.06: from NVML, else from the kernel module."""
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    try:
        library = open_library(NVML)
        if not library.nvmlInit_v2() and not library.nvmlSystemGetDriverVersion(text, _TEXT_BYTES):
            return text.value.decode(errors="replace")
    except (OSError, AttributeError):
        pass
    return kernel_module_version()


def kernel_module_version(file: Path = _KERNEL_MODULE) -> str | None:
    """Version of the loaded kernel module; None without one."""
    try:
        match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return match[1] if match else None

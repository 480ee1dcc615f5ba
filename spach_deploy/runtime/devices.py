"""NVIDIA GPUs of this machine: names and compute capabilities, from the driver's library.

Neither torch nor a CUDA runtime is imported. Without a driver it takes microseconds. CUDA_VISIBLE_DEVICES is respected.
Source: CUDA Driver API, "Initialization" and "Device Management" (cuInit, cuDeviceGet*).
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

from spach_deploy.options.specs import ComputeCapability

_DRIVER_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NAME_BYTES = 256

RTX_CAPABILITIES = tuple(ComputeCapability(*pair) for pair in ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)))
"""Compute capabilities that TensorRT for RTX compiles for and runs on."""


@dataclasses.dataclass(frozen=True)
class LocalGpu:
    """One GPU of this machine, with the driver's name of it."""

    name: str
    capability: ComputeCapability

    def __str__(self) -> str:
        return f"{self.name} ({self.capability})"


def local_gpus(open_library: Callable[[str], Any] = ctypes.CDLL) -> tuple[LocalGpu, ...]:
    """GPUs that this process may use, in the driver's order; empty where there is no driver or no GPU."""
    try:
        driver = open_library(_DRIVER_LIBRARY)
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_describe(driver, ordinal) for ordinal in range(count.value))


def _describe(driver: Any, ordinal: int) -> LocalGpu:
    device = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    major, minor = (_attribute(driver, device, which) for which in (_MAJOR, _MINOR))
    return LocalGpu(name.value.decode(errors="replace"), ComputeCapability(major, minor))


def _attribute(driver: Any, device: ctypes.c_int, which: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), which, device)
    return value.value

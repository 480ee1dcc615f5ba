"""NVIDIA GPUs of this machine, and the Python packages of both flavours of TensorRT.

Names and compute capabilities come from the driver's library. Neither torch nor a CUDA runtime is imported. Without a
driver it takes microseconds. CUDA_VISIBLE_DEVICES is respected. Source: CUDA Driver API, "Initialization" and "Device
Management" (cuInit, cuDeviceGet*).

Of the packages: import names, installed versions, how to install them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

from spach_deploy.common.errors import MissingPackageError
from spach_deploy.common.operating_system import CUDA_DRIVER
from spach_deploy.options.specs import ComputeCapability, Flavour

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
        driver = open_library(CUDA_DRIVER)
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


MODULE_NAMES = {Flavour.TENSORRT: "tensorrt", Flavour.TENSORRT_RTX: "tensorrt_rtx"}
"""By flavour: the name under which its package is imported."""

_INSTALL = {
    Flavour.TENSORRT: "pip install 'spach-deploy[gpu]'",
    Flavour.TENSORRT_RTX: "pip install 'spach-deploy[cpu]'",
}
_TENSORRT_ADVICE = (
    " (its libraries are not in the public package index: the installer fetches them from NVIDIA's own, and fails "
    "where that is out of reach; install NVIDIA's wheels by hand there, or build with --engine tensorrt-rtx)."
)


def is_installed(flavour: Flavour) -> bool:
    """Whether the package is installed; its libraries may still fail to load."""
    return importlib.util.find_spec(MODULE_NAMES[flavour]) is not None


def installed_version(flavour: Flavour) -> str | None:
    """Version of the installed package, without importing it; None when it is absent."""
    try:
        return importlib.metadata.version(MODULE_NAMES[flavour])
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_package(flavour: Flavour, purpose: str, reason: str = "") -> MissingPackageError:
    """The error for a package that is absent or, with `reason`, installed but does not load.

    `purpose`: what needs it, for the message.
    """
    package = f"a working {flavour.value} (importing it failed: {reason})" if reason else flavour.value
    advice = _TENSORRT_ADVICE if flavour is Flavour.TENSORRT else "."
    return MissingPackageError(package, purpose, _INSTALL[flavour] + advice)

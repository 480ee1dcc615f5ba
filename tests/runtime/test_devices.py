from __future__ import annotations

import ctypes
from typing import Any

from spach_deploy.options.specs import ComputeCapability
from spach_deploy.runtime.devices import LocalGpu, local_gpus


class Driver:
    """What libcuda answers on a machine with two GPUs."""

    gpus = ((b"NVIDIA A10", 8, 6), (b"NVIDIA GeForce RTX 5090", 12, 0))

    def __init__(self, init: int = 0) -> None:
        self._init = init

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._init

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:  # noqa: N802
        name.value = self.gpus[device.value][0]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        value._obj.value = self.gpus[device.value][{75: 1, 76: 2}[attribute]]
        return 0


def test_names_and_capabilities_come_from_the_driver() -> None:
    assert local_gpus(lambda library: Driver()) == (
        LocalGpu("NVIDIA A10", ComputeCapability(8, 6)),
        LocalGpu("NVIDIA GeForce RTX 5090", ComputeCapability(12, 0)),
    )


def test_a_machine_without_driver_has_no_gpus() -> None:
    def absent(library: str) -> Any:
        raise OSError(f"{library}: cannot open shared object file")

    assert local_gpus(absent) == ()


def test_a_driver_that_does_not_start_gives_no_gpus() -> None:
    assert local_gpus(lambda library: Driver(init=100)) == ()

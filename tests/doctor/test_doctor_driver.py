"""Why there is no GPU, from what a driver answers and what stands around it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from spach_deploy.doctor.driver import Driver, DriverSurroundings, Gpu, ProbeResult, _has_card, driver_from
from spach_deploy.options.specs import ComputeCapability

BARE = DriverSurroundings(
    has_card=False, has_kernel_module=False, in_container=False, visible_devices=None, install="sudo apt install driver"
)
GPU = {"name": "NVIDIA L4", "capability": [8, 9], "bytes": 24 * 10**9}
NO_LIBRARY: dict[str, Any] = {"init": None, "driver": None, "cuda": None, "gpus": []}


def after(init: int | None, **around: Any) -> Driver:
    content = {**NO_LIBRARY, "init": init, "cuda": 12040}
    return driver_from(ProbeResult(content), dataclasses.replace(BARE, **around))


def test_gpus() -> None:
    found = driver_from(ProbeResult({"init": 0, "driver": "580.65.06", "cuda": 13010, "gpus": [GPU]}), BARE)
    assert found.gpus == (Gpu("NVIDIA L4", ComputeCapability(8, 9), 24 * 10**9),)
    assert (found.version, found.cuda, found.problem) == ("580.65.06", (13, 1), "")
    assert found.runs_cuda(13)
    assert not found.runs_cuda(14)


def test_a_driver_of_unknown_version_runs_everything() -> None:
    assert Driver().runs_cuda(99)


def test_no_answer() -> None:
    found = driver_from(ProbeResult(None, "nothing within 3 s", timed_out=True), BARE)
    assert found.is_broken
    assert "nothing within 3 s" in found.problem


@pytest.mark.parametrize(
    ("around", "says", "remedy", "broken"),
    [
        ({}, "no NVIDIA GPU is here", None, False),
        ({"in_container": True}, "in this container", "docker run --gpus all IMAGE", False),
        ({"has_card": True}, "but no driver", "sudo apt install driver", True),
        ({"has_kernel_module": True}, "its library libcuda.so.1 is not", "sudo apt install driver", True),
        (
            {"has_kernel_module": True, "in_container": True},
            "its library libcuda.so.1 is not",
            "docker run --gpus all IMAGE",
            True,
        ),
    ],
)
def test_no_library(around: dict[str, Any], says: str, remedy: str | None, broken: bool) -> None:
    found = after(None, **around)
    assert says in found.problem
    assert (found.remedy, found.is_broken) == (remedy, broken)


@pytest.mark.parametrize("code", [0, 100])
def test_a_driver_that_sees_no_gpu(code: int) -> None:
    assert after(code).problem == "the NVIDIA driver is here, but sees no GPU"
    hidden = after(code, visible_devices="")
    assert hidden.problem == "CUDA_VISIBLE_DEVICES='' hides every GPU"
    assert hidden.remedy == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("code", "says"), [(803, "as after an update"), (804, "cuda-compat"), (34, "stub"), (7777, "CUDA error 7777")]
)
def test_a_driver_that_does_not_start(code: int, says: str) -> None:
    found = after(code)
    assert found.is_broken
    assert says in found.problem
    assert found.cuda == (12, 4)


@pytest.mark.parametrize(
    ("vendor", "kind", "is_card"),
    [("0x10de", "0x030000", True), ("0x10de", "0x040300", False), ("0x8086", "0x030000", False)],
)
def test_cards_on_the_pci_bus(tmp_path: Path, vendor: str, kind: str, is_card: bool) -> None:
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    assert _has_card(tmp_path) is is_card
    assert not _has_card(tmp_path / "nothing")


def test_these_surroundings() -> None:
    assert isinstance(DriverSurroundings.here().in_container, bool)

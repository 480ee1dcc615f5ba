"""A plan against a machine: package, version, GPU and driver, and the command that would change each."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from spach_deploy.doctor.compatibility import PlanRequirements, compatibility
from spach_deploy.doctor.driver import Driver
from spach_deploy.doctor.finding import Finding, Status, Task
from spach_deploy.doctor.machine_info import MachineInfo, TensorRTPackage
from spach_deploy.options.specs import Flavour
from tests.doctor.machines import A100, H100, L4, LATER, ORDINARY, RTX, T4, cpu_machine, gpu_machine


def rebuild(*words: str) -> str:
    return " ".join(("spach-export", *words))


RTX_PLAN = PlanRequirements(Flavour.TENSORRT_RTX, "1.7.1.116", (A100.capability, L4.capability), rebuild=rebuild)
ORDINARY_PLAN = PlanRequirements(Flavour.TENSORRT, "10.16.1.11", (L4.capability,), rebuild=rebuild)


def finding(plan: PlanRequirements, here: MachineInfo, topic: str) -> Finding:
    (found,) = (item for item in compatibility(plan, here) if item.topic == topic)
    return found


def with_version(plan: PlanRequirements, version: str | None, **changes: Any) -> Finding:
    here = gpu_machine(L4)
    return finding(dataclasses.replace(plan, version=version, **changes), here, plan.flavour.value)


@pytest.mark.parametrize("plan", [RTX_PLAN, ORDINARY_PLAN], ids=["rtx", "ordinary"])
def test_it_fits(plan: PlanRequirements) -> None:
    assert [item.status for item in compatibility(plan, gpu_machine(L4))] == [Status.OK, Status.OK]


# Package and version


def test_the_package_is_missing() -> None:
    found = finding(RTX_PLAN, cpu_machine(tensorrt={}), "tensorrt-rtx")
    assert (found.status, found.blocks) == (Status.MISSING, (Task.RUN,))
    assert found.command is not None
    assert found.command.endswith("install tensorrt-rtx==1.7.1.116")


@pytest.mark.parametrize(
    ("plan", "other"), [(RTX_PLAN, {Flavour.TENSORRT: ORDINARY}), (ORDINARY_PLAN, {Flavour.TENSORRT_RTX: RTX})]
)
def test_the_other_flavour_is_here(plan: PlanRequirements, other: dict[Flavour, TensorRTPackage]) -> None:
    found = finding(plan, gpu_machine(L4, tensorrt=other), plan.flavour.value)
    assert found.status is Status.MISSING
    assert "cannot load it" in found.means


def test_the_package_does_not_import() -> None:
    here = gpu_machine(L4, tensorrt={Flavour.TENSORRT_RTX: TensorRTPackage("1.7.1.116", "no libcudart")})
    found = finding(RTX_PLAN, here, "tensorrt-rtx")
    assert (found.status, found.blocks) == (Status.PROBLEM, (Task.RUN,))
    assert "no libcudart" in found.means


@pytest.mark.parametrize(
    ("version", "status", "says"),
    [
        ("10.16.1.11", Status.OK, "The same version"),
        ("10.16.1", Status.OK, "The same version"),
        ("10.16.1.12", Status.UNKNOWN, "another build"),
        ("10.16.0.11", Status.PROBLEM, "takes the version that built it"),
        ("10.3.0.26", Status.PROBLEM, "takes the version that built it"),
        ("8.6.1.6", Status.PROBLEM, "a plan of 8.x is not loaded by 10.x"),
        ("11.4.0.5", Status.PROBLEM, "a plan of 11.x is not loaded by 10.x"),
        (None, Status.UNKNOWN, "do not tell the version"),
    ],
)
def test_versions(version: str | None, status: Status, says: str) -> None:
    found = with_version(ORDINARY_PLAN, version)
    assert found.status is status
    assert says in found.means
    assert (found.blocks == (Task.RUN,)) is (status is Status.PROBLEM)


@pytest.mark.parametrize(("version", "status"), [("10.8.0.43", Status.OK), ("10.17.0.1", Status.PROBLEM)])
def test_version_compatible_plans_run_with_later_versions_only(version: str, status: Status) -> None:
    assert with_version(ORDINARY_PLAN, version, version_compatible=True).status is status


def test_plans_of_tensorrt_for_rtx_run_with_their_own_release_only() -> None:
    assert with_version(RTX_PLAN, "1.6.0.5").status is Status.PROBLEM


@pytest.mark.parametrize(
    ("version", "command"),
    [("10.3.0.26", "tensorrt==10.3.0.26"), ("10.3.0", "'tensorrt==10.3.0.*'"), ("8.6.1.6", "--engine auto")],
)
def test_the_fix_is_that_version_or_to_build_again(version: str, command: str) -> None:
    """TensorRT 8 cannot be installed any more: its wheels are not made for the Pythons that this package needs."""
    found = with_version(ORDINARY_PLAN, version).command
    assert found is not None
    assert found.endswith(command)


# GPU


def test_no_gpu() -> None:
    found = finding(RTX_PLAN, cpu_machine(), "NVIDIA GPU")
    assert (found.status, found.blocks) == (Status.MISSING, (Task.RUN,))
    assert found.means == "To run it takes an NVIDIA GPU of sm80, sm89."


def test_a_driver_that_does_not_answer() -> None:
    here = cpu_machine(driver=Driver(problem="nothing within 3 s", remedy="sudo reboot", is_broken=True))
    found = finding(RTX_PLAN, here, "NVIDIA GPU")
    assert (found.status, found.command) == (Status.PROBLEM, "sudo reboot")


def test_another_gpu() -> None:
    found = finding(RTX_PLAN, gpu_machine(T4), "NVIDIA GPU")
    assert (found.status, found.what) == (Status.PROBLEM, "Tesla T4 (sm75), and it was built for sm80, sm89")
    assert found.command == "spach-export --engine tensorrt-rtx --gpu sm75"


def test_the_second_gpu_fits() -> None:
    found = finding(RTX_PLAN, gpu_machine(T4, L4), "NVIDIA GPU")
    assert (found.status, found.command) == (Status.PROBLEM, "export CUDA_VISIBLE_DEVICES=1")


def test_a_gpu_that_tensorrt_for_rtx_does_not_run_on() -> None:
    found = finding(RTX_PLAN, gpu_machine(H100), "NVIDIA GPU")
    assert "TensorRT for RTX runs on sm75" in found.means
    assert found.command == "spach-export --engine tensorrt"


def test_a_plan_of_tensorrt_on_another_gpu() -> None:
    found = finding(ORDINARY_PLAN, gpu_machine(H100), "NVIDIA GPU")
    assert (found.status, found.command) == (Status.PROBLEM, "spach-export --engine tensorrt")


@pytest.mark.parametrize(("gpu", "status"), [(T4, Status.PROBLEM), (A100, Status.OK), (H100, Status.OK)])
def test_hardware_compatible_plans_run_from_ampere_on(gpu: Any, status: Status) -> None:
    plan = dataclasses.replace(ORDINARY_PLAN, hardware_compatible=True)
    assert finding(plan, gpu_machine(gpu), "NVIDIA GPU").status is status


@pytest.mark.parametrize(("newer", "status"), [(True, Status.OK), (False, Status.PROBLEM)])
def test_code_for_later_gpus(newer: bool, status: Status) -> None:
    plan = dataclasses.replace(RTX_PLAN, newer_gpus=newer)
    assert finding(plan, gpu_machine(LATER), "NVIDIA GPU").status is status


@pytest.mark.parametrize(("plan", "gpu"), [(ORDINARY_PLAN, L4), (RTX_PLAN, L4)])
def test_it_is_not_known_for_which_gpu_it_was_built(plan: PlanRequirements, gpu: Any) -> None:
    found = finding(dataclasses.replace(plan, gpus=None), gpu_machine(gpu), "NVIDIA GPU")
    assert (found.status, found.blocks) == (Status.UNKNOWN, ())
    assert "do not tell" in found.means


def test_even_so_tensorrt_for_rtx_does_not_run_on_every_gpu() -> None:
    found = finding(dataclasses.replace(RTX_PLAN, gpus=None), gpu_machine(H100), "NVIDIA GPU")
    assert found.status is Status.PROBLEM


# Driver


def test_a_driver_that_is_too_old() -> None:
    found = finding(RTX_PLAN, gpu_machine(L4, cuda=(12, 8)), "NVIDIA driver")
    assert (found.status, found.blocks) == (Status.PROBLEM, (Task.RUN,))
    assert "takes driver 580 or newer" in found.means
    assert found.command == "sudo apt install nvidia-driver"

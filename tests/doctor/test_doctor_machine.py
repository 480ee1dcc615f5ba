"""What the doctor says of machines of all kinds, and whether that is of one mind with what it says they can do."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click import Command

from spach_deploy.cli.export import main as export_command
from spach_deploy.cli.validate import main as validate_command
from spach_deploy.common.machine import FolderCheck, Memory
from spach_deploy.doctor.compatibility import builders, runners
from spach_deploy.doctor.driver import Driver
from spach_deploy.doctor.finding import Finding, Status, Task
from spach_deploy.doctor.machine import Machine, examine_machine
from spach_deploy.doctor.machine_info import InstalledOnnxRuntime, MachineInfo, TensorRTPackage, Torch
from spach_deploy.doctor.table import as_text
from spach_deploy.options.specs import Flavour
from tests.doctor.machines import (
    GIGABYTE,
    H100,
    L4,
    LATER,
    ORDINARY,
    RTX,
    T4,
    V100,
    cpu_machine,
    gpu_machine,
)

RTX_ONLY, ORDINARY_ONLY = {Flavour.TENSORRT_RTX: RTX}, {Flavour.TENSORRT: ORDINARY}
BROKEN = TensorRTPackage("10.16.1.11", "libnvinfer.so.10: cannot open shared object file: No such file or directory")


def finding(here: MachineInfo, topic: str) -> Finding:
    (found,) = (item for item in examine_machine(here).findings if item.topic == topic)
    return found


def can(machine: Machine) -> dict[Task, bool]:
    return {ability.task: ability.possible for ability in machine.abilities}


def how(here: MachineInfo, task: Task) -> str:
    (found,) = (ability.how for ability in examine_machine(here).abilities if ability.task is task)
    return found


# The whole


def test_a_machine_without_a_gpu_can_do_the_core_flow() -> None:
    machine = examine_machine(cpu_machine())
    assert machine.exit_code == 0
    assert can(machine) == {Task.EXPORT: True, Task.BUILD: True, Task.RUN: False, Task.VERIFY: True}
    assert how(cpu_machine(), Task.RUN) == "no NVIDIA GPU is here"
    assert "tensorrt-rtx on the CPU, for sm75" in how(cpu_machine(), Task.BUILD)


def test_a_machine_with_a_gpu_can_do_all() -> None:
    here = gpu_machine(L4)
    assert examine_machine(here).exit_code == 0
    assert all(can(examine_machine(here)).values())
    assert how(here, Task.RUN) == "engines of tensorrt and tensorrt-rtx on NVIDIA L4 (sm89)"


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"torch": None}, set(Task)),
        ({"onnxruntime": None}, {Task.EXPORT, Task.VERIFY}),
        ({"tensorrt": {}}, {Task.BUILD}),
        ({"tensorrt": {Flavour.TENSORRT_RTX: BROKEN}}, {Task.BUILD}),
        ({"tensorrt": ORDINARY_ONLY}, {Task.BUILD}),
        ({"memory": Memory(2 * GIGABYTE, 4 * GIGABYTE)}, {Task.EXPORT, Task.BUILD}),
        ({"output": FolderCheck(Path("/home"), GIGABYTE // 2)}, {Task.EXPORT, Task.BUILD}),
        ({"temporary": FolderCheck(Path("/tmp"), 0, "it cannot be written (read-only file system)")}, {Task.EXPORT}),
        ({"python": (3, 9, 2)}, set(Task)),
    ],
)
def test_what_is_needed_and_not_there_ends_with_3(changes: dict[str, Any], lost: set[Task]) -> None:
    machine = examine_machine(cpu_machine(**changes))
    assert machine.exit_code == 3
    assert lost <= {task for task, possible in can(machine).items() if not possible}


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": None},
        {"pins": {}},
        {"packages": {**cpu_machine().packages, "matplotlib": None}},
        {"driver": Driver(problem="the NVIDIA driver does not answer: nothing within 3 s", is_broken=True)},
    ],
)
def test_what_the_core_flow_does_not_need_ends_with_0(changes: dict[str, Any]) -> None:
    assert examine_machine(cpu_machine(**changes)).exit_code == 0


TENSORRTS = (None, BROKEN, TensorRTPackage("0.9"), RTX, ORDINARY, TensorRTPackage(""))
GPUS = ((), (L4,), (H100,), (T4,), (V100,), (LATER,), (V100, L4))


@pytest.mark.parametrize("gpus", GPUS, ids=lambda gpus: " ".join(str(gpu.capability) for gpu in gpus) or "no gpu")
@pytest.mark.parametrize("system", ["x86_64", "aarch64"])
def test_findings_and_abilities_are_of_one_mind(gpus: tuple[Any, ...], system: str) -> None:
    """What can be built and run follows from the facts; that it cannot, from findings. Both must say the same."""
    for ordinary, rtx, cuda in itertools.product(TENSORRTS, TENSORRTS, ((12, 4), (13, 0))):
        packages = {Flavour.TENSORRT: ordinary, Flavour.TENSORRT_RTX: rtx}
        installed = {flavour: package for flavour, package in packages.items() if package is not None}
        driver = Driver(gpus, "550.54", cuda) if gpus else Driver(problem="no NVIDIA GPU is here")
        here = cpu_machine(tensorrt=installed, driver=driver, machine=system)
        possible = can(examine_machine(here))
        assert (possible[Task.BUILD], possible[Task.RUN]) == (bool(builders(here)), bool(runners(here)))


# Commands

NO_COMMAND_FOR = {"memory", "platform"}
COMMANDS: dict[str, Command] = {"spach-export": export_command, "spach-validate": validate_command}


@pytest.mark.parametrize(
    "here",
    [
        cpu_machine(),
        cpu_machine(tensorrt={}, torch=None, onnxruntime=None, packages={}, python=(3, 9, 0)),
        gpu_machine(L4, H100, V100, cuda=(12, 4)),
        gpu_machine(T4, tensorrt={}, torch=Torch("2.9.0+cu130", "CUDA 13.0")),
    ],
)
def test_every_line_has_a_command_that_can_be_pasted(here: MachineInfo) -> None:
    for item in examine_machine(here).findings:
        if item.topic in NO_COMMAND_FOR:
            continue
        assert item.command is not None, item
        words = shlex.split(item.command, comments=True)
        if words[0] in COMMANDS:
            options = {name for option in COMMANDS[words[0]].params for name in option.opts}
            assert {word for word in words if word.startswith("-")} <= options


def test_the_end_names_the_commands_that_make_it_possible() -> None:
    text = as_text(examine_machine(cpu_machine(tensorrt={}, onnxruntime=None)))
    last = text[text.index("To change that:") :].splitlines()[1:]
    assert [line.split()[-1] for line in last] == ["'onnxruntime>=1.21'", "'tensorrt-rtx>=1.5.0.114'"]


# Python and packages


def test_old_python() -> None:
    found = finding(cpu_machine(python=(3, 9, 18)), "Python")
    assert (found.status, found.what) == (Status.PROBLEM, "3.9.18")
    assert "3.10" in found.means


def test_core_packages_that_are_missing_are_named_with_what_installs_them() -> None:
    found = finding(cpu_machine(packages={**cpu_machine().packages, "onnx": None}), "core packages")
    assert (found.status, found.what) == (Status.MISSING, "1 of 2 are missing")
    assert "onnx" in found.means
    assert found.command is not None
    assert found.command.endswith("'onnx>=1.18'")


def test_core_packages_that_are_too_old() -> None:
    found = finding(cpu_machine(packages={**cpu_machine().packages, "onnx": "1.9.3"}), "core packages")
    assert (found.status, found.means) == (Status.PROBLEM, "onnx 1.9.3, onnx>=1.18 is needed.")
    assert set(found.blocks) == set(Task)


def test_a_package_is_asked_for_only_where_this_python_needs_it() -> None:
    assert finding(cpu_machine(python=(3, 11, 0)), "core packages").status is Status.OK
    assert finding(cpu_machine(python=(3, 10, 0)), "core packages").means == "Nothing here works without tomli."


@pytest.mark.parametrize(
    ("torch", "status", "says"),
    [
        (Torch("2.13.0+cpu", "CPU"), Status.OK, "a CPU build"),
        (Torch("2.13.0", "CUDA 13.0"), Status.OK, "a CUDA 13.0 build"),
        (Torch("2.13.0", ""), Status.OK, "build not known"),
        (Torch("2.4.1+cpu", "CPU"), Status.PROBLEM, "2.4.1+cpu"),
        (None, Status.MISSING, "not installed"),
    ],
)
def test_torch(torch: Torch | None, status: Status, says: str) -> None:
    found = finding(cpu_machine(torch=torch), "torch")
    assert found.status is status
    assert says in found.what
    assert found.command is not None
    assert "--torch-backend" in found.command


def test_both_wheels_of_onnxruntime() -> None:
    """They work as long as neither is uninstalled, so this is a problem that stands in the way of nothing."""
    both = InstalledOnnxRuntime(
        {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.22.0"}, "onnxruntime", "1.32.0", ("cpu",)
    )
    found = finding(cpu_machine(onnxruntime=both), "onnxruntime")
    assert (found.status, found.blocks) == (Status.PROBLEM, ())
    assert "those of onnxruntime 1.32.0: graphs run on the CPU only" in found.means
    assert found.command is not None
    assert "uninstall -y onnxruntime onnxruntime-gpu && " in found.command
    assert found.command.endswith("'onnxruntime>=1.21'")
    kept = finding(gpu_machine(L4, onnxruntime=both), "onnxruntime").command
    assert kept is not None
    assert kept.endswith("'onnxruntime-gpu>=1.21'")


def test_onnxruntime_after_one_of_two_wheels_was_uninstalled() -> None:
    broken = InstalledOnnxRuntime({"onnxruntime-gpu": "1.22.0"}, broken="its compiled library")
    found = finding(cpu_machine(onnxruntime=broken), "onnxruntime")
    assert (found.status, set(found.blocks)) == (Status.PROBLEM, {Task.EXPORT, Task.VERIFY})
    assert "its compiled library is missing" in found.means


def test_old_onnxruntime() -> None:
    old = InstalledOnnxRuntime({"onnxruntime": "1.16.0"}, "onnxruntime", "1.16.0", ("cpu",))
    assert finding(cpu_machine(onnxruntime=old), "onnxruntime").status is Status.PROBLEM


def test_a_tensorrt_without_its_libraries() -> None:
    found = finding(gpu_machine(L4, tensorrt={Flavour.TENSORRT: BROKEN, **RTX_ONLY}), "tensorrt")
    assert found.status is Status.PROBLEM
    assert "libnvinfer.so.10" in found.means
    assert found.blocks == ()  # the other flavour builds and runs
    alone = finding(gpu_machine(L4, tensorrt={Flavour.TENSORRT: BROKEN}), "tensorrt")
    assert set(alone.blocks) == {Task.BUILD, Task.RUN}


def test_an_old_tensorrt() -> None:
    found = finding(gpu_machine(L4, tensorrt={Flavour.TENSORRT: TensorRTPackage("8.6.1")}), "tensorrt")
    assert (found.status, found.means) == (Status.PROBLEM, "tensorrt>=10.8 is needed.")


def test_no_compiler_without_a_gpu_on_another_architecture() -> None:
    here = cpu_machine(system="Darwin", machine="arm64", tensorrt={})
    found = finding(here, "tensorrt-rtx")
    assert found.what == "not made for Darwin on arm64"
    assert not can(examine_machine(here))[Task.BUILD]


@pytest.mark.parametrize(
    ("system", "machine", "status", "said"),
    [
        ("Linux", "x86_64", Status.OK, "All tests run there."),
        ("Linux", "aarch64", Status.UNKNOWN, "No export was ever run there."),
        ("Windows", "AMD64", Status.UNKNOWN, "No export was ever run there, only in Wine."),
        ("Windows", "ARM64", Status.UNKNOWN, "torch and onnxsim have no wheels for it"),
        ("Darwin", "arm64", Status.UNKNOWN, "Nothing of spach-deploy was ever run there"),
    ],
)
def test_what_was_run_on_a_system_is_said(system: str, machine: str, status: Status, said: str) -> None:
    found = finding(cpu_machine(system=system, machine=machine), "platform")
    assert (found.status, found.what) == (status, f"{system} on {machine}")
    assert said in found.means


def test_on_windows_no_script_of_bash_is_shown() -> None:
    here = examine_machine(cpu_machine(system="Windows", machine="AMD64"))
    assert not [item for item in here.findings if "scripts/" in (item.command or "")]


def test_versions_that_the_tests_do_not_run_with() -> None:
    found = finding(cpu_machine(pins={"onnx": "1.22.0", "torch": "2.13.0"}), "pinned versions")
    assert (found.status, found.what) == (Status.OK, "1 of 2 differ")
    assert "onnx 1.23.2 (1.22.0)" in found.means
    assert found.command is not None
    assert found.command.endswith("onnx==1.22.0")


# Driver, GPUs, memory, folders


def test_a_driver_that_is_too_old_for_what_is_installed() -> None:
    here = gpu_machine(L4, cuda=(12, 4), tensorrt=RTX_ONLY)
    found = finding(here, "NVIDIA driver")
    assert (found.status, found.blocks) == (Status.PROBLEM, (Task.RUN,))
    assert "made with CUDA 13, which takes driver 580" in found.means
    both = finding(gpu_machine(L4, cuda=(12, 4)), "NVIDIA driver")
    assert (both.status, both.blocks) == (Status.PROBLEM, ())  # tensorrt was made with CUDA 12


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        (L4, "For engines of tensorrt and tensorrt-rtx."),
        (H100, "For engines of tensorrt, not of tensorrt-rtx."),
        (V100, "No TensorRT here runs on it"),
        (LATER, "No TensorRT here runs on it"),
    ],
)
def test_gpus(gpu: Any, says: str) -> None:
    assert finding(gpu_machine(gpu), "NVIDIA GPU").means.startswith(says)


def test_a_second_gpu_is_told_that_it_is_not_used() -> None:
    found = finding(gpu_machine(T4, L4), "NVIDIA GPU 1")
    assert "first GPU" in found.means
    assert found.command == "export CUDA_VISIBLE_DEVICES=1"


@pytest.mark.parametrize(("broken", "status"), [(True, Status.PROBLEM), (False, Status.MISSING)])
def test_no_gpu_and_why(broken: bool, status: Status) -> None:
    here = cpu_machine(driver=Driver(problem="somebody took it", remedy="take it back", is_broken=broken))
    found = finding(here, "NVIDIA GPU")
    assert (found.status, found.what, found.command) == (status, "somebody took it", "take it back")


def test_memory_that_a_container_limits() -> None:
    found = finding(cpu_machine(memory=Memory(2 * GIGABYTE, 4 * GIGABYTE, limited=True)), "memory")
    assert found.status is Status.PROBLEM
    assert "a limit set for this process" in found.what
    assert found.command is not None
    assert "--memory" in found.command


# As text and as JSON


def test_text_is_wrapped_and_commands_are_not() -> None:
    machine = examine_machine(gpu_machine(L4, T4))
    text = as_text(machine, width=60)
    lines = [line.strip() for line in text.splitlines()]
    assert all(f"$ {item.command}" in lines for item in machine.findings if item.command)
    assert all(len(line) <= 60 for line in text.splitlines() if "$ " not in line)


def test_a_name_that_is_not_ascii_stays_as_it_is() -> None:
    driver = Driver((L4,), "580 \N{SNOWMAN}", (13, 0))
    assert "580 \N{SNOWMAN}" in as_text(examine_machine(cpu_machine(driver=driver)))


def test_colour_comes_on_request_only() -> None:
    machine = examine_machine(cpu_machine())
    assert "\x1b[" not in as_text(machine)
    assert "\x1b[" in as_text(machine, color=True)


def test_json_says_the_same() -> None:
    content = json.loads(json.dumps(examine_machine(cpu_machine(tensorrt={})).to_dict()))
    assert content["exit_code"] == 3
    assert content["can"]["build"] == {"possible": False, "how": "tensorrt-rtx: not installed"}
    (entry,) = (entry for entry in content["findings"] if entry["topic"] == "tensorrt-rtx")
    assert (entry["status"], entry["blocks"]) == ("missing", ["build"])

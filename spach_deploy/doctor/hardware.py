"""Findings about driver, GPUs, memory and folders."""

from __future__ import annotations

from collections.abc import Iterator

from spach_deploy.common.resources import FolderCheck
from spach_deploy.doctor.capability import RUNS_ON, driver_runs, runners
from spach_deploy.doctor.driver import LEAST_DRIVER
from spach_deploy.doctor.finding import Finding, Status, Task
from spach_deploy.doctor.machine_info import MachineInfo
from spach_deploy.options.gpus import SUPPORTED, format_gpus
from spach_deploy.runtime.devices import RTX_CAPABILITIES

LEAST_MEMORY_BYTES = 3 * 10**9
"""An export of ms_hybrid_s takes 2.9 GB, all processes together (benchmarks/RESULTS.md)."""

LEAST_DISK_BYTES = 10**9
"""A bundle of ms_hybrid_s takes 0.3 GB, and its graphs are written several times on the way."""

_ELSEWHERE = "/path/with/space"
_ON_ANOTHER = "spach-validate build/ms_hybrid_s-fp16  # on a machine with an NVIDIA GPU"


def about_driver(here: MachineInfo) -> Iterator[Finding]:
    """Every GPU, and whether the driver is new enough; or why there is none."""
    driver = here.driver
    if not driver.gpus:
        status = Status.PROBLEM if driver.is_broken else Status.MISSING
        means = "Engines are built and graphs verified without one; to run an engine takes one."
        yield Finding(status, "NVIDIA GPU", driver.problem, means, driver.remedy or _ON_ANOTHER, (Task.RUN,))
        return
    yield _driver(here)
    for ordinal in range(len(driver.gpus)):
        yield _gpu(here, ordinal)


def _driver(here: MachineInfo) -> Finding:
    driver, topic = here.driver, "NVIDIA driver"
    runs = f"runs CUDA {driver.cuda[0]}.{driver.cuda[1]} and older" if driver.cuda else "CUDA version not known"
    what = f"{driver.version or 'version not known'}, {runs}"
    lacking = [flavour for flavour in here.tensorrt if not driver_runs(here, flavour)]
    if not lacking:
        return Finding(Status.OK, topic, what, "New enough for what is installed here.", driver.upgrade)
    newest = max(here.tensorrt[flavour].cuda or 0 for flavour in lacking)
    names = " and ".join(flavour.value for flavour in lacking)
    means = f"Too old: {names} was made with CUDA {newest}, which takes driver {LEAST_DRIVER[newest]} or newer."
    return Finding(Status.PROBLEM, topic, what, means, driver.upgrade, () if runners(here) else (Task.RUN,))


def _gpu(here: MachineInfo, ordinal: int) -> Finding:
    gpu = here.driver.gpus[ordinal]
    topic = "NVIDIA GPU" if len(here.driver.gpus) == 1 else f"NVIDIA GPU {ordinal}"
    what = f"{gpu}, {gigabytes(gpu.memory_bytes)}" if gpu.memory_bytes else str(gpu)
    flavours = [flavour.value for flavour, runs_on in RUNS_ON.items() if gpu.capability in runs_on]
    choose = f"export CUDA_VISIBLE_DEVICES={ordinal}"
    if not flavours:
        means = f"No TensorRT here runs on it: they cover {format_gpus(SUPPORTED)}."
        return Finding(Status.PROBLEM, topic, what, means, choose, () if ordinal else (Task.RUN,))
    but = "" if gpu.capability in RTX_CAPABILITIES else ", not of tensorrt-rtx"
    first = " Engines run on the first GPU." if ordinal else ""
    return Finding(Status.OK, topic, what, f"For engines of {' and '.join(flavours)}{but}.{first}", choose)


def about_memory(here: MachineInfo) -> Iterator[Finding]:
    """Does an export fit."""
    memory, takes = here.memory, f"An export of ms_hybrid_s takes {gigabytes(LEAST_MEMORY_BYTES)}."
    if memory is None:
        yield Finding(Status.UNKNOWN, "memory", "this system does not tell", takes)
        return
    limit = ", a limit set for this process" if memory.limited else ""
    what = f"{gigabytes(memory.available_bytes)} free of {gigabytes(memory.total_bytes)}{limit}"
    raise_it = "docker run --memory 8g IMAGE" if memory.limited else None
    if memory.available_bytes < LEAST_MEMORY_BYTES:
        means = f"Too little. {takes} Close other programs, or take a smaller model."
        yield Finding(Status.PROBLEM, "memory", what, means, raise_it, (Task.EXPORT, Task.BUILD))
    else:
        yield Finding(Status.OK, "memory", what, takes, raise_it)


def about_disk(here: MachineInfo) -> Iterator[Finding]:
    """Can bundles and temporary files be written."""
    yield _folder(here.output, "bundles", f"spach-export --model ms_hybrid_s --fp16 -o {_ELSEWHERE}/bundle")
    yield _folder(here.temporary, "temporary files", f"export TMPDIR={_ELSEWHERE}")


def _folder(folder: FolderCheck, topic: str, command: str) -> Finding:
    blocks = (Task.EXPORT, Task.BUILD)
    if folder.problem:
        return Finding(Status.PROBLEM, topic, str(folder.path), f"No good: {folder.problem}.", command, blocks)
    what = f"{folder.path}, {gigabytes(folder.free_bytes)} free"
    takes = f"an export takes up to {gigabytes(LEAST_DISK_BYTES)}"
    if folder.free_bytes < LEAST_DISK_BYTES:
        return Finding(Status.PROBLEM, topic, what, f"Too little: {takes}.", command, blocks)
    return Finding(Status.OK, topic, what, f"Can be written; {takes}.", command)


def gigabytes(count: int) -> str:
    """`2.9 GB`."""
    return f"{count / 1e9:,.1f} GB"

"""The doctor's report on this machine: findings about software and hardware, and for each task whether it is possible.

Every `about_*` function turns one topic of `MachineInfo` into findings; `examine_machine` collects them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

from spach_deploy._version import __version__
from spach_deploy.common.machine import FolderCheck
from spach_deploy.common.operating_system import setting_variable
from spach_deploy.common.versions import Requirement, is_older, release
from spach_deploy.doctor.commands import installing, installing_torch, reinstalling
from spach_deploy.doctor.compatibility import RUNS_ON, builders, driver_runs, runners, runs_on_gpu, works
from spach_deploy.doctor.driver import LEAST_DRIVER
from spach_deploy.doctor.finding import EVERYTHING, Finding, Status, Task, TaskStatus, blockers, reasons
from spach_deploy.doctor.machine_info import InstalledOnnxRuntime, MachineInfo
from spach_deploy.options.gpus import SUPPORTED, format_gpus
from spach_deploy.options.specs import Flavour
from spach_deploy.runtime.devices import RTX_CAPABILITIES

LEAST_MEMORY_BYTES = 3 * 10**9
"""An export of ms_hybrid_s takes 2.9 GB, all its processes together (benchmarks/RESULTS.md)."""

LEAST_DISK_BYTES = 10**9
"""A bundle of ms_hybrid_s takes 0.3 GB, and an export writes its graphs several times."""

_BUILD_THEM = "they must be built from source"
_ELSEWHERE = "/path/with/space"
_ON_ANOTHER = "spach-validate build/ms_hybrid_s-fp16  # on a machine with an NVIDIA GPU"


def about_platform(info: MachineInfo) -> Iterator[Finding]:
    """What was run on this system and kind of processor, and what has no wheels for it."""
    here = info.platform
    what, topic = f"{info.system} on {info.machine}", "platform"
    if here is None:
        yield Finding(Status.UNKNOWN, topic, what, "Nothing of spach-deploy was ever run there (docs/platforms.md).")
    elif here.lacking:
        means = f"{here.ran} {' and '.join(here.lacking)} have no wheels for it: {_BUILD_THEM} (docs/platforms.md)."
        yield Finding(Status.UNKNOWN, topic, what, means)
    else:
        status = Status.OK if here.is_tested else Status.UNKNOWN
        yield Finding(status, topic, what, here.ran if here.is_tested else f"{here.ran} (docs/platforms.md)")


def about_driver(info: MachineInfo) -> Iterator[Finding]:
    """Each GPU, and whether the driver is new enough; or why there is no GPU."""
    driver = info.driver
    if not driver.gpus:
        status = Status.PROBLEM if driver.is_broken else Status.MISSING
        means = "Engines are built and graphs verified without one; to run an engine takes one."
        yield Finding(status, "NVIDIA GPU", driver.problem, means, driver.remedy or _ON_ANOTHER, (Task.RUN,))
        return
    yield _driver(info)
    for ordinal in range(len(driver.gpus)):
        yield _gpu(info, ordinal)


def _driver(info: MachineInfo) -> Finding:
    driver, topic = info.driver, "NVIDIA driver"
    runs = f"runs CUDA {driver.cuda[0]}.{driver.cuda[1]} and older" if driver.cuda else "CUDA version not known"
    what = f"{driver.version or 'version not known'}, {runs}"
    lacking = [flavour for flavour in info.tensorrt if not driver_runs(info, flavour)]
    if not lacking:
        return Finding(Status.OK, topic, what, "New enough for what is installed here.", driver.upgrade)
    newest = max(info.tensorrt[flavour].cuda or 0 for flavour in lacking)
    names = " and ".join(flavour.value for flavour in lacking)
    means = f"Too old: {names} was made with CUDA {newest}, which takes driver {LEAST_DRIVER[newest]} or newer."
    return Finding(Status.PROBLEM, topic, what, means, driver.upgrade, () if runners(info) else (Task.RUN,))


def _gpu(info: MachineInfo, ordinal: int) -> Finding:
    gpu = info.driver.gpus[ordinal]
    topic = "NVIDIA GPU" if len(info.driver.gpus) == 1 else f"NVIDIA GPU {ordinal}"
    what = f"{gpu}, {gigabytes(gpu.memory_bytes)}" if gpu.memory_bytes else str(gpu)
    flavours = [flavour.value for flavour, runs_on in RUNS_ON.items() if gpu.capability in runs_on]
    choose = setting_variable("CUDA_VISIBLE_DEVICES", str(ordinal))
    if not flavours:
        means = f"No TensorRT here runs on it: they cover {format_gpus(SUPPORTED)}."
        return Finding(Status.PROBLEM, topic, what, means, choose, () if ordinal else (Task.RUN,))
    but = "" if gpu.capability in RTX_CAPABILITIES else ", not of tensorrt-rtx"
    first = " Engines run on the first GPU." if ordinal else ""
    return Finding(Status.OK, topic, what, f"For engines of {' and '.join(flavours)}{but}.{first}", choose)


def about_memory(info: MachineInfo) -> Iterator[Finding]:
    """Whether an export fits into memory."""
    memory, takes = info.memory, f"An export of ms_hybrid_s takes {gigabytes(LEAST_MEMORY_BYTES)}."
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


def about_disk(info: MachineInfo) -> Iterator[Finding]:
    """Whether bundles and temporary files can be written."""
    yield _folder(info.output, "bundles", f"spach-export --model ms_hybrid_s --fp16 -o {_ELSEWHERE}/bundle")
    yield _folder(info.temporary, "temporary files", setting_variable("TMPDIR", _ELSEWHERE))


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
    """Bytes as `2.9 GB`."""
    return f"{count / 1e9:,.1f} GB"


_LEAST_PYTHON = "3.10"
_OTHER_PYTHON = {"Windows": "py -3.12 -m venv .venv"}
_SETUP = {"Windows": "pip install --constraint constraints.txt --editable '.[cpu,report]'"}
"""By system; elsewhere it is scripts/setup."""
_UPGRADE = "spach-deploy"
_TEST_TOOLS = frozenset({"pytest", "pytest-xdist", "scikit-image", "scikit-learn", "mypy", "ruff"})
_SHOWN_CORE = ("onnx", "onnxscript", "onnxsim", "polygraphy")
_PROVIDERS = {"cpu": "the CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}
_NOT_ON_AN_INDEX = (
    "Its libraries are not in the public package index: the installer fetches them from NVIDIA's own; where that is out"
    " of reach, install NVIDIA's wheels by hand."
)


def about_python(info: MachineInfo) -> Iterator[Finding]:
    """Whether Python is new enough."""
    version = ".".join(str(number) for number in info.python)
    least = ".".join(str(number) for number in release(info.requirements.python)) or _LEAST_PYTHON
    other = _OTHER_PYTHON.get(info.system, "PYTHON=/path/to/python3 scripts/setup")
    if is_older(version, least):
        means = f"spach-deploy needs Python {least} or newer."
        yield Finding(Status.PROBLEM, "Python", version, means, other, EVERYTHING)
    else:
        yield Finding(Status.OK, "Python", f"{version} in {sys.prefix}", f"{least} or newer is needed.", other)


def about_core(info: MachineInfo) -> Iterator[Finding]:
    """Whether the required packages other than torch are installed and new enough."""
    core = [package for package in info.requirements.of() if package.holds_for(info.python) and package.name != "torch"]
    missing = [package for package in core if info.packages.get(package.name) is None]
    old = [package for package in core if (has := info.packages.get(package.name)) and not package.is_met_by(has)]
    if missing:
        what, means = f"{len(missing)} of {len(core)} are missing", f"Nothing here works without {_names(missing)}."
        yield Finding(Status.MISSING, "core packages", what, means, _install(missing), EVERYTHING)
    elif old:
        what = f"{len(old)} of {len(core)} are too old"
        means = "; ".join(f"{package.name} {info.packages[package.name]}, {package} is needed" for package in old) + "."
        yield Finding(Status.PROBLEM, "core packages", what, means, _install(old), EVERYTHING)
    else:
        shown = ", ".join(f"{name} {info.packages[name]}" for name in _SHOWN_CORE if info.packages.get(name))
        yield Finding(Status.OK, "core packages", f"all {len(core)}", f"Among them {shown}.", _set_up(info))


def _names(packages: list[Requirement]) -> str:
    return ", ".join(package.name for package in packages)


def _install(packages: list[Requirement]) -> str:
    return installing(*(str(package) for package in packages))


def _set_up(info: MachineInfo) -> str:
    """The command that installs everything: a checkout has a script for it, with pinned versions."""
    return _set_up_checkout(info) if info.pins else installing("--upgrade", _UPGRADE)


def _set_up_checkout(info: MachineInfo) -> str:
    return _SETUP.get(info.system, "scripts/setup")


def about_torch(info: MachineInfo) -> Iterator[Finding]:
    """Whether torch is installed, and which build; a CPU build suffices."""
    wanted = info.requirements.get("torch")
    cpu = installing_torch("cpu", str(wanted))
    if info.torch is None:
        means = "It reads checkpoints, and is the reference that everything is compared with. A CPU build will do."
        yield Finding(Status.MISSING, "torch", "not installed", means, cpu, EVERYTHING)
        return
    build = f"a {info.torch.build} build" if info.torch.build else "build not known"
    what = f"{info.torch.version}, {build}"
    if not wanted.is_met_by(info.torch.version):
        yield Finding(Status.PROBLEM, "torch", what, f"{wanted} is needed.", cpu, EVERYTHING)
    elif info.torch.build == "CPU":
        means = "All that it takes: the reference runs on the CPU."
        yield Finding(Status.OK, "torch", what, means, installing_torch("auto", str(wanted)))
    else:
        means = "More than it takes: the reference runs on the CPU, and a CPU build saves gigabytes."
        yield Finding(Status.OK, "torch", what, means, cpu)


def about_onnxruntime(info: MachineInfo) -> Iterator[Finding]:
    """Whether onnxruntime is installed and complete, and from one wheel only."""
    wanted, found = info.requirements.get("onnxruntime"), info.onnxruntime
    if found is None:
        means, needs_it = "Graphs run in it, to be measured and verified.", (Task.EXPORT, Task.VERIFY)
        yield Finding(Status.MISSING, "onnxruntime", "not installed", means, installing(str(wanted)), needs_it)
    else:
        yield _installed_onnxruntime(info, found, wanted)


def _installed_onnxruntime(info: MachineInfo, found: InstalledOnnxRuntime, wanted: Requirement) -> Finding:
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found.wheels and info.driver.gpus else "onnxruntime"
    mend = reinstalling(found.wheels or ("onnxruntime",), str(Requirement(keep, wanted.minimum)))
    version = found.files_version or next(iter(found.wheels.values()), "")
    what = " and ".join(f"{name} {number}" for name, number in found.wheels.items()) or f"{version}, of no wheel"
    runs_on = _words(found.providers)
    needs_it = (Task.EXPORT, Task.VERIFY)
    if found.broken:
        means = f"{found.broken} is missing, as after one of two wheels was uninstalled, so it does not import."
        return Finding(Status.PROBLEM, "onnxruntime", what, means, mend, needs_it)
    if not wanted.is_met_by(version):
        return Finding(Status.PROBLEM, "onnxruntime", what, f"{wanted} is needed.", mend, needs_it)
    if len(found.wheels) > 1:
        means = (
            f"They share one folder, and the files in it are those of {found.files_of or 'one of them'} {version}:"
            f" graphs run on {runs_on}. That will do here, until one of them is uninstalled."
        )
        return Finding(Status.PROBLEM, "onnxruntime", what, means, mend)
    means = f"Graphs run on {runs_on}; they are verified on the CPU."
    return Finding(Status.OK, "onnxruntime", what.removeprefix("onnxruntime "), means, installing("--upgrade", keep))


def _words(providers: tuple[str, ...]) -> str:
    if providers == ("cpu",):
        return "the CPU only"
    return ", ".join(_PROVIDERS.get(name, name) for name in providers) or "nothing that is known"


def about_tensorrt_rtx(info: MachineInfo) -> Iterator[Finding]:
    """TensorRT for RTX, which builds without a GPU."""
    flavour = Flavour.TENSORRT_RTX
    if info.tensorrt.get(flavour) is None and not (info.platform and info.platform.has_rtx):
        what = f"not made for {info.system} on {info.machine}"
        means = "Build engines on Linux or Windows, or with tensorrt on a machine that has a GPU."
        yield Finding(Status.MISSING, flavour.value, what, means, None, _blocked_tasks(info, flavour))
        return
    good = f"Builds engines on the CPU, for {format_gpus(RTX_CAPABILITIES)}."
    yield _tensorrt(info, flavour, good, "Builds engines without a GPU, for every RTX GPU.")


def about_tensorrt(info: MachineInfo) -> Iterator[Finding]:
    """TensorRT, which builds for this machine's GPU."""
    if info.driver.gpus:
        good = f"Builds engines on and for {info.driver.gpus[0]}."
        yield _tensorrt(info, Flavour.TENSORRT, good, f"{good} {_NOT_ON_AN_INDEX}")
    else:
        good = "It builds and runs engines where there is a GPU, so not here."
        yield _tensorrt(info, Flavour.TENSORRT, good, "Of no use without a GPU.")


def _tensorrt(info: MachineInfo, flavour: Flavour, good: str, absent: str) -> Finding:
    package, wanted = info.tensorrt.get(flavour), info.requirements.get(flavour.value)
    topic, blocks = flavour.value, _blocked_tasks(info, flavour)
    if package is None:
        return Finding(Status.MISSING, topic, "not installed", absent, installing(str(wanted)), blocks)
    if package.error:
        means = f"It does not import: {package.error.rstrip('.')}."
        again = installing("--force-reinstall", str(wanted))
        return Finding(Status.PROBLEM, topic, package.version or "installed", means, again, blocks)
    upgrade = installing("--upgrade", str(wanted))
    if not works(info, flavour):
        return Finding(Status.PROBLEM, topic, package.version, f"{wanted} is needed.", upgrade, blocks)
    made_with = f", made with CUDA {package.cuda}" if package.cuda else ""
    return Finding(Status.OK, topic, f"{package.version or 'installed'}{made_with}", good, upgrade)


def _blocked_tasks(info: MachineInfo, flavour: Flavour) -> tuple[Task, ...]:
    """Tasks that a missing or broken TensorRT blocks: those that it would do, and no other TensorRT does here."""
    builds = not builders(info) and (flavour is Flavour.TENSORRT_RTX or runs_on_gpu(info, flavour))
    runs = not runners(info) and runs_on_gpu(info, flavour)
    return (*([Task.BUILD] if builds else []), *([Task.RUN] if runs else []))


def about_reports(info: MachineInfo) -> Iterator[Finding]:
    """Whether the packages for HTML reports are installed."""
    wanted = list(info.requirements.of("report"))
    missing = [package for package in wanted if info.packages.get(package.name) is None]
    if missing:
        means = "Reports as pages with plots take it; tables and JSON do not."
        yield Finding(Status.MISSING, "reports", _names(missing), means, _install(missing))
    elif old := [package for package in wanted if not package.is_met_by(str(info.packages[package.name]))]:
        what = ", ".join(f"{package.name} {info.packages[package.name]}" for package in old)
        yield Finding(Status.PROBLEM, "reports", what, f"{' and '.join(map(str, old))} is needed.", _install(old))
    elif wanted:
        what = ", ".join(f"{package.name} {info.packages[package.name]}" for package in wanted)
        yield Finding(Status.OK, "reports", what, "Reports can be written as pages with plots.", _install(wanted))


def about_pins(info: MachineInfo) -> Iterator[Finding]:
    """Whether the installed versions are those that the tests run with. Nothing outside a checkout, which has the
    pins.
    """
    versions = {**info.packages, "torch": info.torch.version if info.torch else None}
    pinned = {name: pin for name, pin in info.pins.items() if versions.get(name) and name not in _TEST_TOOLS}
    other = [name for name, pin in pinned.items() if release(str(versions[name])) != release(pin)]
    if other:
        listed = ", ".join(f"{name} {versions[name]} ({pinned[name]})" for name in other)
        means = f"The tests run with the versions in brackets: {listed}."
        change = installing(*(f"{name}=={pinned[name]}" for name in other))
        yield Finding(Status.OK, "pinned versions", f"{len(other)} of {len(pinned)} differ", means, change)
    elif pinned:
        means = "These are the versions that the tests run with."
        yield Finding(Status.OK, "pinned versions", f"all {len(pinned)}", means, _set_up_checkout(info))


CORE_FLOW = (Task.EXPORT, Task.BUILD, Task.VERIFY)
"""Tasks of `spach-export --model ms_hybrid_s --fp16`; it needs no GPU."""

TOPICS: tuple[Callable[[MachineInfo], Iterator[Finding]], ...] = (
    *(about_platform, about_python, about_core, about_torch, about_onnxruntime, about_tensorrt_rtx, about_tensorrt),
    *(about_driver, about_memory, about_disk, about_reports, about_pins),
)
"""Topics in the order of the report, which is the order in which to fix them."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """All findings, and for each task whether it is possible here."""

    findings: tuple[Finding, ...]
    abilities: tuple[TaskStatus, ...]

    @property
    def exit_code(self) -> int:
        """0 when the tasks of `CORE_FLOW` are possible here, else 3."""
        return 0 if all(ability.possible for ability in self.abilities if ability.task in CORE_FLOW) else 3

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "spach_deploy": __version__,
            "exit_code": self.exit_code,
            "can": {ability.task.value: ability.to_dict() for ability in self.abilities},
            "findings": [finding.to_dict() for finding in self.findings],
        }


def examine_machine(info: MachineInfo) -> Machine:
    """All findings in the order of `TOPICS`, and the tasks that they allow."""
    findings = tuple(finding for topic in TOPICS for finding in topic(info))
    return Machine(findings, tuple(_ability(task, findings, info) for task in Task))


# Tasks


def _ability(task: Task, findings: tuple[Finding, ...], info: MachineInfo) -> TaskStatus:
    blocking = blockers(findings, task)
    if blocking:
        return TaskStatus(task, False, reasons(blocking))
    return TaskStatus(task, True, _HOW[task](info))


def _how_export(info: MachineInfo) -> str:
    return f"checkpoints to graphs, with torch {info.torch.version if info.torch else ''}"


def _how_build(info: MachineInfo) -> str:
    where = {
        Flavour.TENSORRT_RTX: f"on the CPU, for {format_gpus(RTX_CAPABILITIES)}",
        Flavour.TENSORRT: "for the GPU here",
    }
    return "engines with " + "; ".join(f"{flavour.value} {where[flavour]}" for flavour in builders(info))


def _how_run(info: MachineInfo) -> str:
    return f"engines of {' and '.join(flavour.value for flavour in runners(info))} on {info.driver.gpus[0]}"


def _how_verify(info: MachineInfo) -> str:
    version = info.onnxruntime.files_version if info.onnxruntime else ""
    engines = ", and engines by running them" if runners(info) else "; an engine's graph stands in for it"
    return f"graphs in ONNX Runtime {version}{engines}"


_HOW: dict[Task, Callable[[MachineInfo], str]] = {
    Task.EXPORT: _how_export,
    Task.BUILD: _how_build,
    Task.RUN: _how_run,
    Task.VERIFY: _how_verify,
}

"""Findings about Python and its packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from spach_deploy.common.versions import Requirement, is_older, release
from spach_deploy.doctor.capability import builders, runners, runs_on_gpu, works
from spach_deploy.doctor.commands import installing, installing_torch, reinstalling
from spach_deploy.doctor.finding import EVERYTHING, Finding, Status, Task
from spach_deploy.doctor.machine_info import MachineInfo
from spach_deploy.doctor.packages import InstalledOnnxRuntime
from spach_deploy.options.gpus import format_gpus
from spach_deploy.options.specs import Flavour
from spach_deploy.runtime.devices import RTX_CAPABILITIES

_LEAST_PYTHON = "3.10"
_OTHER_PYTHON = "PYTHON=/path/to/python3 scripts/setup"
_SETUP, _UPGRADE = "scripts/setup", "spach-deploy"
_TEST_TOOLS = frozenset({"pytest", "pytest-xdist", "scikit-image", "scikit-learn", "mypy", "ruff"})
_SHOWN_CORE = ("onnx", "onnxscript", "onnxsim", "polygraphy")
_PROVIDERS = {"cpu": "the CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}
_NOT_ON_AN_INDEX = (
    "Its libraries are not in the public package index: the installer fetches them from NVIDIA's own; where that is out"
    " of reach, install NVIDIA's wheels by hand."
)


def about_python(here: MachineInfo) -> Iterator[Finding]:
    """Is it new enough."""
    version = ".".join(str(number) for number in here.python)
    least = ".".join(str(number) for number in release(here.requirements.python)) or _LEAST_PYTHON
    if is_older(version, least):
        means = f"spach-deploy needs Python {least} or newer."
        yield Finding(Status.PROBLEM, "Python", version, means, _OTHER_PYTHON, EVERYTHING)
    else:
        yield Finding(Status.OK, "Python", f"{version} in {sys.prefix}", f"{least} or newer is needed.", _OTHER_PYTHON)


def about_core(here: MachineInfo) -> Iterator[Finding]:
    """Every required package but torch: all there, and new enough."""
    core = [package for package in here.requirements.of() if package.holds_for(here.python) and package.name != "torch"]
    missing = [package for package in core if here.packages.get(package.name) is None]
    old = [package for package in core if (has := here.packages.get(package.name)) and not package.is_met_by(has)]
    if missing:
        what, means = f"{len(missing)} of {len(core)} are missing", f"Nothing here works without {_names(missing)}."
        yield Finding(Status.MISSING, "core packages", what, means, _install(missing), EVERYTHING)
    elif old:
        what = f"{len(old)} of {len(core)} are too old"
        means = "; ".join(f"{package.name} {here.packages[package.name]}, {package} is needed" for package in old) + "."
        yield Finding(Status.PROBLEM, "core packages", what, means, _install(old), EVERYTHING)
    else:
        shown = ", ".join(f"{name} {here.packages[name]}" for name in _SHOWN_CORE if here.packages.get(name))
        yield Finding(Status.OK, "core packages", f"all {len(core)}", f"Among them {shown}.", _set_up(here))


def _names(packages: list[Requirement]) -> str:
    return ", ".join(package.name for package in packages)


def _install(packages: list[Requirement]) -> str:
    return installing(*(str(package) for package in packages))


def _set_up(here: MachineInfo) -> str:
    """A checkout has pins, and a script that installs them."""
    return _SETUP if here.pins else installing("--upgrade", _UPGRADE)


def about_torch(here: MachineInfo) -> Iterator[Finding]:
    """Which build it is: a CPU build does, a CUDA build does as well."""
    wanted = here.requirements.get("torch")
    cpu = installing_torch("cpu", str(wanted))
    if here.torch is None:
        means = "It reads checkpoints, and is the reference that everything is compared with. A CPU build will do."
        yield Finding(Status.MISSING, "torch", "not installed", means, cpu, EVERYTHING)
        return
    build = f"a {here.torch.build} build" if here.torch.build else "build not known"
    what = f"{here.torch.version}, {build}"
    if not wanted.is_met_by(here.torch.version):
        yield Finding(Status.PROBLEM, "torch", what, f"{wanted} is needed.", cpu, EVERYTHING)
    elif here.torch.build == "CPU":
        means = "All that it takes: the reference runs on the CPU."
        yield Finding(Status.OK, "torch", what, means, installing_torch("auto", str(wanted)))
    else:
        means = "More than it takes: the reference runs on the CPU, and a CPU build saves gigabytes."
        yield Finding(Status.OK, "torch", what, means, cpu)


def about_onnxruntime(here: MachineInfo) -> Iterator[Finding]:
    """Is it there and whole, and is it one wheel's."""
    wanted, found = here.requirements.get("onnxruntime"), here.onnxruntime
    if found is None:
        means, needs_it = "Graphs run in it, to be measured and verified.", (Task.EXPORT, Task.VERIFY)
        yield Finding(Status.MISSING, "onnxruntime", "not installed", means, installing(str(wanted)), needs_it)
    else:
        yield _installed_onnxruntime(here, found, wanted)


def _installed_onnxruntime(here: MachineInfo, found: InstalledOnnxRuntime, wanted: Requirement) -> Finding:
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found.wheels and here.driver.gpus else "onnxruntime"
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


def about_tensorrt_rtx(here: MachineInfo) -> Iterator[Finding]:
    """The compiler that needs no GPU."""
    flavour = Flavour.TENSORRT_RTX
    if here.tensorrt.get(flavour) is None and not here.is_x86_linux:
        what = f"not made for {here.system} on {here.machine}"
        means = "Build engines on x86-64 Linux, or with tensorrt on a machine that has a GPU."
        yield Finding(Status.MISSING, flavour.value, what, means, None, _in_the_way_of(here, flavour))
        return
    good = f"Builds engines on the CPU, for {format_gpus(RTX_CAPABILITIES)}."
    yield _tensorrt(here, flavour, good, "Builds engines without a GPU, for every RTX GPU.")


def about_tensorrt(here: MachineInfo) -> Iterator[Finding]:
    """The compiler that builds for the GPU of the machine."""
    if here.driver.gpus:
        good = f"Builds engines on and for {here.driver.gpus[0]}."
        yield _tensorrt(here, Flavour.TENSORRT, good, f"{good} {_NOT_ON_AN_INDEX}")
    else:
        good = "It builds and runs engines where there is a GPU, so not here."
        yield _tensorrt(here, Flavour.TENSORRT, good, "Of no use without a GPU.")


def _tensorrt(here: MachineInfo, flavour: Flavour, good: str, absent: str) -> Finding:
    package, wanted = here.tensorrt.get(flavour), here.requirements.get(flavour.value)
    topic, blocks = flavour.value, _in_the_way_of(here, flavour)
    if package is None:
        return Finding(Status.MISSING, topic, "not installed", absent, installing(str(wanted)), blocks)
    if package.error:
        means = f"It does not import: {package.error.rstrip('.')}."
        again = installing("--force-reinstall", str(wanted))
        return Finding(Status.PROBLEM, topic, package.version or "installed", means, again, blocks)
    upgrade = installing("--upgrade", str(wanted))
    if not works(here, flavour):
        return Finding(Status.PROBLEM, topic, package.version, f"{wanted} is needed.", upgrade, blocks)
    made_with = f", made with CUDA {package.cuda}" if package.cuda else ""
    return Finding(Status.OK, topic, f"{package.version or 'installed'}{made_with}", good, upgrade)


def _in_the_way_of(here: MachineInfo, flavour: Flavour) -> tuple[Task, ...]:
    """A TensorRT that is absent or broken is in the way of what no TensorRT does here, and it would."""
    builds = not builders(here) and (flavour is Flavour.TENSORRT_RTX or runs_on_gpu(here, flavour))
    runs = not runners(here) and runs_on_gpu(here, flavour)
    return (*([Task.BUILD] if builds else []), *([Task.RUN] if runs else []))


def about_reports(here: MachineInfo) -> Iterator[Finding]:
    """What pages with plots take."""
    wanted = list(here.requirements.of("report"))
    missing = [package for package in wanted if here.packages.get(package.name) is None]
    if missing:
        means = "Reports as pages with plots take it; tables and JSON do not."
        yield Finding(Status.MISSING, "reports", _names(missing), means, _install(missing))
    elif old := [package for package in wanted if not package.is_met_by(str(here.packages[package.name]))]:
        what = ", ".join(f"{package.name} {here.packages[package.name]}" for package in old)
        yield Finding(Status.PROBLEM, "reports", what, f"{' and '.join(map(str, old))} is needed.", _install(old))
    elif wanted:
        what = ", ".join(f"{package.name} {here.packages[package.name]}" for package in wanted)
        yield Finding(Status.OK, "reports", what, "Reports can be written as pages with plots.", _install(wanted))


def about_pins(here: MachineInfo) -> Iterator[Finding]:
    """Are these the versions that the tests run with. Nothing where there is no checkout to say which those are."""
    versions = {**here.packages, "torch": here.torch.version if here.torch else None}
    pinned = {name: pin for name, pin in here.pins.items() if versions.get(name) and name not in _TEST_TOOLS}
    other = [name for name, pin in pinned.items() if release(str(versions[name])) != release(pin)]
    if other:
        listed = ", ".join(f"{name} {versions[name]} ({pinned[name]})" for name in other)
        means = f"The tests run with the versions in brackets: {listed}."
        change = installing(*(f"{name}=={pinned[name]}" for name in other))
        yield Finding(Status.OK, "pinned versions", f"{len(other)} of {len(pinned)} differ", means, change)
    elif pinned:
        means = "These are the versions that the tests run with."
        yield Finding(Status.OK, "pinned versions", f"all {len(pinned)}", means, _SETUP)

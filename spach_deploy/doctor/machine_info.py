"""All facts that the doctor knows about this machine, gathered at once.

Which builds of torch and onnxruntime are installed is learned from their files without importing them.

Importing torch takes seconds; its version.py has the same facts. The wheels onnxruntime and onnxruntime-gpu install
into one folder: files that both have are those of the wheel installed last, provider libraries of either remain, and
uninstalling one removes the shared files. `build_and_package_info.py` in that folder names the wheel that the shared
files come from (all seen with 1.31 and 1.32).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from spach_deploy.common import versions as required
from spach_deploy.common.machine import FolderCheck, Memory, find_folder, find_memory, temporary_folder
from spach_deploy.common.versions import installed
from spach_deploy.doctor.driver import LEAST_DRIVER, Driver, DriverSurroundings, Probe, ProbeResult, driver_from
from spach_deploy.options.specs import Flavour
from spach_deploy.runtime.devices import MODULE_NAMES, is_installed

LIMIT_S = 3.0
"""Seconds that a child process may take to answer; the whole doctor stays under five seconds."""

_PACKAGE = "spach_deploy.doctor"
_OUTPUT = Path("build")


@dataclasses.dataclass(frozen=True)
class TensorRTPackage:
    """An installed TensorRT. `error`: why its import fails. `cuda`: major version of CUDA that it was built with."""

    version: str
    error: str = ""
    cuda: int | None = None


@dataclasses.dataclass(frozen=True)
class Platform:
    """What holds on a system and a kind of processor. `ran`: what the tests ran there. `lacking`: packages that an
    export needs and that have no wheels for it in the public package index. `has_rtx`: tensorrt-rtx has wheels.
    """

    ran: str
    has_rtx: bool = True
    lacking: tuple[str, ...] = ()
    is_tested: bool = False


PLATFORMS: Mapping[tuple[str, str], Platform] = {
    ("Linux", "x86-64"): Platform("All tests run there.", is_tested=True),
    ("Linux", "aarch64"): Platform(
        "No export was ever run there. All that an export takes has wheels; that of tensorrt-rtx needs glibc 2.35."
    ),
    ("Windows", "x86-64"): Platform(
        "No export was ever run there, only in Wine. All that an export takes has wheels, tensorrt-rtx too."
    ),
    ("Windows", "aarch64"): Platform("No export was ever run there.", lacking=("torch", "onnxsim")),
}
"""By system and processor; docs/platforms.md has the same at length."""

_PROCESSORS = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}


@dataclasses.dataclass(frozen=True)
class MachineInfo:
    """Facts about this machine. `packages`: version of each required package, None where it is not installed."""

    python: tuple[int, int, int]
    system: str
    machine: str
    requirements: required.Requirements
    packages: Mapping[str, str | None]
    pins: Mapping[str, str]
    torch: Torch | None
    onnxruntime: InstalledOnnxRuntime | None
    tensorrt: Mapping[Flavour, TensorRTPackage]
    driver: Driver
    memory: Memory | None
    output: FolderCheck
    temporary: FolderCheck

    @property
    def platform(self) -> Platform | None:
        """What holds on its system and processor; None where no wheels are known."""
        return PLATFORMS.get((self.system, _PROCESSORS.get(self.machine.lower(), self.machine)))


def gather(limit_s: float = LIMIT_S) -> MachineInfo:
    """Gather all facts. Child processes work while this process reads files."""
    wanted = required.requirements()
    with contextlib.ExitStack() as stack:
        driver = stack.enter_context(Probe(f"{_PACKAGE}.driver_question"))
        importing = {
            flavour: stack.enter_context(Probe(f"{_PACKAGE}.tensorrt_question", module))
            for flavour, module in MODULE_NAMES.items()
            if is_installed(flavour)
        }
        return MachineInfo(
            python=sys.version_info[:3],
            system=platform.system(),
            machine=platform.machine(),
            requirements=wanted,
            packages={package.name: required.installed(package.name) for package in wanted.packages},
            pins=required.pins(),
            torch=find_torch(),
            onnxruntime=find_onnxruntime(),
            memory=find_memory(),
            output=find_folder(_OUTPUT),
            temporary=temporary_folder(),
            tensorrt={flavour: _tensorrt(flavour, asked.answer(limit_s)) for flavour, asked in importing.items()},
            driver=driver_from(driver.answer(limit_s), DriverSurroundings.here()),
        )


def _tensorrt(flavour: Flavour, answer: ProbeResult) -> TensorRTPackage:
    """A child that timed out proves no fault of the package: a cold disk is slow."""
    said = answer.content or {}
    version = said.get("version") or required.installed(flavour.value) or ""
    crashed = "" if answer.content is not None or answer.timed_out else answer.failure
    return TensorRTPackage(str(version), str(said.get("error", "")) or crashed, _cuda_of(flavour))


def _cuda_of(flavour: Flavour) -> int | None:
    """The package's major version of CUDA: tensorrt-rtx 1.7 installs tensorrt_rtx_cu13. None where upgrades left
    several.
    """
    names = {major: f"{MODULE_NAMES[flavour]}_cu{major}" for major in LEAST_DRIVER}
    found = [major for major, name in names.items() if required.installed(name) is not None]
    return found[0] if len(found) == 1 else None


def ask_tensorrt(flavour: Flavour, header: bytes, limit_s: float = LIMIT_S / 2) -> ProbeResult:
    """What this TensorRT says of a plan's first bytes."""
    with Probe(f"{_PACKAGE}.tensorrt_question", MODULE_NAMES[flavour], header.hex()) as question:
        return question.answer(limit_s)


ONNXRUNTIME_WHEELS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-qnn",
    "onnxruntime-training",
    "ort-nightly",
    "ort-nightly-gpu",
)
"""All wheels that install a package named onnxruntime."""

_PROVIDER = re.compile(r"libonnxruntime_providers_(?!shared)(\w+)\.so")


@dataclasses.dataclass(frozen=True)
class Torch:
    """The installed torch. `build`: "CPU", "CUDA 13.0", "ROCm 6.2", or "" where it is unknown."""

    version: str
    build: str


@dataclasses.dataclass(frozen=True)
class InstalledOnnxRuntime:
    """The installed onnxruntime.

    `wheels`: version by wheel. `files_of`: the wheel that the shared files come from. `broken`: the missing file, ""
    where the package is complete.
    """

    wheels: dict[str, str]
    files_of: str | None = None
    files_version: str | None = None
    providers: tuple[str, ...] = ()
    broken: str = ""


def find_torch() -> Torch | None:
    """The torch that would be imported, or None."""
    text = _read(_folder("torch"), "version.py")
    version = _assigned(text, "__version__") or installed("torch")
    return None if version is None else Torch(version, _torch_build(text, version))


def _torch_build(text: str, version: str) -> str:
    if cuda := _assigned(text, "cuda"):
        return f"CUDA {cuda}"
    if hip := _assigned(text, "hip"):
        return f"ROCm {hip}"
    return "CPU" if text or version.endswith("+cpu") else ""


def find_onnxruntime() -> InstalledOnnxRuntime | None:
    """The onnxruntime that would be imported, with all installed wheels of it, or None."""
    wheels = {name: version for name in ONNXRUNTIME_WHEELS if (version := installed(name)) is not None}
    folder = _folder("onnxruntime")
    if folder is None:
        return InstalledOnnxRuntime(wheels, broken="the package's folder") if wheels else None
    info = _read(folder / "capi", "build_and_package_info.py")
    owner = _assigned(info, "package_name")
    providers = ("cpu",) if owner == ONNXRUNTIME_WHEELS[0] else _providers(folder / "capi")
    return InstalledOnnxRuntime(wheels, owner, _assigned(info, "__version__"), providers, _broken(folder))


def _broken(folder: Path) -> str:
    if not (folder / "__init__.py").is_file():
        return "__init__.py"
    has_library = any((folder / "capi").glob("onnxruntime_pybind11_state*"))
    return "" if has_library else "its compiled library"


def _providers(capi: Path) -> tuple[str, ...]:
    names = (match[1] for file in sorted(capi.glob("*.so")) if (match := _PROVIDER.fullmatch(file.name)))
    return ("cpu", *names)


def _folder(package: str) -> Path | None:
    """The folder that a package would be imported from; runs none of its code."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(locations[0]) if locations else None


def _read(folder: Path | None, name: str) -> str:
    try:
        return "" if folder is None else (folder / name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _assigned(text: str, name: str) -> str | None:
    """The string that a line of Python assigns to `name`; None for None, or without such a line."""
    match = re.search(rf"""^{name}\s*(?::[^=\n]*)?=\s*['"]([^'"\n]*)['"]""", text, re.MULTILINE)
    return match[1] if match else None

"""Which builds of torch and onnxruntime are installed, learned from their files without importing them.

Importing torch takes seconds; its version.py has the same facts. The wheels onnxruntime and onnxruntime-gpu install
into one folder: files that both have are those of the wheel installed last, provider libraries of either remain, and
uninstalling one removes the shared files. `build_and_package_info.py` in that folder names the wheel that the shared
files come from (all seen with 1.31 and 1.32).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

from spach_deploy.common.versions import installed

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

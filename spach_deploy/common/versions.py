"""Package versions: what spach-deploy requires, what its tests pin, and what is installed here.

Requirements are read from setup.cfg of a checkout, else from the metadata of the installed package; pins are read from
constraints.txt. All requirements are minimums (`torch >= 2.9`), so it is enough to compare release numbers, without
the package `packaging`. Each minimum is a version that is tested (constraints-lowest.txt).
"""

from __future__ import annotations

import configparser
import dataclasses
import functools
import importlib.metadata
import platform
import re
import sys
from pathlib import Path

from spach_deploy._version import __version__
from spach_deploy.common.errors import MissingPackageError, OldPackageError

ROUNDS_FP16 = "1.30"
"""First version of ONNX Runtime that rounds where it quantizes FP16 on a CPU; older ones truncate."""

_ROOT = Path(__file__).parents[2]
_LINE = re.compile(r"\s*([\w.-]+)(?:\[[\w,.-]+\])?\s*(?:>=\s*([\d.]+))?\s*\)?\s*(?:;(.*))?$")
_PYTHON_BELOW = re.compile(r"""python_version\s*<\s*['"]([\d.]+)['"]""")
_EXTRA = re.compile(r"""extra\s*==\s*['"](\w+)['"]""")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A package and its minimum version. `extra`: the extra that requires it, "" for the core."""

    name: str
    minimum: str | None
    extra: str = ""
    python_below: str | None = None

    def __str__(self) -> str:
        return f"{self.name}>={self.minimum}" if self.minimum else self.name

    def holds_for(self, python: tuple[int, ...]) -> bool:
        """Whether this version of Python, such as (3, 10), needs the package."""
        return self.python_below is None or python < release(self.python_below)

    def is_met_by(self, version: str) -> bool:
        """Whether `version` is new enough."""
        return self.minimum is None or not is_older(version, self.minimum)


@dataclasses.dataclass(frozen=True)
class Requirements:
    """All requirements, and where they were read from, in words."""

    python: str
    packages: tuple[Requirement, ...]
    source: str

    def of(self, extra: str = "") -> tuple[Requirement, ...]:
        """The requirements of an extra, or of the core for ""."""
        return tuple(package for package in self.packages if package.extra == extra)

    def get(self, name: str) -> Requirement:
        """The requirement of that name in the core or any extra; one without a minimum where there is none."""
        return next((package for package in self.packages if package.name == name), Requirement(name, None))


@functools.cache
def requirements(root: Path = _ROOT) -> Requirements:
    """The requirements of the checkout at `root`, else of the installed package; empty where neither can be read."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    if config.get("metadata", "name", fallback="") == "spach-deploy":
        return _from_setup_cfg(config)
    try:
        metadata = importlib.metadata.metadata("spach-deploy")
    except importlib.metadata.PackageNotFoundError:
        return Requirements("", (), "nowhere")
    lines = metadata.get_all("Requires-Dist") or []
    packages = tuple(package for line in lines if (package := parse(line)) is not None)
    python = (metadata.get_all("Requires-Python") or [""])[0]
    return Requirements(str(python), packages, "the package's metadata")


def _from_setup_cfg(config: configparser.ConfigParser) -> Requirements:
    core = config["options"]["install_requires"]
    extras = {"": core, **dict(config["options.extras_require"])}
    parsed = (parse(line, extra) for extra, text in extras.items() for line in text.splitlines() if line.strip())
    packages = tuple(package for package in parsed if package is not None and package.name != "spach-deploy")
    return Requirements(config["options"]["python_requires"], packages, "setup.cfg")


def parse(line: str, extra: str = "") -> Requirement | None:
    """The requirement in a line such as `torch >= 2.9` or `tomli>=2; python_version < "3.11"`; None for other forms."""
    match = _LINE.match(line)
    if match is None:
        return None
    name, minimum, marker = match[1], match[2], match[3] or ""
    below, of_extra = _PYTHON_BELOW.search(marker), _EXTRA.search(marker)
    return Requirement(name, minimum, of_extra[1] if of_extra else extra, below[1] if below else None)


def pins(root: Path = _ROOT) -> dict[str, str]:
    """The versions that the tests run with, by package name; empty where there is no checkout."""
    file = root / "constraints.txt"
    if not file.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line.count("==") == 1)
    return {name.strip(): version.strip() for name, version in pairs}


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"\D*(\d{1,9}(?:\.\d{1,9})*)", version)
    return tuple(int(number) for number in match[1].split(".")) if match else ()


def is_older(version: str, minimum: str) -> bool:
    """Whether `version` is a release before `minimum`."""
    ours, theirs = release(version), release(minimum)
    length = max(len(ours), len(theirs))
    return ours + (0,) * (length - len(ours)) < theirs + (0,) * (length - len(theirs))


def installed(name: str) -> str | None:
    """Version of an installed package, without importing it; None when it is absent or its metadata is damaged."""
    try:
        version: str | None = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return version


def refuse_unfit_packages() -> None:
    """MissingPackageError or OldPackageError for the first unfit package that every export and validation needs."""
    required, python = requirements(), sys.version_info[:2]
    for package in (*required.of(), required.get("onnxruntime")):
        version = installed(package.name)
        if version is not None and not package.is_met_by(version):
            raise OldPackageError(package.name, version, str(package))
        if version is None and not package.extra and package.holds_for(python):
            raise MissingPackageError(package.name, "spach-deploy", f"pip install '{package}'")


def refuse_old(*names: str) -> None:
    """OldPackageError for the first of these packages that is installed in a version older than its minimum."""
    if error := old_package(*names):
        raise error


def old_package(*names: str) -> OldPackageError | None:
    """The error for the first of these packages that is installed and too old; None where none is."""
    required = requirements()
    for package in map(required.get, names):
        version = installed(package.name)
        if version is not None and not package.is_met_by(version):
            return OldPackageError(package.name, version, str(package))
    return None


_PACKAGES = (
    *("torch", "einops", "numpy", "onnx", "onnxscript", "onnxsim", "onnxruntime", "polygraphy", "pillow"),
    *("tensorrt", "tensorrt-rtx", "safetensors"),
)


def tool_versions() -> dict[str, str]:
    """Versions of spach-deploy, Python and every package that affects an export or a validation, by name.

    Packages that are not installed are left out.
    """
    return {"spach-deploy": __version__, "python": platform.python_version(), **_installed()}


def _installed() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions

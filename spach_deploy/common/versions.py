"""What spach-deploy requires of Python and of packages, and the versions that its tests pin.

Read where they stand: setup.cfg and constraints.txt of a checkout, else the metadata of the installed package. Both
hold nothing but minimums (`torch >= 2.9`), so comparing release numbers is enough, and no package is needed to do it.
Each minimum is a version that was run (constraints-lowest.txt).

Versions of everything that has a hand in an export or a validation.
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

_ROOT = Path(__file__).parents[2]
_LINE = re.compile(r"\s*([\w.-]+)(?:\[[\w,.-]+\])?\s*(?:>=\s*([\d.]+))?\s*\)?\s*(?:;(.*))?$")
_PYTHON_BELOW = re.compile(r"""python_version\s*<\s*['"]([\d.]+)['"]""")
_EXTRA = re.compile(r"""extra\s*==\s*['"](\w+)['"]""")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A package and the least version that will do; `extra` is "" for the core."""

    name: str
    minimum: str | None
    extra: str = ""
    python_below: str | None = None

    def __str__(self) -> str:
        return f"{self.name}>={self.minimum}" if self.minimum else self.name

    def holds_for(self, python: tuple[int, ...]) -> bool:
        """Whether that Python needs it."""
        return self.python_below is None or python < release(self.python_below)

    def is_met_by(self, version: str) -> bool:
        """Whether `version` is new enough."""
        return self.minimum is None or not is_older(version, self.minimum)


@dataclasses.dataclass(frozen=True)
class Requirements:
    """Everything that is required, and where that was read."""

    python: str
    packages: tuple[Requirement, ...]
    source: str

    def of(self, extra: str = "") -> tuple[Requirement, ...]:
        """Requirements of an extra; of the core without one."""
        return tuple(package for package in self.packages if package.extra == extra)

    def get(self, name: str) -> Requirement:
        """The requirement of that name, in the core or any extra; one without a minimum where there is none."""
        return next((package for package in self.packages if package.name == name), Requirement(name, None))


@functools.cache
def requirements(root: Path = _ROOT) -> Requirements:
    """Of the checkout at `root`, else of the installed package; empty where neither can be read."""
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
    found = (parse(line, extra) for extra, text in extras.items() for line in text.splitlines() if line.strip())
    packages = tuple(package for package in found if package is not None and package.name != "spach-deploy")
    return Requirements(config["options"]["python_requires"], packages, "setup.cfg")


def parse(line: str, extra: str = "") -> Requirement | None:
    """A line such as `torch >= 2.9` or `tomli>=2; python_version < "3.11"`; None for what is written otherwise."""
    match = _LINE.match(line)
    if match is None:
        return None
    name, minimum, marker = match[1], match[2], match[3] or ""
    below, of_extra = _PYTHON_BELOW.search(marker), _EXTRA.search(marker)
    return Requirement(name, minimum, of_extra[1] if of_extra else extra, below[1] if below else None)


def pins(root: Path = _ROOT) -> dict[str, str]:
    """Versions that the tests run with, by package; empty where there is no checkout."""
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
    """Raise MissingPackageError or OldPackageError for the first package that every export and validation takes."""
    wanted, python = requirements(), sys.version_info[:2]
    for package in (*wanted.of(), wanted.get("onnxruntime")):
        version = installed(package.name)
        if version is not None and not package.is_met_by(version):
            raise OldPackageError(package.name, version, str(package))
        if version is None and not package.extra and package.holds_for(python):
            raise MissingPackageError(package.name, "spach-deploy", f"pip install '{package}'")


def refuse_old(*names: str) -> None:
    """Raise OldPackageError for the first of these packages that is installed and older than any that was run."""
    if error := old_package(*names):
        raise error


def old_package(*names: str) -> OldPackageError | None:
    """The error for the first of these packages that is installed and too old; None where none is."""
    wanted = requirements()
    for package in map(wanted.get, names):
        version = installed(package.name)
        if version is not None and not package.is_met_by(version):
            return OldPackageError(package.name, version, str(package))
    return None


_PACKAGES = (
    *("torch", "einops", "numpy", "onnx", "onnxscript", "onnxsim", "onnxruntime", "polygraphy", "pillow"),
    *("tensorrt", "tensorrt-rtx", "safetensors"),
)


def tool_versions() -> dict[str, str]:
    """By package name; what is not installed is left out."""
    return {"spach-deploy": __version__, "python": platform.python_version(), **_installed()}


def _installed() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions

"""What is installed, learned from files: on folders of packages made for it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from spach_deploy.common.versions import Requirement, installed, is_older, parse, pins, release, requirements
from spach_deploy.doctor import commands
from spach_deploy.doctor.machine_info import InstalledOnnxRuntime, Torch, find_onnxruntime, find_torch


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all there is to import from."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    for loaded in ("torch", "onnxruntime"):
        monkeypatch.delitem(sys.modules, loaded, raising=False)
    importlib.invalidate_caches()
    return folder


def wheel(site: Path, name: str, version: str) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def torch(site: Path, version: str, lines: str) -> None:
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text("raise AssertionError('torch was imported')")
    (site / "torch" / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\n{lines}\n")


def onnxruntime(site: Path, *files: str, package: str = "onnxruntime", version: str = "1.32.0") -> None:
    capi = site / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    (site / "onnxruntime" / "__init__.py").write_text("raise AssertionError('onnxruntime was imported')")
    for name in ("onnxruntime_pybind11_state.so", "libonnxruntime_providers_shared.so", *files):
        (capi / name).touch()
    info = f"package_name = '{package}'\n__version__ = '{version}'\ncuda_version = \"12.8\"\n"
    (capi / "build_and_package_info.py").write_text(info)


# torch


@pytest.mark.parametrize(
    ("version", "lines", "build"),
    [
        ("2.13.0+cpu", "cuda: Optional[str] = None\nhip: Optional[str] = None", "CPU"),
        ("2.13.0+cu130", "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None", "CUDA 13.0"),
        ("2.13.0", 'cuda = "12.8"', "CUDA 12.8"),
        ("2.13.0+rocm6.4", "cuda: Optional[str] = None\nhip: Optional[str] = '6.4.2'", "ROCm 6.4.2"),
    ],
)
def test_torch_builds(site: Path, version: str, lines: str, build: str) -> None:
    torch(site, version, lines)
    assert find_torch() == Torch(version, build)


def test_torch_is_not_there(site: Path) -> None:
    assert find_torch() is None


def test_torch_without_its_version_file(site: Path) -> None:
    wheel(site, "torch", "2.9.0")
    assert find_torch() == Torch("2.9.0", "")


# onnxruntime


def test_onnxruntime(site: Path) -> None:
    wheel(site, "onnxruntime", "1.32.0")
    onnxruntime(site)
    assert find_onnxruntime() == InstalledOnnxRuntime({"onnxruntime": "1.32.0"}, "onnxruntime", "1.32.0", ("cpu",))


def test_the_wheel_whose_files_are_there_wins(site: Path) -> None:
    wheel(site, "onnxruntime", "1.32.0")
    wheel(site, "onnxruntime-gpu", "1.22.0")
    providers = ("libonnxruntime_providers_cuda.so", "libonnxruntime_providers_tensorrt.so")
    onnxruntime(site, *providers, package="onnxruntime-gpu", version="1.22.0")
    found = find_onnxruntime()
    assert found is not None
    assert set(found.wheels) == {"onnxruntime", "onnxruntime-gpu"}
    assert (found.files_of, found.files_version) == ("onnxruntime-gpu", "1.22.0")
    assert found.providers == ("cpu", "cuda", "tensorrt")
    assert not found.broken


def test_libraries_that_the_other_wheel_left_are_no_providers(site: Path) -> None:
    """onnxruntime installed over onnxruntime-gpu: CUDA's library is still there, and nothing loads it."""
    wheel(site, "onnxruntime", "1.32.0")
    wheel(site, "onnxruntime-gpu", "1.31.1")
    onnxruntime(site, "libonnxruntime_providers_cuda.so")
    found = find_onnxruntime()
    assert found is not None
    assert (found.files_of, found.providers) == ("onnxruntime", ("cpu",))


@pytest.mark.parametrize(
    ("gone", "broken"), [("capi/onnxruntime_pybind11_state.so", "its compiled library"), ("__init__.py", "__init__.py")]
)
def test_files_that_an_uninstall_took_along(site: Path, gone: str, broken: str) -> None:
    wheel(site, "onnxruntime-gpu", "1.22.0")
    onnxruntime(site)
    (site / "onnxruntime" / gone).unlink()
    found = find_onnxruntime()
    assert found is not None
    assert found.broken == broken


def test_a_wheel_whose_folder_is_gone(site: Path) -> None:
    assert find_onnxruntime() is None
    wheel(site, "onnxruntime", "1.32.0")
    found = find_onnxruntime()
    assert found is not None
    assert found.broken


# Requirements


def test_requirements_of_this_checkout_are_all_understood() -> None:
    """setup.cfg must hold nothing but minimums: another kind of requirement would be misread."""
    root = Path(__file__).parents[2]
    found = requirements(root)
    assert found.source == "setup.cfg"
    assert release(found.python) >= (3, 10)
    lines = [
        line for line in (root / "setup.cfg").read_text().splitlines() if ">=" in line and "python_requires" not in line
    ]
    assert len(found.packages) == len(lines)
    assert all(package.minimum for package in found.packages)
    assert {"torch", "onnx", "click"} <= {package.name for package in found.of()}
    assert found.get("tensorrt-rtx").extra == "cpu"


def test_requirements_of_an_installed_package(site: Path) -> None:
    info = site / "spach_deploy-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: spach-deploy\nVersion: 0.1.0\nRequires-Python: >=3.10\n"
        'Requires-Dist: torch>=2.9\nRequires-Dist: tomli>=2; python_version < "3.11"\n'
        'Requires-Dist: tensorrt-rtx>=1.1; extra == "cpu"\n'
    )
    found = requirements(site)
    assert found.source == "the package's metadata"
    assert found.python == ">=3.10"
    assert found.packages == (
        Requirement("torch", "2.9"),
        Requirement("tomli", "2", python_below="3.11"),
        Requirement("tensorrt-rtx", "1.1", "cpu"),
    )


def test_requirements_from_nowhere(site: Path) -> None:
    assert requirements(site).packages == ()
    (site / "setup.cfg").write_text("[metadata]\nname = another\n")
    assert requirements(site).packages == ()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("torch >= 2.9", Requirement("torch", "2.9")),
        ("click", Requirement("click", None)),
        ("spach-deploy[cpu,test]", Requirement("spach-deploy", None)),
        ("torch ~= 2.9", None),
    ],
)
def test_lines(line: str, expected: Requirement | None) -> None:
    assert parse(line) == expected


@pytest.mark.parametrize(
    ("version", "minimum", "older"),
    [
        ("2.13.0+cpu", "2.9", False),
        ("2.9", "2.9.0", False),
        ("2.9.0", "2.9.1", True),
        ("0.4.36", "0.4.4", False),
        ("1.7.1.116", "1.7.1.120", True),
        ("13", "13.1", True),
    ],
)
def test_versions_are_compared_by_number(version: str, minimum: str, older: bool) -> None:
    assert is_older(version, minimum) is older


def test_pins_of_this_checkout() -> None:
    assert {"torch", "onnx", "tensorrt-rtx"} <= set(pins())
    assert pins(Path("/nowhere")) == {}


def test_installed_versions() -> None:
    assert installed("pytest") == pytest.__version__
    assert installed("no-such-package") is None


# Commands


def test_commands_are_for_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert commands.installing("torch>=2.9") == "python -m pip install 'torch>=2.9'"
    monkeypatch.setenv("PATH", "/nowhere")
    assert commands.installing("click") == f"{sys.executable} -m pip install click"


def test_commands_of_an_environment_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setattr(commands, "_has_pip", lambda: False)
    assert commands.installing("click") == "uv pip install --python python click"
    both = commands.reinstalling(["onnxruntime", "onnxruntime-gpu"], "onnxruntime")
    assert both.startswith("uv pip uninstall --python python onnxruntime onnxruntime-gpu && uv pip install")

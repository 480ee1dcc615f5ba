"""Python for Windows, in Wine: what the type checker and fakes cannot tell. docs/platforms.md says what this shows."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from spach_deploy import Bundle
from spach_deploy.bundle.store import PLAN
from spach_deploy.cli.validate import main as validate_command
from tests.commands import ROOT
from tests.test_other_systems import modules

pytestmark = pytest.mark.wine

WINDOWS_10 = r"""
import winreg

with winreg.CreateKey(winreg.HKEY_CURRENT_USER, r"Software\Wine") as key:
    winreg.SetValueEx(key, "Version", 0, winreg.REG_SZ, "win10")
"""
_DEBIAN = Path("/usr/lib/wine/wine64")


def _places() -> tuple[str, Path] | None:
    """Wine and Python for Windows; None where either is not here."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spach-deploy" / "windows-python"
    python = Path(os.environ.get("SPACH_WINDOWS_PYTHON") or cache) / "python.exe"
    wine = shutil.which("wine64") or (str(_DEBIAN) if _DEBIAN.exists() else None)
    return (wine, python) if wine and python.exists() else None


def windows(*arguments: object, prefix: Path, timeout_s: float = 1500) -> subprocess.CompletedProcess[str]:
    """Run Python for Windows with these arguments, and this package's sources; `prefix` is Wine's directory."""
    places = _places()
    if places is None:
        missing = "Python for Windows or Wine is not here (apt-get install wine64, scripts/windows_python)."
        assert not os.environ.get("SPACH_REQUIRE_WINE"), missing
        pytest.skip(missing)
    wine, python = places
    environment = {
        **os.environ,
        "WINEPREFIX": str(prefix),
        "WINEDEBUG": "-all",
        "PYTHONPATH": f"Z:{ROOT}",
        "KMP_AFFINITY": "disabled",  # Wine lacks a function by which Intel's OpenMP asks for it
        "SPACH_CACHE": "none",
    }
    command = [wine, str(python), *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
    )


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wine's directory, of Windows 10."""
    folder = tmp_path_factory.mktemp("wine") / "prefix"
    windows("-c", "", prefix=folder)
    assert windows("-c", WINDOWS_10, prefix=folder).returncode == 0
    return folder


def test_locks_renames_processes_and_memory(prefix: Path) -> None:
    """The tests of the one module that both systems have in two forms, and of what is written by it."""
    files = ("tests/common/test_operating_system.py",)
    done = windows("-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", *files, prefix=prefix)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_every_module_imports(prefix: Path) -> None:
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print(len(sys.argv) - 1)"
    names = modules()
    done = windows("-c", code, *names, prefix=prefix)
    assert done.stdout.split() == [str(len(names))], done.stderr[-3000:]


def test_an_export_with_its_engine_is_valid_here(prefix: Path, tmp_path: Path) -> None:
    """The bundle that Windows writes, engine included, is a bundle that Linux opens and validates."""
    target = tmp_path / "bundle"
    options = ("--model", "ms_trans_xxs", "--fp16", "--output", f"Z:{target}")
    done = windows("-m", "spach_deploy.cli.export", *options, prefix=prefix)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    bundle = Bundle.open(target)
    assert bundle.plan == target / PLAN
    for file in target.glob("*.json"):
        assert b"\r" not in file.read_bytes()
    result = CliRunner().invoke(validate_command, [str(target), "--accept", "graph"])
    assert result.exit_code == 0, result.output

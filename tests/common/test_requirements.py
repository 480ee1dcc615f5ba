"""Versions of packages: the lowest that are declared were run, and an older one is refused by name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from spach_deploy.common import versions as required
from spach_deploy.common.errors import OldPackageError
from spach_deploy.common.versions import is_older, requirements
from spach_deploy.doctor.finding import Status
from spach_deploy.doctor.machine import about_reports
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.options.specs import Flavour
from spach_deploy.runtime.devices import is_installed
from tests.commands import ROOT, export, refusal
from tests.doctor.machines import cpu_machine

LOWEST = ROOT / "constraints-lowest.txt"


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def declared(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """These packages are installed in these versions, or not at all."""
    real = required.installed
    monkeypatch.setattr(required, "installed", lambda name: versions[name] if name in versions else real(name))


def test_every_lowest_version_is_one_that_was_run() -> None:
    run = dict(line.split("==") for line in lines(LOWEST) if "==" in line)
    not_run = set(re.findall(r"\b([a-z][\w-]*) [\d.]+", next(line for line in lines(LOWEST) if "Not run:" in line)))
    bounds = {package.name: str(package.minimum) for package in requirements(ROOT).packages}
    assert set(run) | not_run == set(bounds)
    unequal = {name for name in run if is_older(run[name], bounds[name]) or is_older(bounds[name], run[name])}
    assert unequal == set()


def test_what_ci_installs_is_admitted() -> None:
    pins = required.pins(ROOT)
    assert [p.name for p in requirements(ROOT).packages if p.name in pins and not p.is_met_by(pins[p.name])] == []


@pytest.mark.parametrize(
    ("name", "version"), [("onnxscript", "0.5.7"), ("torch", "2.8.0+cpu"), ("onnxruntime", "1.17.3")]
)
def test_a_package_that_is_too_old_is_named_before_any_work(
    name: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared(monkeypatch, **{name: version})
    sentence = refusal(export("--model", "ms_conv_xxs", "--engine", "none", "-o", "nowhere"), 3)
    wanted = requirements().get(name)
    assert f"{name} {version} is too old: spach-deploy needs {wanted}." in sentence
    assert sentence.endswith(f"Install it: pip install '{wanted}'")


def test_a_required_package_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    declared(monkeypatch, onnxsim=None)
    assert "needs onnxsim, which is not installed here" in refusal(export("--list"), 3)


@pytest.mark.skipif(not is_installed(Flavour.TENSORRT_RTX), reason="tensorrt-rtx is not installed")
def test_a_compiler_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    declared(monkeypatch, **{"tensorrt-rtx": "1.4.0.76"})
    assert "tensorrt-rtx 1.4.0.76 is too old" in str(TensorRTForRTX().why_not_here())


@pytest.mark.parametrize(
    ("module", "function", "package"),
    [
        ("spach_deploy.report.plots", "check_matplotlib", "matplotlib"),
        ("spach_deploy.distributed.cluster", "import_ray", "ray"),
    ],
)
def test_an_optional_package_is_looked_at_where_it_is_used(
    module: str, function: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    declared(monkeypatch, **{package: "0.1"})
    with pytest.raises(OldPackageError, match=f"{package} 0.1 is too old"):
        getattr(importlib.import_module(module), function)()


def test_the_doctor_tells_of_old_packages_for_reports() -> None:
    here = cpu_machine()
    (found,) = about_reports(cpu_machine(packages={**here.packages, "matplotlib": "3.8.4"}))
    assert found.status is Status.PROBLEM
    assert found.what == "matplotlib 3.8.4"
    assert str(found.command).endswith("'matplotlib>=3.9'")

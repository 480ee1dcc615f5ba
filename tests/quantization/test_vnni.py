"""A bundle whose eight bits are for CPUs with VNNI, on a CPU that has none: every command says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spach_deploy.benchmark import runners as contestants
from spach_deploy.benchmark.runners import EAGER, ONNX_RUNTIME, OPENVINO, RunnerSetup, why_not
from spach_deploy.bundle.store import MANIFEST, Bundle
from spach_deploy.cli.validate import main as validate_command
from spach_deploy.doctor import target as bundle_findings
from spach_deploy.doctor.finding import Status, Task
from spach_deploy.doctor.target import examine_target
from spach_deploy.options.specs import Precision
from spach_deploy.validation import target
from tests.commands import refusal
from tests.doctor.machines import cpu_machine
from tests.quantization import small_quantized


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (bundle_findings, contestants, target):
        monkeypatch.setattr(module, "has_vnni", lambda: False)
    place = tmp_path / "b"
    shutil.copytree(small_quantized.bundle(Precision.INT8), place)
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["quantization"]["vnni"] = True
    (place / MANIFEST).write_text(json.dumps(manifest))
    return place


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(validate_command, [str(argument) for argument in arguments])


def test_it_is_not_validated_where_its_sums_would_overflow(bundle: Path) -> None:
    sentence = refusal(validate(bundle), 3)
    assert "INT8 graph is for CPUs with VNNI, and this one has none" in sentence
    assert "Validate it where it will run, or export it without --vnni." in sentence


def test_it_is_not_measured_either(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    for name in (ONNX_RUNTIME, OPENVINO):
        assert why_not(name, RunnerSetup(bundle), opened) == "its INT8 is for CPUs with VNNI, and this one has none"
    assert why_not(EAGER, RunnerSetup(bundle), opened) == ""


def test_the_doctor_knows(bundle: Path) -> None:
    found = next(finding for finding in examine_target(bundle, cpu_machine()).findings if finding.topic == "model.onnx")
    assert found.status is Status.PROBLEM
    assert Task.VERIFY in found.blocks
    assert "VNNI" in found.what


def test_where_there_is_vnni_nothing_is_said(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bundle_findings, contestants, target):
        monkeypatch.setattr(module, "has_vnni", lambda: True)
    assert validate(bundle, "--accept", "graph").exit_code == 0
    assert why_not(ONNX_RUNTIME, RunnerSetup(bundle), Bundle.open(bundle)) == ""

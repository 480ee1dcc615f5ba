"""spach-validate A B: two bundles against PyTorch and against each other, and the page of both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, GRAPH
from spach_deploy.cli.validate import main
from spach_deploy.options.specs import Precision
from tests import small_bundles
from tests.validation import faults

pytestmark = pytest.mark.usefixtures("small_model_registered")


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def report_of(*arguments: object) -> dict[str, object]:
    result = validate(*arguments, "--json")
    assert result.stdout, result.output
    content: dict[str, object] = json.loads(result.stdout)
    return content


@pytest.fixture(scope="module")
def fp16() -> Path:
    return small_bundles.bundle(Precision.FP16)


@pytest.fixture(scope="module")
def fp32() -> Path:
    return small_bundles.bundle(Precision.FP32)


def test_two_precisions_of_one_model(fp32: Path, fp16: Path) -> None:
    result = validate(fp32, fp16, "--accept", "graph")
    assert result.exit_code == 0, result.output
    assert "BOTH AGREE with PyTorch in FP32." in result.stdout
    assert "precision *" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    report = report_of(fp32, fp16, "--accept", "graph")
    direct, allowed = report["direct"], report["allowed"]
    assert isinstance(direct, dict)
    assert isinstance(allowed, float)
    assert 0 < direct["rel_l2_worst"] < allowed
    assert {fact["name"] for fact in report["facts"] if fact["first"] != fact["second"]} >= {"precision"}  # type: ignore[attr-defined]
    assert report["layers"]


def test_without_a_gpu_and_without_accept_it_is_3(fp32: Path, fp16: Path) -> None:
    assert validate(fp32, fp16).exit_code == 3


def test_one_that_is_wrong_is_named_and_ends_with_1(fp32: Path, fp16: Path, tmp_path: Path) -> None:
    spoiled = small_bundles.copy(fp16, tmp_path / "spoiled")
    graph = small_bundles.load_graph(spoiled)
    faults.perturb(graph, "layer2.2.channel_func.fc1.weight")
    small_bundles.save_graph(graph, spoiled, GRAPH)
    result = validate(fp32, spoiled, "--accept", "graph")
    assert result.exit_code == 1
    assert "DO NOT BOTH AGREE" in result.stdout
    findings = report_of(fp32, spoiled)["findings"]
    assert isinstance(findings, list)
    assert all(str(spoiled) in finding or "each other" in finding for finding in findings)
    assert any("each other" in finding for finding in findings)


def test_other_golden_images_are_not_compared_with_each_other(fp32: Path, fp16: Path, tmp_path: Path) -> None:
    other = small_bundles.copy(fp16, tmp_path / "other")
    golden = Golden.load(other / GOLDEN)
    Golden(golden.input, golden.outputs, tuple(f"other {name}" for name in golden.names)).save(other / GOLDEN)
    seal(other)
    report = report_of(fp32, other)
    assert report["direct"] is None
    assert any("give --images" in note for note in report["notes"])  # type: ignore[attr-defined]


def test_other_weights_are_said_and_not_held_to_each_other(fp32: Path, fp16: Path, tmp_path: Path) -> None:
    other = small_bundles.copy(fp16, tmp_path / "other")
    manifest = small_bundles.read_manifest(other)
    manifest["model"]["weights_sha256"] = "0" * 64
    small_bundles.write_manifest(other, manifest)
    report = report_of(fp32, other)
    assert report["allowed"] is None
    assert report["direct"] is not None
    assert any("weights differ" in note for note in report["notes"])  # type: ignore[attr-defined]


def seal(bundle: Path) -> None:
    manifest = small_bundles.read_manifest(bundle)
    content = (bundle / GOLDEN).read_bytes()
    manifest["files"][GOLDEN] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    small_bundles.write_manifest(bundle, manifest)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [(("--bisect",), "--bisect is for one target"), (("--open",), "none would be written")],
)
def test_options_of_one_target_are_refused(fp32: Path, fp16: Path, more: tuple[str, ...], sentence: str) -> None:
    result = validate(fp32, fp16, *more)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_other_classes_cannot_be_compared(fp32: Path, fp16: Path, tmp_path: Path) -> None:
    other = small_bundles.copy(fp16, tmp_path / "other")
    manifest = small_bundles.read_manifest(other)
    manifest["model"]["num_classes"] = 7
    small_bundles.write_manifest(other, manifest)
    result = validate(fp32, other)
    assert result.exit_code == 2
    assert "classes" in result.stderr


def test_a_file_is_no_second_bundle(fp32: Path, fp16: Path) -> None:
    result = validate(fp32, fp16 / GRAPH)
    assert result.exit_code == 2
    assert "compared as a whole" in result.stderr


def test_the_page_shows_both(fp32: Path, fp16: Path, tmp_path: Path) -> None:
    result = validate(fp32, fp16, "--accept", "graph", "--report", tmp_path / "two.json")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "two.html").read_text()
    assert "Both agree with PyTorch in FP32" in page
    assert page.count("data:image/jpeg") >= 1
    assert "<script" not in page
    assert json.loads((tmp_path / "two.json").read_text())["kind"] == "side by side"


def test_goldens_of_pixels_and_of_floats_are_the_same_pictures(fp16: Path) -> None:
    from spach_deploy.bundle.store import Bundle
    from spach_deploy.validation.side_by_side import _has_same_images

    bundle = Bundle.open(fp16, verify=False)
    assert _has_same_images(bundle, bundle)
    assert np.isfinite(Golden.load(fp16 / GOLDEN).outputs["logits"]).all()

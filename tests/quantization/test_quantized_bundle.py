"""Quantized bundles: what they say of themselves, and spach-validate on images of the user's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from spach_deploy.bundle.store import GRAPH, QUANTIZATION
from spach_deploy.cli.validate import main
from spach_deploy.data.images import probe_source
from spach_deploy.data.preprocess import pixels
from spach_deploy.options.specs import Precision, Preprocessing, QuantizationSpec
from spach_deploy.pipeline.export import export
from spach_deploy.quantization.plan import read_plan
from spach_deploy.runtime import onnxruntime_runner
from tests import small_bundles, static_models
from tests.protos import attributes, audit
from tests.quantization import faults, small_quantized
from tests.quantization.small_quantized import ATTENTION, calibration_images, pictures
from tests.quantization.test_faults import seal

pytestmark = pytest.mark.usefixtures("small_model_registered")

both = pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8], ids=["int8", "fp8"])


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def report(*arguments: object) -> dict[str, Any]:
    result = validate(*arguments, "--json")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def manifest(precision: Precision) -> dict[str, Any]:
    return small_bundles.read_manifest(small_quantized.bundle(precision))


# What the manifest says


@both
def test_the_manifest_says_how_it_was_quantized(precision: Precision) -> None:
    section, model = manifest(precision)["quantization"], manifest(precision)["model"]
    assert section["format"] == precision.value
    assert section["rest"] == "fp16"
    assert section["quantized_from"] == ("fp32" if precision is Precision.INT8 else "fp16")
    assert section["scales"] == QUANTIZATION
    assert section["per_tensor_layers"] == 0
    assert section["sensitivity"] is None
    assert 0.8 < section["macs_share"] < 0.9
    calibration = section["calibration"]
    assert calibration["images"] == 16
    assert len(calibration["images_sha256"]) == 64
    assert calibration["method"] == "max"
    assert calibration["weights_sha256"] == model["weights_sha256"]
    assert len(calibration["survey"]["channel_mean"]) == 3
    quantize = [ATTENTION] if precision is Precision.INT8 else []
    assert section["rewrites"] == {"disabled": [], "quantize": quantize}


@both
def test_every_layer_is_in_the_record_or_kept_with_a_reason(precision: Precision) -> None:
    section = manifest(precision)["quantization"]
    plan = read_plan(small_quantized.bundle(precision) / QUANTIZATION)
    assert section["layers"] == len(plan.sites) == (27 if precision is Precision.INT8 else 26)
    assert section["kept_float"] == [kept.to_dict() for kept in plan.kept]
    assert all(kept["reason"].startswith("rule: ") for kept in section["kept_float"])
    assert len(plan.sites) + len(plan.kept) == 43
    assert section["macs_share"] == plan.macs_share


@both
def test_equalization_is_told_pair_by_pair(precision: Precision) -> None:
    pairs = manifest(precision)["quantization"]["equalization"]
    plan = read_plan(small_quantized.bundle(precision) / QUANTIZATION)
    assert [pair["name"] for pair in pairs] == [pair.name for pair in plan.equalized]
    for pair in pairs:
        assert pair["error_after"] <= pair["error_before"]
        assert "factors" not in pair  # these are in the record


@both
def test_tolerances_say_that_they_come_from_eight_bits(precision: Precision) -> None:
    for entry in manifest(precision)["validation"]["tolerances"].values():
        assert entry["derivation"]["arithmetic"] == "eight bits and fp16"
        assert "what PyTorch itself loses in eight bits and fp16 on 8 images" in entry["derivation"]["sentence"]
        assert entry["derivation"]["loss"]["rel_l2"] > 0.01


@both
def test_the_bundles_files_are_listed_and_the_graph_is_the_records(precision: Precision) -> None:
    bundle = small_quantized.bundle(precision)
    assert {GRAPH, QUANTIZATION} <= set(manifest(precision)["files"])
    assert audit(small_bundles.load_graph(bundle), read_plan(bundle / QUANTIZATION)) == ()
    assert manifest(precision)["precision"]["rest"] == "fp16"


# spach-validate


@both
def test_validate_passes_and_says_so(precision: Precision) -> None:
    found = report(small_quantized.bundle(precision))
    assert found["findings"] == []
    assert [entry["passed"] for entry in found["evidence"]] == [True, True]


@pytest.fixture(scope="module")
def other_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "images.npz"
    np.savez(path, images=pictures(8, first=12))
    return path


@both
def test_other_images_get_tolerances_of_their_own_through_the_twin(precision: Precision, other_images: Path) -> None:
    found = report(small_quantized.bundle(precision), "--images", other_images)
    stored = manifest(precision)["validation"]["tolerances"]["graph"]["derivation"]
    for entry in found["evidence"]:
        assert entry["passed"]
        derivation = entry["tolerances"]["derivation"]
        assert derivation["arithmetic"] == "eight bits and fp16"
        assert derivation["loss"]["images"] == 8
        assert derivation["loss"]["rel_l2"] != stored["loss"]["rel_l2"]
        assert 0.2 < derivation["loss"]["rel_l2"] / stored["loss"]["rel_l2"] < 5


def test_a_fault_is_found_on_other_images_too(other_images: Path, tmp_path: Path) -> None:
    bundle = small_bundles.copy(small_quantized.bundle(Precision.INT8), tmp_path / "bundle")
    model = small_bundles.load_graph(bundle)
    faults.scale_input(model, "layer2.1.channel_func/Reshape", 2)
    small_bundles.save_graph(model, bundle)
    seal(bundle)
    result = validate(bundle, "--images", other_images)
    assert result.exit_code == 1
    assert "layer2.1.channel_func.fc1: input: scale" in result.stdout


def test_a_graph_alone_is_held_against_the_bundles_record(tmp_path: Path) -> None:
    bundle = small_bundles.copy(small_quantized.bundle(Precision.INT8), tmp_path / "bundle")
    assert validate(bundle / GRAPH).exit_code == 0
    model = small_bundles.load_graph(bundle)
    faults.remove_pair(model, "layer2.1.channel_func/Reshape")
    small_bundles.save_graph(model, bundle, "other.onnx")
    result = validate(bundle / "other.onnx")
    assert result.exit_code == 1
    assert "layer2.1.channel_func.fc1: no pair before its input" in result.stdout


@pytest.mark.parametrize("content", [None, "", "{}", '{"schema": 7}', "[1]"])
def test_a_bundle_without_a_readable_record_is_refused(content: str | None, tmp_path: Path) -> None:
    bundle = small_bundles.copy(small_quantized.bundle(Precision.INT8), tmp_path / "bundle")
    if content is None:
        (bundle / QUANTIZATION).unlink()
    else:
        (bundle / QUANTIZATION).write_text(content)
        seal(bundle)
    result = validate(bundle)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert QUANTIZATION in result.stderr


@pytest.mark.parametrize("width", [1, 3])
def test_a_record_that_does_not_fit_the_model_is_no_traceback(width: int, other_images: Path, tmp_path: Path) -> None:
    bundle = small_bundles.copy(small_quantized.bundle(Precision.INT8), tmp_path / "bundle")
    content = json.loads((bundle / QUANTIZATION).read_text())
    content["sites"][0].update(weight_scales=[0.1] * width, correction=[0.0] * width)
    (bundle / QUANTIZATION).write_text(json.dumps(content))
    seal(bundle)
    assert validate(bundle).exit_code == 1
    result = validate(bundle, "--images", other_images)
    assert result.exit_code == 2
    assert "does not fit this model" in result.stderr


# Depthwise convolutions on request


def test_a_quantized_depthwise_bundle_keeps_its_residual_apart_and_validates(
    tmp_path: Path, other_images: Path
) -> None:
    pattern = "layer3.*.cpe_net.net.1"
    spec = QuantizationSpec(calibration=calibration_images(), quantize=(pattern,))
    export(small_quantized.options(Precision.INT8, tmp_path / "bundle", spec))
    folded = small_bundles.read_manifest(tmp_path / "bundle")["graph"]["rewrites"]["fold_residual"]
    assert folded["modules"] == 5
    assert [line.split(":")[0] for line in folded["skipped"]] == [f"layer3.{i}.cpe_net" for i in (1, 2, 3)]
    plan = read_plan(tmp_path / "bundle" / QUANTIZATION)
    depthwise = [site for site in plan.sites if site.module.endswith("cpe_net.net.1")]
    assert len(depthwise) == 3
    graph = small_bundles.load_graph(tmp_path / "bundle")
    nodes = {node.name: node for node in graph.graph.node}
    assert all(attributes(nodes[site.node])["group"] == len(site.weight_scales) for site in depthwise)
    found = report(tmp_path / "bundle", "--images", other_images)
    assert [entry["passed"] for entry in found["evidence"]] == [True, True]


# The images that these tests calibrate on


def test_calibration_pictures_are_not_the_golden_ones() -> None:
    preprocessing = Preprocessing.for_size(static_models.IMAGE_SIZE)
    golden = {pixels(item.image, preprocessing).tobytes() for item in probe_source()}
    with np.load(calibration_images()) as arrays:
        images = arrays["images"]
    assert len({image.tobytes() for image in images}) == len(images) == 16
    assert not golden & {image.tobytes() for image in images}


# An ONNX Runtime that truncates FP16


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The INT8 bundle as earlier versions exported it: INT8 is made of FP16."""
    bundle = small_bundles.copy(small_quantized.bundle(Precision.INT8), tmp_path_factory.mktemp("earlier") / "bundle")
    model = small_bundles.load_graph(bundle)
    faults.from_fp16(model)
    small_bundles.save_graph(model, bundle)
    content = small_bundles.read_manifest(bundle)
    del content["quantization"]["quantized_from"]
    small_bundles.write_manifest(bundle, content)
    seal(bundle)
    return bundle


@both
def test_a_right_bundle_is_blamed_nowhere_its_attention_in_eight_bits_neither(precision: Precision) -> None:
    bisected = json.loads(validate(small_quantized.bundle(precision), "--bisect", "--json").stdout)["bisect"]
    assert not bisected["first_stage"]
    assert bisected["suspects"] == []


@pytest.fixture
def truncating(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ONNX Runtime here is one that truncates."""
    monkeypatch.setattr(onnxruntime_runner, "truncating_runtime", lambda: "1.28.0")


FAULT = "ONNX Runtime 1.28.0's QuantizeLinear truncates FP16 on a CPU"
ROUNDED = "typed graph, every half tensor rounded in ONNX Runtime (CPU)"


def ran(found: dict[str, Any]) -> list[str]:
    return [entry["ran"] for entry in found["evidence"]]


def test_where_fp16_is_rounded_an_earlier_bundle_validates_as_ever(earlier: Path) -> None:
    found = report(earlier)
    assert len(ran(found)) == 2
    assert found["notes"] == []


@pytest.mark.usefixtures("truncating")
@pytest.mark.parametrize("name", ["", GRAPH])
def test_a_runtime_that_truncates_is_named_and_the_rounded_graph_judges(earlier: Path, name: str) -> None:
    found = report(earlier / name)
    assert found["passed"]
    assert ran(found) == [ROUNDED]
    (note,) = found["notes"]
    assert note.startswith(FAULT)
    assert "judged in FP32 with every half tensor rounded" in note
    assert "or take ONNX Runtime 1.30 or newer" in note


@pytest.mark.usefixtures("truncating")
def test_bisect_blames_the_runtime(earlier: Path) -> None:
    bisected = json.loads(validate(earlier, "--bisect", "--json").stdout)["bisect"]
    assert not bisected["first_stage"]
    assert bisected["suspects"] == []
    assert bisected["truncated_by"] == "1.28.0"
    assert bisected["lines"][-1].startswith(f"The runtime's fault, not the graph's: {FAULT}")


@pytest.mark.usefixtures("truncating")
def test_a_graph_of_others_that_makes_int8_of_fp16_is_held_to_the_bundle_by_the_rounded_one(earlier: Path) -> None:
    against = validate(earlier / GRAPH, "--against", small_quantized.bundle(Precision.INT8), "--json")
    found = json.loads(against.stdout)
    assert ran(found) == [ROUNDED]
    assert any(note.startswith(FAULT) for note in found["notes"])
    assert found["bisect"]["truncated_by"] == "1.28.0"


@pytest.mark.usefixtures("truncating")
@both
def test_what_is_exported_now_is_right_in_every_runtime_and_nothing_is_said(precision: Precision) -> None:
    found = report(small_quantized.bundle(precision))
    assert len(ran(found)) == 2
    assert found["notes"] == []

"""Manifests of real exports, as they were written when the schema was made, are read and written byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spach_deploy.bundle import store as bundles
from spach_deploy.bundle.schema import CpuFormEntry, CpuSection, Form, Manifest, json_schema
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import BundleError
from spach_deploy.options.specs import Flavour, Precision
from tests import manifests
from tests.commands import ROOT

RECORDED = sorted(Path(__file__).with_name("manifests").glob("*.json"))
SCHEMA = json.loads((ROOT / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))

recorded = pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)


@recorded
def test_a_recorded_manifest_is_written_again_byte_for_byte(file: Path) -> None:
    assert Manifest.read(file).text() == file.read_text(encoding="utf-8")


def test_there_is_a_recording_of_every_kind() -> None:
    kinds = [Manifest.read(file) for file in RECORDED]
    assert {manifest.engine.flavour for manifest in kinds} == {Flavour.TENSORRT_RTX, Flavour.NONE}
    assert {manifest.precision.asked for manifest in kinds} >= {Precision.FP32, Precision.FP16, Precision.INT8}
    assert any(manifest.quantization is not None and manifest.quantization.sensitivity for manifest in kinds)
    assert any(manifest.cpu is not None for manifest in kinds)


@recorded
def test_what_a_later_version_adds_does_not_hinder_reading(file: Path) -> None:
    """Neither does it change what is read."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for entry in [content, *_objects(content)]:
        entry["of a later version"] = {"new": 1}
    plain = Manifest.read(file)
    read = Manifest.parse(json.dumps(content), "manifest.json")
    assert (read.model, read.precision, read.validation) == (plain.model, plain.precision, plain.validation)


def _objects(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those with fields of ours, not names of modules or files."""
    yield from (content[name] for name in ("model", "preprocessing", "output_options", "precision", "engine"))
    yield from (content["graph"], content["graph"]["certificate"], content["validation"], *content["inputs"])
    yield from (content["validation"]["tolerances"]["graph"]["derivation"], *content["precision"]["layers"])


def test_what_a_later_version_adds_is_not_lost_where_a_manifest_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    content = manifests.sections(later={"new": [1e-06, None]})
    content["engine"]["of a later version"] = 7.0
    (tmp_path / "from" / bundles.MANIFEST).write_text(json.dumps(content))
    form = CpuFormEntry(
        precision=Precision.FP32,
        runner="onnxruntime",
        batch=8,
        images_per_second=9.5,
        times_eager=1.5,
        ratio=None,
        rel_l2=1e-06,
        is_right=True,
        settings={},
    )
    with bundles.writing(bundles.check_target(tmp_path / "to", overwrite=False)) as staging:
        (staging / bundles.GRAPH).write_bytes(b"graph")
        bundles.seal_again(staging, tmp_path / "from", cpu=CpuSection(chosen=form, forms=(form,), machine={}))
    written = json.loads((tmp_path / "to" / bundles.MANIFEST).read_text())
    assert list(written) == [*(name for name in content if name != "files"), "cpu", "files"]
    assert written["later"] == content["later"]
    assert written["engine"] == content["engine"]
    bundle = Bundle.open(tmp_path / "to")  # its hashes are right
    assert bundle.manifest.cpu is not None
    assert bundle.manifest.cpu.chosen == form


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("engine.kernels", {"total": "many"}, "engine.kernels.total: expected int | null, got str"),
        ("engine.gpus", "sm89", "engine.gpus: expected array, got str"),
        ("engine.flavour", "tensorflow", "engine.flavour: invalid enum value 'tensorflow'"),
        ("batch.opt", 40, "Batch profile 1:40:32 is not 1 <= MIN <= OPT <= MAX"),
        ("batch.opt", "8", "batch.opt: expected int, got str"),
        ("model.weights_sha256", None, "model.weights_sha256: expected str, got null"),
        ("model.hyperparameters", {"heads": 3}, "model.hyperparameters[...]: expected object, got int"),
        ("preprocessing.mean", [0.5, 0.5], "preprocessing: mean is of 2 channels, and std of 3"),
        ("output_options.top_k", 0, "output_options: top_k is 0, not 1 to 1,000"),
        ("validation.tolerances", {}, "validation.tolerances lacks graph"),
        ("precision.closest", [{"tensor": "x"}], "precision.closest[0] lacks max_abs"),
        ("engine.build_seconds", float("inf"), "engine.build_seconds is inf"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(path: str, value: object, reason: str) -> None:
    content = manifests.sections()
    section, field = path.split(".")
    content[section][field] = value
    with pytest.raises(BundleError, match=re.escape(f"b/manifest.json has an entry of the wrong kind ({reason}).")):
        Manifest.parse(json.dumps(content), "b/manifest.json")


_FLOATS = {"dtype": "float32", "layout": ""}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"inputs": []}, "inputs: there are none"),
        ({"outputs": []}, "outputs: there are none"),
        ({"inputs": [{**_FLOATS, "name": "input", "shape": []}]}, "inputs: input has no axes"),
        ({"outputs": [{**_FLOATS, "name": "logits", "shape": []}]}, "outputs: logits has no axes"),
        (
            {"outputs": [{"name": "logits", "dtype": "complex64", "shape": [None, 1000]}]},
            "outputs: logits has dtype 'complex64', not float32 or float16 or int64",
        ),
        (
            {"output_options": {"io_dtype": "uint8", "top_k": None, "softmax": False}},
            "inputs: input has dtype 'float32', not uint8",
        ),
        (
            {"preprocessing": {**manifests.preprocessing(224), "interpolation": "bilinear"}},
            "preprocessing: interpolation is 'bilinear', not 'bicubic, antialiased' or 'bilinear, antialiased' or"
            " 'nearest'",
        ),
    ],
)
def test_an_interface_that_no_export_has_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(BundleError, match=re.escape(f"b/manifest.json has an entry of the wrong kind ({reason}).")):
        Manifest.parse(json.dumps(manifests.sections(**changed)), "b/manifest.json")


@pytest.mark.parametrize("section", ["preprocessing", "output_options", "batch"])
def test_what_a_command_line_may_leave_out_a_manifest_may_not(section: str) -> None:
    content = manifests.sections()
    field = next(iter(content[section]))
    del content[section][field]
    with pytest.raises(BundleError, match=rf"\({section}: it lacks {field}\)"):
        Manifest.parse(json.dumps(content), "manifest.json")


def test_a_later_format_is_refused_in_one_sentence() -> None:
    with pytest.raises(BundleError, match="has schema version 2; this is spach-deploy for version 1") as refused:
        Manifest.parse(json.dumps({**manifests.sections(), "schema_version": 2, "model": 7}), "manifest.json")
    assert "install the spach-deploy that wrote it" in refused.value.hint


# The published JSON Schema


def test_the_published_schema_is_that_of_the_classes() -> None:
    """Where it is not: scripts/manifest_schema.py writes it."""
    assert json.loads(json.dumps(json_schema())) == SCHEMA


@recorded
def test_a_real_manifest_keeps_to_the_published_schema(file: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")  # kubernetes-validate brings it
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert list(validator.iter_errors(content)) == []
    content["batch"].pop("opt")
    content["engine"]["gpus"] = "sm89"
    assert len(list(validator.iter_errors(content))) == 2


@recorded
def test_of_an_older_manifest_the_form_follows_from_passes_or_engine(file: Path) -> None:
    """A recorded form comes first."""
    manifest = Manifest.read(file)
    is_for_tensorrt = manifest.engine.flavour is not Flavour.NONE
    assert manifest.form is (
        Form.TENSORRT if is_for_tensorrt else Form.CPU_INT8 if file.stem == "cpu_int8" else Form.CPU
    )
    assert "form" not in manifest.content()["graph"]
    content = json.loads(file.read_text(encoding="utf-8"))
    content["graph"] |= {"form": "cpu-int8", "passes": {"shift_depthwise": 1}}
    assert Manifest.parse(json.dumps(content), "it").form is Form.CPU_INT8
    del content["graph"]["form"]
    assert Manifest.parse(json.dumps(content), "it").form is Form.TENSORRT
    content["graph"]["passes"] = {"channels_last": 0, "split_group_norm": 0, "linear_as_matmul": 4}
    assert Manifest.parse(json.dumps(content), "it").form is Form.CPU_INT8
    content["graph"]["passes"] = {}
    assert Manifest.parse(json.dumps(content), "it").form is (Form.TENSORRT if is_for_tensorrt else Form.CPU)

"""A user's own graph held to a bundle: what is mapped to what, what is refused, and what a report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import ModelProto, TensorProto, helper

from spach_deploy.cli.validate import main
from spach_deploy.common.errors import UsageError
from spach_deploy.models.checkpoint import load_model
from spach_deploy.options.specs import ModelSpec, Precision
from tests import small_bundles
from tests.protos import map_interface, type_graph
from tests.small_bundles import CLASSES, NAME, SIZE
from tests.static_models import plain_export
from tests.validation import faults

pytestmark = pytest.mark.usefixtures("small_model_registered")


@pytest.fixture(scope="module")
def plain() -> bytes:
    """What torch.onnx.export makes of the bundle's model."""
    with small_bundles.registered():
        model = load_model(ModelSpec(NAME, image_size=SIZE, num_classes=CLASSES)).model
    return bytes(plain_export(model, SIZE).SerializeToString())


def graph(plain: bytes) -> ModelProto:
    model: ModelProto = onnx.load_from_string(plain)
    return model


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def against(model: ModelProto, folder: Path, *more: object) -> Result:
    onnx.save(model, folder / "other.onnx")
    return validate(folder / "other.onnx", "--against", small_bundles.bundle(), *more)


def rename_interface(model: ModelProto) -> None:
    faults_free = {"input": "pixel_values", "logits": "scores"}
    for node in model.graph.node:
        node.input[:] = [faults_free.get(name, name) for name in node.input]
        node.output[:] = [faults_free.get(name, name) for name in node.output]
    model.graph.input[0].name, model.graph.output[0].name = "pixel_values", "scores"


def test_another_exporters_graph_agrees_under_its_own_names(plain: bytes, tmp_path: Path) -> None:
    model = graph(plain)
    rename_interface(model)
    result = against(model, tmp_path, "--report", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert "pixel_values was taken for input and scores was taken for logits" in " ".join(result.stdout.split())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["precision"] == "fp32"  # the graph's, not the bundle's
    assert report["bisect"]["passed"]
    assert len(report["bisect"]["modules"]) > 80
    assert not (tmp_path / "other.json").exists()


def test_a_wrong_module_is_named_and_ends_with_1(plain: bytes, tmp_path: Path) -> None:
    model = graph(plain)
    weight = "layer2.2.channel_func.fc1.bias"
    faults.set_value(model, weight, faults.value(model, weight) * 0)
    result = against(model, tmp_path, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    (suspect,) = report["bisect"]["suspects"]
    assert (suspect["module"], suspect["kind"]) == ("layer2.2.channel_func.fc1", "missing bias")
    assert len(report["bisect"]["lines"]) <= 5


def test_a_fault_that_the_logits_hide_is_found_in_its_module(plain: bytes, tmp_path: Path) -> None:
    model = graph(plain)
    weight = faults.value(model, "layer1.0.norm2.weight").astype(np.float32)
    faults.set_value(model, "layer1.0.norm2.weight", weight * np.float32(1 + 4e-6))
    report = json.loads(against(model, tmp_path, "--json").stdout)
    assert all(item["passed"] for item in report["evidence"])
    assert [suspect["module"] for suspect in report["bisect"]["suspects"]] == ["layer1.0.norm2"]
    assert not report["passed"]


def test_without_the_checkpoint_the_whole_is_compared_and_the_rest_is_said(plain: bytes, tmp_path: Path) -> None:
    bundle = small_bundles.copy(small_bundles.bundle(), tmp_path / "bundle")
    manifest = small_bundles.read_manifest(bundle)
    manifest["model"] |= {"origin": "checkpoint", "checkpoint": "run7.pth", "checkpoint_sha256": "0" * 64}
    small_bundles.write_manifest(bundle, manifest)
    onnx.save(graph(plain), tmp_path / "other.onnx")
    result = validate(tmp_path / "other.onnx", "--against", bundle)
    assert result.exit_code == 0
    assert "Not bisected by module" in result.stdout
    assert "run7.pth" in result.stdout
    onnx.save(type_graph(graph(plain), Precision.BF16).model, tmp_path / "half.onnx")
    result = validate(tmp_path / "half.onnx", "--against", bundle)
    assert result.exit_code == 2
    assert "The graph is in bf16, and the bundle allows for fp16 alone." in result.stderr
    assert "run7.pth" in result.stderr


def test_nodes_may_stand_in_any_order(plain: bytes, tmp_path: Path) -> None:
    """As converters to float16 leave them, with their casts behind the nodes that read them."""
    half = type_graph(graph(plain), Precision.FP16).model
    nodes = list(half.graph.node)
    casts = [node for node in nodes if node.op_type == "Cast"]
    del half.graph.node[:]
    half.graph.node.extend([*(node for node in nodes if node.op_type != "Cast"), *casts])
    assert casts
    result = against(half, tmp_path)
    assert result.exit_code == 0, result.output


def two_inputs(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))


def other_size(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 7


def token_ids(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def other_classes(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = CLASSES + 1


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (two_inputs, "2 inputs"),
        (other_size, r"\(N, 3, 32, 32\)"),
        (token_ids, "holds no images"),
        (other_classes, f"No output of the graph holds {CLASSES} logits"),
    ],
)
def test_what_cannot_be_mapped_is_said(plain: bytes, spoil: Callable[[ModelProto], None], sentence: str) -> None:
    model = graph(plain)
    spoil(model)
    with pytest.raises(UsageError, match=sentence):
        map_interface(model, CLASSES, (SIZE, SIZE, 3))


def test_further_outputs_are_not_compared_and_that_is_said(plain: bytes) -> None:
    model = graph(plain)
    model.graph.output.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, None))
    assert map_interface(model, CLASSES, (SIZE, SIZE, 3)).notes == ("Not compared: features.",)


def test_a_fixed_batch_is_kept(plain: bytes, tmp_path: Path) -> None:
    model = graph(plain)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert map_interface(model, CLASSES, (SIZE, SIZE, 3)).batch.max == 1
    assert against(model, tmp_path).exit_code == 0


def test_an_eight_bit_graph_needs_an_eight_bit_bundle(plain: bytes, tmp_path: Path) -> None:
    model = graph(plain)
    model.graph.node.append(helper.make_node("QuantizeLinear", ["a", "b"], ["c"]))
    result = against(model, tmp_path)
    assert result.exit_code == 2
    assert "--int8 or --fp8" in result.stderr


def test_a_bundle_is_needed(tmp_path: Path) -> None:
    result = validate(tmp_path / "none.onnx", "--against", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "Traceback" not in result.output

"""A graph's header asks of a runtime what its operators need and no more; --opset writes another one, exactly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import ModelProto, TensorProto, helper

from spach_deploy.bundle.outputs import INPUT, LOGITS
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import UnavailableError, UsageError
from spach_deploy.graph import opset as opsets
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.opset import check_opset, convert_opset
from spach_deploy.graph.passes import TENSORRT_PASSES, apply_passes
from spach_deploy.graph.precision.formats import infer_all_types
from spach_deploy.options.recipe import export_options
from spach_deploy.options.specs import ExportOptions, ModelSpec, Precision, QuantizationSpec
from spach_deploy.pipeline.cache import export_key
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from tests import small_bundles
from tests.commands import export, refusal
from tests.protos import element_types, type_graph
from tests.static_models import canonical_bytes, images, relative_l2

HYBRID = ("--model", "ms_hybrid_s", "--engine", "none")


def target_graph() -> ir.Model:
    """Every operator that graphs for TensorRT have."""
    model: ir.Model = ir.from_proto(ModelProto.FromString(canonical_bytes("hybrid")))
    apply_passes(model, TENSORRT_PASSES)
    return model


def converted(opset: int) -> ir.Model:
    model = target_graph()
    infer_all_types(model)
    convert_opset(model, opset)
    return model


@pytest.mark.parametrize(("opset", "ir_version"), [(17, 8), (19, 9), (20, 9), (21, 10), (23, 11)])
def test_another_opset_computes_the_same_and_is_valid(opset: int, ir_version: int) -> None:
    model, batch = converted(opset), {INPUT: images(2)}
    onnx.checker.check_model(as_proto(model), full_check=True)
    assert (opsets.opset_of(model), model.ir_version) == (opset, ir_version)
    found = []
    for graph in (model, target_graph()):
        with OnnxRuntimeRunner(as_proto(graph).SerializeToString(), optimization="none") as runner:
            found.append(runner.run(batch)[LOGITS])
    assert relative_l2(*found) < 1e-6


def test_what_a_lower_opset_lacks_stays_in_fp32_in_half_graphs() -> None:
    typed = type_graph(as_proto(converted(17)), Precision.FP16).model
    onnx.checker.check_model(typed, full_check=True)
    types = element_types(typed)
    assert {types[node.output[0]] for node in typed.graph.node if node.op_type == "Erf"} == {TensorProto.FLOAT}


def test_the_operator_that_needs_more_is_named() -> None:
    with pytest.raises(UsageError, match=r"LayerNormalization \(.*\) is not in opset 16 .* it needs opset 17"):
        converted(16)


def test_a_changed_meaning_is_refused() -> None:
    node = helper.make_node("GroupNormalization", ["x", "w", "w"], ["y"], name="n/GN", num_groups=1)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4])
    weight = helper.make_tensor_value_info("w", TensorProto.FLOAT, [1])
    made = helper.make_graph([node], "g", [value, weight], [helper.make_tensor_value_info("y", 1, [1, 2, 4])])
    model = ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]))
    with pytest.raises(UsageError, match="GroupNormalization"):
        convert_opset(model, 21)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--opset", 16), "LayerNormalization needs opset 17"),
        (("--bf16", "--opset", 21), "Conv in bfloat16 needs opset 22"),
        (("--opset", 999), "--opset 999 is unknown to onnx"),
    ],
)
def test_the_command_refuses_at_once_and_so_does_its_dry_run(more: tuple[object, ...], words: str) -> None:
    assert words in refusal(export(*HYBRID, *more))
    told = json.loads(export(*HYBRID, *more, "--dry-run", "--json").stdout)
    assert (told["exit_code"], told["facts"]["opset"]) == (2, str(more[-1]))
    assert words in told["refusals"][0]["message"]


def test_eight_bits_need_more() -> None:
    def lowest(precision: Precision, rest: Precision) -> str:
        spec = QuantizationSpec(rest=rest)
        with pytest.raises(UsageError) as caught:
            check_opset(ExportOptions(precision=precision, quantization=spec, opset=1))
        return str(caught.value)

    assert "LayerNormalization needs opset 17" in lowest(Precision.INT8, Precision.FP32)
    assert "QuantizeLinear of float16 needs opset 19" in lowest(Precision.INT8, Precision.FP16)
    assert "Conv in bfloat16 needs opset 22" in lowest(Precision.INT8, Precision.BF16)
    assert "needs opset 21" in lowest(Precision.FP8, Precision.FP32)


def test_a_runtime_that_does_not_know_the_opset_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(OnnxRuntimeRunner):
        def __enter__(self) -> Old:
            raise UsageError("The given graph does not load.")

    monkeypatch.setattr("spach_deploy.runtime.onnxruntime_runner.OnnxRuntimeRunner", Old)
    with pytest.raises(UnavailableError, match=r"ONNX Runtime .* does not load opset 21"):
        check_opset(ExportOptions(opset=21))


@pytest.mark.parametrize(
    ("precision", "opset"), [(Precision.FP32, 20), (Precision.FP16, 20), (Precision.FP8, 21), (Precision.BF16, 22)]
)
def test_the_default_is_what_most_runtimes_know(precision: Precision, opset: int) -> None:
    assert ExportOptions(precision=precision).graph_opset == opset


@pytest.mark.usefixtures("small_model_registered")
def test_a_bundle_has_the_header_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Bundle.open(small_bundles.bundle(Precision.FP32)).manifest.content()["graph"]["certificate"]
    assert (plain["opset"], plain["ir_version"]) == (20, 9)
    monkeypatch.chdir(tmp_path)
    size = ("--image-size", small_bundles.SIZE, "--num-classes", small_bundles.CLASSES)
    result = export("--model", small_bundles.NAME, *size, "--fp16", "--engine", "none", "--opset", 17, "-o", "x")
    assert result.exit_code == 0, result.output
    assert "opset 17, fp16" in result.stdout
    manifest = Bundle.open(Path("x")).manifest.content()
    certificate = manifest["graph"]["certificate"]
    assert (certificate["opset"], certificate["ir_version"]) == (17, 8)
    assert " --opset 17 " in manifest["command"]


def test_it_is_another_export_for_the_cache_and_can_stand_in_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "ms_hybrid_s"\nopset = 17\n')
    options = export_options({}, recipe)
    assert options == ExportOptions(ModelSpec("ms_hybrid_s"), opset=17)
    assert export_key(options) != export_key(dataclasses.replace(options, opset=None))

"""A bundle's graph made anew for ONNX Runtime: what it is, what is measured, and what is said where it is not made."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.schema import Form, Manifest
from spach_deploy.bundle.store import GOLDEN, GRAPH, QUANTIZATION, Bundle
from spach_deploy.common.errors import MissingPackageError, UsageError
from spach_deploy.common.files import sha256_of
from spach_deploy.options.specs import Precision
from spach_deploy.pipeline import runtime_form
from spach_deploy.pipeline.runtime_form import RuntimeGraph, graph_for_runtime
from spach_deploy.quantization.plan import read_plan
from spach_deploy.quantization.qdq import audit
from spach_deploy.quantization.sites import LayerKind
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from tests import small_bundles
from tests.quantization import small_quantized
from tests.static_models import relative_l2


def interface(graph: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [*graph.graph.input, *graph.graph.output]


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.fixture(scope="module")
def made() -> RuntimeGraph:
    return graph_for_runtime(Bundle.open(small_bundles.for_tensorrt()))


def test_a_graph_in_half_with_pixels_and_top_k_keeps_its_inputs_and_outputs(made: RuntimeGraph) -> None:
    bundle = Bundle.open(small_bundles.for_tensorrt())
    assert bundle.manifest.form is Form.TENSORRT
    assert made.is_made
    assert made.form is made.manifest.form is Form.CPU
    assert made.after.nodes < made.before.nodes / 1.5
    assert interface(onnx.load(made.path)) == interface(onnx.load(bundle.file(GRAPH)))
    assert {tensor.name for tensor in bundle.manifest.outputs} == {
        "logits",
        "probabilities",
        "top_values",
        "top_indices",
    }
    found = operators(made.path)
    assert (found.count("Pad"), found.count("Slice"), found.count("Conv") > 5) == (0, 0, True)


def test_it_computes_what_the_reference_did(made: RuntimeGraph) -> None:
    golden = Golden.load(small_bundles.for_tensorrt() / GOLDEN)
    with OnnxRuntimeRunner(made.path) as runner:
        outputs = runner.run({"input": golden.input})
    allowed = made.manifest.validation.tolerances.graph.outputs["logits"].rel_l2
    assert relative_l2(outputs["logits"], golden.outputs["logits"]) < allowed


def test_the_manifest_describes_the_made_graph_and_says_from_which_and_how_far(made: RuntimeGraph) -> None:
    bundle, manifest = Bundle.open(small_bundles.for_tensorrt()), made.manifest
    assert manifest.files[GRAPH].sha256 == sha256_of(made.path)
    assert manifest.files[GRAPH].bytes == made.path.stat().st_size == made.after.bytes
    assert manifest.graph.certificate.nodes == len(operators(made.path)) == made.after.nodes
    record = manifest.graph.made
    assert record is not None
    assert (record.graph_sha256, record.nodes) == (bundle.manifest.sha256(GRAPH), made.before.nodes)
    assert record.rewritten["shift_depthwise"] > 3
    assert set(record.fp32_rel_l2) == {"logits"}
    assert 0 <= record.fp32_rel_l2["logits"] < 1e-5
    assert 0 < record.rel_l2["logits"] <= manifest.validation.tolerances.graph.outputs["logits"].rel_l2
    assert Manifest.parse(manifest.text(), "it") == manifest
    assert f"{made.after.nodes} nodes" in made.note
    assert f"{made.before.nodes} nodes" in made.note


def test_the_file_goes_with_the_object() -> None:
    graph = graph_for_runtime(Bundle.open(small_bundles.for_tensorrt()))
    path = graph.path
    assert path.exists()
    del graph
    assert not path.exists()


@pytest.mark.parametrize("rest", [None, Precision.FP32])
def test_eight_bits_keep_every_scale_of_their_record(rest: Precision | None) -> None:
    bundle = Bundle.open(small_quantized.for_tensorrt())
    graph = graph_for_runtime(bundle, rest=rest)
    assert graph.is_made, graph.note
    model, plan = ir.from_proto(onnx.load(graph.path)), read_plan(bundle.path / QUANTIZATION)
    assert audit(model, plan) == ()
    assert graph.form is (Form.CPU if rest is None else Form.CPU_INT8)
    assert not [name for name in operators(graph.path) if name.startswith("QLinear")]
    linear = [site.node for site in plan.sites if site.kind is LayerKind.LINEAR]
    kinds = {node.op_type for node in model.graph if node.name in linear}
    assert kinds == ({"Gemm"} if rest is None else {"MatMul"})
    assert not dataclasses.replace(bundle, manifest=graph.manifest).quantizes_fp16


def test_a_graph_for_a_cpu_stays_and_nothing_is_said() -> None:
    bundle = Bundle.open(small_bundles.bundle())
    graph = graph_for_runtime(bundle)
    assert (graph.is_made, graph.path, graph.note, graph.manifest) == (False, bundle.path / GRAPH, "", bundle.manifest)


def test_another_rest_is_for_eight_bits_alone() -> None:
    with pytest.raises(UsageError, match="not made anew with fp32"):
        graph_for_runtime(Bundle.open(small_bundles.for_tensorrt()), rest=Precision.FP32)


def spoilt(tmp_path: Path, name: str, change: float) -> Bundle:
    """A bundle with a weight of its graph changed, as by hand."""
    folder = small_bundles.copy(small_bundles.for_tensorrt(), tmp_path / "bundle")
    model = small_bundles.load_graph(folder)
    tensor = next(value for value in model.graph.initializer if value.name.endswith(name))
    values = onnx.numpy_helper.to_array(tensor) * change
    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(values.dtype), tensor.name))
    small_bundles.save_graph(model, folder)
    manifest = small_bundles.read_manifest(folder)
    manifest["files"][GRAPH] = {"sha256": sha256_of(folder / GRAPH), "bytes": (folder / GRAPH).stat().st_size}
    small_bundles.write_manifest(folder, manifest)
    return Bundle.open(folder)


def test_a_graph_that_is_not_the_references_is_not_made_and_one_line_says_what_it_costs(tmp_path: Path) -> None:
    bundle = spoilt(tmp_path, "head.weight", 1.5)
    graph = graph_for_runtime(bundle)
    assert (graph.is_made, graph.path) == (False, bundle.path / GRAPH)
    assert f"stays in the form for TensorRT: {graph.before}. How many nodes" in graph.note
    assert "twice" not in graph.note
    assert "not what the reference computes" in graph.note
    assert "\n" not in graph.note


def test_without_onnxruntime_a_graph_to_remake_is_refused_and_another_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to_remake, of_a_cpu = Bundle.open(small_bundles.for_tensorrt()), Bundle.open(small_bundles.bundle())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match="onnxruntime") as refused:
        graph_for_runtime(to_remake)
    assert "pip install" in str(refused.value.hint)
    assert not graph_for_runtime(of_a_cpu).note


def test_forms_that_differ_in_fp32_are_not_taken_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(model: ir.Model, passes: object) -> dict[str, tuple[str, ...]]:
        weight = model.graph.initializers["head.weight"]
        assert weight.const_value is not None
        weight.const_value = ir.Tensor(np.asarray(weight.const_value.numpy()) * np.float32(1 + 1e-4), name=weight.name)
        return {"shift_depthwise": ("one",)}

    monkeypatch.setattr(runtime_form, "apply_passes", scaled)
    graph = graph_for_runtime(Bundle.open(small_bundles.for_tensorrt()))
    assert not graph.is_made
    assert "In FP32 the two forms differ in logits" in graph.note


def test_places_that_are_not_as_the_export_wrote_them_are_counted(tmp_path: Path) -> None:
    folder = small_bundles.copy(small_bundles.for_tensorrt(), tmp_path / "bundle")
    manifest = small_bundles.read_manifest(folder)
    manifest["graph"]["passes"]["shift_depthwise"] += 1
    small_bundles.write_manifest(folder, manifest)
    graph = graph_for_runtime(Bundle.open(folder))
    total = sum(number for name, number in manifest["graph"]["passes"].items() if name != "channels_last")
    assert graph.is_made
    assert f"Of {total} places that the export changed for TensorRT, {total - 1} are as it wrote them" in graph.note

"""Linear layers for eight bits on a CPU: the same function, and integers in ONNX Runtime's own plan."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from spach_deploy.bundle.store import Bundle
from spach_deploy.common.machine import has_vnni
from spach_deploy.graph.editing import as_proto, mark_quantized
from spach_deploy.graph.passes.linear_as_matmul import linear_as_matmul
from spach_deploy.quantization.plan import QuantizedSite, read_plan
from tests import small_bundles
from tests.commands import export
from tests.protos import open_session
from tests.quantization import small_models
from tests.quantization.small_quantized import calibration_images

needs_vnni = pytest.mark.skipif(not has_vnni(), reason="this CPU has no VNNI")


@pytest.mark.parametrize("kind", ["conv", "trans", "hybrid"])
def test_marked_layers_change_their_form_and_nothing_else(kind: str) -> None:
    model, images = ir.from_proto(small_models.canonical(kind)), small_models.inputs()
    before = open_session(as_proto(model)).run(None, {"input": images})[0]
    marked = [node for node in model.graph if node.op_type == "Gemm" and node.name != "head/Gemm"]
    for node in marked:
        mark_quantized(node)
    assert linear_as_matmul(model) == tuple(node.name for node in marked)
    assert [node.name for node in model.graph if node.op_type == "Gemm"] == ["head/Gemm"]
    after = open_session(as_proto(model)).run(None, {"input": images})[0]
    assert np.linalg.norm(after - before) <= 1e-6 * np.linalg.norm(before)


def test_nothing_that_is_not_marked_is_touched() -> None:
    model = ir.from_proto(small_models.canonical("trans"))
    assert linear_as_matmul(model) == ()
    assert as_proto(model) == small_models.canonical("trans")


def exported(target: Path, *options: object) -> Bundle:
    size = ("--image-size", small_bundles.SIZE, "--num-classes", small_bundles.CLASSES)
    quantized = ("--int8", "--rest", "fp32", "--calibration", calibration_images(), "--engine", "none")
    with small_bundles.registered():
        result = export("--model", small_bundles.NAME, *size, *quantized, *options, "-o", target)
    assert result.exit_code == 0, result.stderr
    return Bundle.open(target)


def linear_layers(bundle: Bundle) -> list[QuantizedSite]:
    return [site for site in read_plan(bundle.file("quantization.json")).sites if site.kind.value == "linear"]


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_a_graph_for_a_cpu_multiplies_integers_there(tmp_path: Path, activation: str) -> None:
    bundle = exported(tmp_path / "bundle", "--activation", activation)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(bundle.file("model.onnx"), options, providers=["CPUExecutionProvider"])
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert operators["MatMulIntegerToFloat"] == len(linear_layers(bundle)) > 0
    assert bundle.manifest.content()["quantization"]["vnni"] is False


@needs_vnni
def test_a_graph_for_vnni_multiplies_integers_in_openvino_too(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    bundle = exported(tmp_path / "bundle", "--vnni")
    model = openvino.Core().compile_model(bundle.file("model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [str(node.get_rt_info()["primitiveType"].astype(str)) for node in model.get_runtime_model().get_ops()]
    assert sum(kind.endswith("_I8") for kind in kinds) == len(linear_layers(bundle)) > 0
    assert bundle.manifest.content()["quantization"]["vnni"] is True
    assert "--vnni" in bundle.manifest.content()["command"]


@needs_vnni
def test_both_forms_are_the_same_numbers(tmp_path: Path) -> None:
    images = np.load(exported(tmp_path / "a").file("golden.npz"))["input"]
    exported(tmp_path / "b", "--vnni")
    found = [open_session(onnx.load(tmp_path / name / "model.onnx")).run(None, {"input": images})[0] for name in "ab"]
    assert np.linalg.norm(found[1] - found[0]) <= 1e-5 * np.linalg.norm(found[0])

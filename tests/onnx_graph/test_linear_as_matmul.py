"""Linear layers for eight bits on a CPU: the same function, and integers in ONNX Runtime's own plan."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from spach_deploy.bundle import Bundle
from spach_deploy.onnx_graph.graph import mark_quantized
from spach_deploy.onnx_graph.passes.linear_as_matmul import linear_as_matmul
from spach_deploy.precision.ranges import open_session
from spach_deploy.quantization.plan import read_plan
from tests import small_bundles
from tests.commands import export
from tests.quantization import small_models
from tests.quantization.small_quantized import calibration_images


@pytest.mark.parametrize("kind", ["conv", "trans", "hybrid"])
def test_marked_layers_change_their_form_and_nothing_else(kind: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(small_models.canonical(kind))
    images = small_models.inputs()
    before = open_session(model).run(None, {"input": images})[0]
    marked = [
        mark_quantized(node).name for node in model.graph.node if node.op_type == "Gemm" and "head" not in node.name
    ]
    assert linear_as_matmul(model) == tuple(marked)
    assert [node.name for node in model.graph.node if node.op_type == "Gemm"] == ["head/Gemm"]
    after = open_session(model).run(None, {"input": images})[0]
    assert np.linalg.norm(after - before) <= 1e-6 * np.linalg.norm(before)


def test_nothing_that_is_not_marked_is_touched() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(small_models.canonical("trans"))
    assert linear_as_matmul(model) == ()
    assert model == small_models.canonical("trans")


def test_a_graph_for_a_cpu_multiplies_integers_there(tmp_path: Path) -> None:
    size = ("--image-size", small_bundles.SIZE, "--num-classes", small_bundles.CLASSES)
    quantized = ("--int8", "--rest", "fp32", "--calibration", calibration_images(), "--engine", "none")
    with small_bundles.registered():
        result = export("--model", small_bundles.NAME, *size, *quantized, "-o", tmp_path / "bundle")
    assert result.exit_code == 0, result.stderr
    bundle = Bundle.open(tmp_path / "bundle")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(bundle.file("model.onnx"), options, providers=["CPUExecutionProvider"])
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    linear = [site for site in read_plan(bundle.file("quantization.json")).sites if site.kind.value == "linear"]
    assert operators["MatMulIntegerToFloat"] == len(linear) > 0

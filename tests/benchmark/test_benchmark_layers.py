from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spach_deploy.benchmark.layers import Layer, layers, totals
from spach_deploy.bundle.store import GRAPH
from spach_deploy.graph.passes.shift_depthwise import shift_depthwise
from tests import small_bundles, static_models
from tests.protos import in_place


def saved(tmp_path: Path) -> Path:
    """A convolution (3 -> 8, 3x3, stride 2, two groups of none) and a linear layer (8 -> 5) after a mean."""
    weights: dict[str, np.ndarray[Any, np.dtype[Any]]] = {
        "w": np.zeros((8, 3, 3, 3), np.float32),
        "v": np.zeros((8, 5), np.float16),
    }
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["c"], "stem.proj/Conv", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["c", "axes"], ["m"], "pool/Mean", keepdims=0),
        helper.make_node("Cast", ["m"], ["h"], "pool/Cast", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "v"], ["logits"], "head/MatMul"),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    initializers.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 16, 16])
    made = helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["batch", 5])
    graph = helper.make_graph(nodes, "g", [given], [made], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_products_and_bytes_by_hand(tmp_path: Path) -> None:
    conv, head = layers(saved(tmp_path), 2)
    assert conv == Layer("stem.proj", "Conv", 2 * 8 * 8 * 8 * 27, 4 * (2 * 3 * 256 + 8 * 27 + 2 * 8 * 64))
    assert head == Layer("head", "MatMul", 2 * 5 * 8, 2 * (2 * 8 + 8 * 5 + 2 * 5))


def test_the_least_time_is_the_longer_of_computing_and_moving() -> None:
    layer = Layer("a", "Conv", macs=100, bytes=1000)
    assert layer.least_seconds(flops=100, bandwidth=10_000) == pytest.approx(2)
    assert layer.least_seconds(flops=1e9, bandwidth=100) == pytest.approx(10)


def test_every_weighted_layer_of_a_model_is_counted_and_grows_with_the_batch() -> None:
    graph = small_bundles.bundle() / GRAPH
    one, three = layers(graph, 1), layers(graph, 3)
    assert [layer.module for layer in one] == [layer.module for layer in three]
    assert sum(layer.macs for layer in three) == 3 * sum(layer.macs for layer in one)
    counted = {layer.module for layer in one}
    linear = {
        name
        for name, module in static_models.small_model("hybrid").named_modules()
        if type(module).__name__ == "Linear" and name
    }
    assert linear <= counted


def test_a_convolution_spelt_out_counts_as_the_one_it_was(tmp_path: Path) -> None:
    plain = saved_depthwise(tmp_path)
    shifted = onnx.load(plain)
    assert in_place(shift_depthwise, shifted) == ("dw/Conv",)
    onnx.save(shifted, tmp_path / "shifted.onnx")
    (whole,), (parts,) = layers(plain, 2), layers(tmp_path / "shifted.onnx", 2)
    assert (whole.module, whole.op, whole.macs) == ("dw", "Conv", 2 * 4 * 8 * 8 * 9)
    assert (parts.module, parts.op, parts.macs) == (whole.module, whole.op, whole.macs)
    assert abs(parts.bytes - whole.bytes) <= 4 * 4  # the bias is none of its taps


def saved_depthwise(tmp_path: Path) -> Path:
    """A depthwise convolution (4 channels, 3x3) with channels last behind it."""
    weight = numpy_helper.from_array(np.ones((4, 1, 3, 3), np.float32), "dw.weight")
    bias = numpy_helper.from_array(np.ones(4, np.float32), "dw.bias")
    conv = helper.make_node("Conv", ["input", "dw.weight", "dw.bias"], ["c"], "dw/Conv", group=4, pads=[1, 1, 1, 1])
    last = helper.make_node("Transpose", ["c"], ["logits"], "dw/Transpose", perm=[0, 2, 3, 1])
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4, 8, 8])
    made = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8, 8, 4])
    graph = helper.make_graph([conv, last], "g", [given], [made], [weight, bias])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "d.onnx")
    return tmp_path / "d.onnx"


def test_what_is_dequantized_counts_with_its_eight_bits(tmp_path: Path) -> None:
    weights = [
        numpy_helper.from_array(np.ones((8, 5), np.int8), "w"),
        numpy_helper.from_array(np.array(0.1, np.float32), "scale"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["q"], "fc/Q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"], "fc/DQ"),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["v"], "fc/DQ_2"),
        helper.make_node("MatMul", ["x", "v"], ["logits"], "fc/MatMul"),
    ]
    weights.append(numpy_helper.from_array(np.array(0, np.int8), "zero"))
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 8])
    made = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])
    graph = helper.make_graph(nodes, "g", [given], [made], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "q.onnx")
    assert layers(tmp_path / "q.onnx", 2) == (Layer("fc", "MatMul", 2 * 8 * 5, 2 * 8 + 8 * 5 + 4 * 2 * 5),)


def test_totals_are_sums_by_module() -> None:
    found = totals([Layer("a", "MatMul", 1, 10), Layer("b", "Conv", 5, 50), Layer("a", "MatMul", 2, 20)])
    assert found == {"a": Layer("a", "MatMul", 3, 30), "b": Layer("b", "Conv", 5, 50)}

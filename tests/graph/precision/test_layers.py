from __future__ import annotations

from collections import Counter

import onnx
from onnx import TensorProto, helper

from spach_deploy.graph.precision.formats import LayerPrecision
from spach_deploy.options.specs import Precision
from tests import small_bundles
from tests.protos import weighted_layers


def test_a_typed_graph_states_the_precision_of_every_weighted_layer() -> None:
    model = small_bundles.load_graph(small_bundles.bundle(Precision.FP16))
    layers = weighted_layers(model)
    weighted = [node.name for node in model.graph.node if node.op_type in ("Gemm", "MatMul", "Conv")]
    assert [layer.node for layer in layers] == weighted
    assert Counter(layer.asked for layer in layers).keys() <= {"fp16", "fp32"}
    assert LayerPrecision("stem.proj/Conv", "stem.proj", "convolution", "fp16") in layers


def test_what_comes_out_of_eight_bits_is_a_layer_of_eight_bits() -> None:
    def graph(stored: int) -> onnx.ModelProto:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="a/Q"),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="a/D"),
            helper.make_node("MatMul", ["d", "w"], ["y"], name="a.fc/MatMul"),
            helper.make_node("MatMul", ["y", "w"], ["z"], name="b.fc/MatMul"),
        ]
        weights = [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1]),
            helper.make_tensor("zero", stored, [], [0]),
            helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0] * 4),
        ]
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("x", "z")]
        made = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])

    for stored, name in ((TensorProto.INT8, "int8"), (TensorProto.FLOAT8E4M3FN, "fp8")):
        assert [layer.asked for layer in weighted_layers(graph(stored))] == [name, "fp32"]

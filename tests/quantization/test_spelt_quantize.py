"""QuantizeLinear spelt out: the same integers, only behind products in floating point, and taken back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.precision.formats import infer_all_types
from spach_deploy.quantization.spelt_quantize import join_quantizers, spell_quantizers
from tests.protos import open_session

SCALE = 0.05
WIDTH = 64


def model(before: tuple[str, ...] = ("Gemm",), *, is_half: bool = False) -> ModelProto:
    """input (n, WIDTH) -> the nodes `before` -> a pair with the scale SCALE."""
    constants = {"eye": np.eye(WIDTH, dtype=np.float32), "scale": np.float32(SCALE), "zero": np.int8(0)}
    constants |= {"ones": np.ones(WIDTH, np.float32)}
    others = {"Gemm": ["eye"], "LayerNormalization": ["ones"]}
    nodes, last = [], "input"
    for index, op_type in enumerate(before):
        nodes.append(helper.make_node(op_type, [last, *others.get(op_type, [])], [f"t{index}"], f"fc/{index}"))
        last = f"t{index}"
    nodes.append(helper.make_node("QuantizeLinear", [last, "scale", "zero"], ["fc/act/quantize"], "fc/act/quantize"))
    nodes.append(helper.make_node("DequantizeLinear", ["fc/act/quantize", "scale", "zero"], ["y"], "fc/act/dequantize"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def loaded(proto: ModelProto) -> ir.Model:
    """The model with its types inferred, as typing leaves it."""
    found = ir.from_proto(proto)
    infer_all_types(found)
    return found


def run(proto: ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    answer: NDArray[np.float32] = open_session(proto).run(None, {"input": x})[0]
    return answer


def numbers() -> NDArray[np.float32]:
    """Steps, ties, numbers beside ties, tiny, huge and saturating ones."""
    steps = np.arange(-260, 260, dtype=np.float32) * np.float32(SCALE / 2)
    beside = np.concatenate([np.nextafter(steps, np.float32(9)), np.nextafter(steps, np.float32(-9))])
    huge = np.array([0.0, -0.0, 1e-30, 1e6, -1e6, 3e8, -3e8, 3e38, -3e38], np.float32)
    found = np.concatenate([steps, beside, huge, np.random.default_rng(3).standard_normal(4096).astype(np.float32)])
    return np.resize(found, (-(-len(found) // WIDTH), WIDTH))


def test_it_rounds_and_saturates_as_quantize_linear_does_bit_for_bit() -> None:
    spelt = loaded(model())
    assert spell_quantizers(spelt) == ("fc/act/quantize",)
    assert [node.op_type for node in spelt.graph][1:] == ["Div", "Add", "Clip", "Sub", "Cast", "DequantizeLinear"]
    x = numbers()
    expected, found = run(model(), x), run(as_proto(spelt), x)
    assert len(np.unique(expected)) == 256
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("before", [("Gemm", "Relu"), ("Gemm", "Relu", "Sigmoid")])
def test_an_activation_may_stand_between(before: tuple[str, ...]) -> None:
    assert spell_quantizers(loaded(model(before)))


@pytest.mark.parametrize("before", [(), ("Relu",), ("Gemm", "LayerNormalization"), ("LayerNormalization",)])
def test_other_quantizers_stay(before: tuple[str, ...]) -> None:
    assert spell_quantizers(loaded(model(before))) == ()


def test_behind_a_product_in_eight_bits_it_stays() -> None:
    proto = model()
    pair = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["q"], "input/quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"], "input/dequantize"),
    ]
    nodes = [*pair, *proto.graph.node]
    nodes[2].input[0] = "x"
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert spell_quantizers(loaded(proto)) == ()


def test_it_is_taken_back() -> None:
    changed = loaded(model(("Gemm", "Relu")))
    spell_quantizers(changed)
    assert join_quantizers(changed) == ("fc/act/quantize",)
    assert join_quantizers(changed) == ()
    (quantize,) = (node for node in changed.graph if node.op_type == "QuantizeLinear")
    assert quantize.name == "fc/act/quantize"
    assert [node.op_type for node in changed.graph] == ["Gemm", "Relu", "QuantizeLinear", "DequantizeLinear"]
    x = numbers()
    np.testing.assert_array_equal(run(as_proto(changed), x), run(model(("Gemm", "Relu")), x))


def test_a_cast_of_other_numbers_is_no_quantizer() -> None:
    changed = loaded(model(("Gemm",)))
    spell_quantizers(changed)
    graph = changed.graph
    shift = graph.initializers["spelt_quantize.shift"]
    shift.const_value = ir.Tensor(np.array(2.0, np.float32), name=shift.name)
    assert join_quantizers(changed) == ()

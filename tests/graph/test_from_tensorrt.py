"""The form for TensorRT taken back: the same nodes, the same weights and the same numbers as in the form for a CPU."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from spach_deploy.bundle.schema import Form
from spach_deploy.graph.editing import as_proto, tensor_of
from spach_deploy.graph.passes import CPU_PASSES, FROM_TENSORRT_PASSES, TENSORRT_PASSES, apply_passes
from spach_deploy.graph.precision.typed_graph import type_graph
from spach_deploy.graph.precision.untyped import untyped_graph
from spach_deploy.options.specs import Precision
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from tests import static_models
from tests.blocks import test_families as families
from tests.static_models import relative_l2

KINDS = ("mlp_shared", "hybrid", "mixed", "smlpnet", "shiftvit")
BACK = FROM_TENSORRT_PASSES[Form.CPU]


def canonical(kind: str) -> ir.Model:
    if kind in families.FAMILIES:
        return families.canonical(kind)
    return ir.from_proto(onnx.load_from_string(static_models.canonical_bytes(kind)))


def images(kind: str) -> NDArray[np.float32]:
    return families.images(3) if kind in families.FAMILIES else static_models.images(3)


def run(graph: ir.Model, batch: NDArray[np.float32]) -> NDArray[np.float32]:
    with OnnxRuntimeRunner(as_proto(graph).SerializeToString(), threads=1) as runner:
        result: NDArray[np.float32] = runner.run({"input": batch})["logits"]
    return result


def computing(graph: ir.Model) -> Counter[str]:
    """Nodes by operator, without moves."""
    return Counter(node.op_type for node in graph.graph if node.op_type not in ("Reshape", "Transpose"))


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_lead_to_the_same_graph(kind: str) -> None:
    there, straight = canonical(kind), canonical(kind)
    forward = apply_passes(there, TENSORRT_PASSES)
    apply_passes(straight, CPU_PASSES)
    before = run(there, images(kind))
    back = apply_passes(there, BACK)
    for name in ("spell_first_norm", "split_group_norm", "shift_depthwise", "axis_products", "tokens_first"):
        assert len(back[name]) == len(forward[name]), name
    assert relative_l2(run(there, images(kind)), before) < 2e-6
    assert relative_l2(run(there, images(kind)), run(straight, images(kind))) < 2e-6
    if kind != "smlpnet":  # its biases along the axes stay behind the sum
        assert computing(there) == computing(straight)
    onnx.checker.check_model(as_proto(there))


@pytest.mark.parametrize("kind", ["hybrid", "smlpnet"])
def test_weights_are_those_that_were_there_bit_by_bit(kind: str) -> None:
    before, there = canonical(kind), canonical(kind)
    weights = {name: tensor_of(value).numpy().copy() for name, value in before.graph.initializers.items()}
    apply_passes(there, TENSORRT_PASSES)
    apply_passes(there, BACK)
    found = {name: tensor_of(value).numpy() for name, value in there.graph.initializers.items()}
    kernels = [name for name, value in weights.items() if value.ndim == 4 and value.shape[1:] == (1, 3, 3)]
    assert kernels
    for name in kernels:
        np.testing.assert_array_equal(found[name], weights[name])
    if kind == "smlpnet":
        fused = [name for name, value in weights.items() if value.ndim == 2 and value.shape[1] == 3 * value.shape[0]]
        assert fused
        for name in fused:
            np.testing.assert_array_equal(found[name], weights[name])


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16])
def test_types_come_off_and_go_on_without_a_bit_lost(precision: Precision) -> None:
    exact = canonical("hybrid")
    apply_passes(exact, TENSORRT_PASSES)
    typed = type_graph(exact, precision).model
    again = type_graph(untyped_graph(typed), precision).model
    assert [(node.op_type, node.name) for node in again.graph] == [(node.op_type, node.name) for node in typed.graph]
    assert [value.name for value in again.graph.outputs] == ["logits"]
    for name, value in typed.graph.initializers.items():
        other = again.graph.initializers[name]
        assert other.dtype == value.dtype
        assert tensor_of(other).tobytes() == tensor_of(value).tobytes(), name


def test_a_shifted_sum_that_was_edited_is_left_alone() -> None:
    graph = canonical("conv")
    apply_passes(graph, TENSORRT_PASSES)
    first = next(node for node in graph.graph if node.op_type == "Slice")
    for index, label in ((1, "start_11"), (2, "end_11")):  # the tap of the corner reads the centre
        first.replace_input_with(index, graph.graph.initializers[f"shift.{label}"])
    before = run(graph, images("conv"))
    changed = apply_passes(graph, BACK)["shift_depthwise"]
    assert len(changed) == 2  # of three
    assert relative_l2(run(graph, images("conv")), before) < 2e-6


def test_products_along_axes_that_hold_anything_else_are_left_alone() -> None:
    graph = canonical("smlpnet")
    apply_passes(graph, TENSORRT_PASSES)
    name = next(name for name in graph.graph.initializers if name.endswith(".both"))
    values = tensor_of(graph.graph.initializers[name]).numpy().copy()
    values[3, 5] += 1e-3
    graph.graph.initializers[name].const_value = ir.Tensor(values, name=name)
    before = run(graph, images("smlpnet"))
    assert len(apply_passes(graph, BACK)["axis_products"]) == 2  # of three
    assert relative_l2(run(graph, images("smlpnet")), before) < 2e-6


def test_an_attention_that_something_else_reads_is_left_alone() -> None:
    graph = canonical("hybrid")
    apply_passes(graph, TENSORRT_PASSES)
    softmax = next(node for node in graph.graph if node.op_type == "Softmax")
    spare = ir.node("Identity", [softmax.outputs[0]], outputs=[ir.val("weights")], name="spare")
    graph.graph.append(spare)
    assert len(apply_passes(graph, BACK)["tokens_first"]) == 4  # of five

"""Ranges are what the tensors reach, and nothing that is not finite escapes."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from spach_deploy.common.errors import ImageError, MissingPackageError
from tests.graph.precision.graphs import Array, array, batches, feed, graph, measured, node, target_graph
from tests.protos import RangeMeter, mark_float32, measurable, measure_ranges
from tests.static_models import canonical_bytes


def test_ranges_are_the_largest_magnitudes() -> None:
    model = graph(
        [node("Mul", ["input", "w"], "a/Mul"), node("Add", ["a/Mul", "b"], "a/Add")],
        ["a/Add"],
        w=array(1, -2, 3, 4),
        b=array(0, 0, 0, 100),
    )
    ranges = measured(model, [1, 2, 3, 4], [0, 0, -9, 0])
    assert ranges.max_abs == {"input": 9.0, "a/Mul": 27.0, "a/Add": 116.0}
    assert list(ranges.max_abs) == ["input", "a/Mul", "a/Add"]
    assert ranges.images == 2


def test_views_have_the_range_of_what_they_show_without_being_measured() -> None:
    model = graph(
        [
            node("Mul", ["input", "w"], "a/Mul"),
            node("Reshape", ["a/Mul", "shape"], "a/Reshape"),
            node("Split", ["a/Reshape"], "a/Split", ["a/Split.0", "a/Split.1"], axis=2, num_outputs=2),
            node("Pad", ["a/Split.0", "pads"], "a/Pad"),
            node("Concat", ["a/Pad", "a/Pad"], "a/Concat", axis=0),
            node("Softmax", ["a/Concat"], "a/Softmax"),
        ],
        ["a/Softmax"],
        w=array(2, 2, 2, 2),
        shape=np.array([0, 2, 2]),
        pads=np.array([0, 1, 0, 0, 1, 0]),
    )
    assert list(measurable(model)) == ["a/Mul"]
    ranges = measured(model, [1, 2, 3, -4]).max_abs
    views = ("a/Reshape", "a/Split.0", "a/Split.1", "a/Pad", "a/Concat")
    assert [ranges[name] for name in views] == [8.0] * 5
    assert ranges["a/Softmax"] == 1.0


def test_padding_with_a_number_is_measured() -> None:
    model = graph(
        [node("Pad", ["input", "pads", "value"], "a/Pad")],
        ["a/Pad"],
        pads=np.array([0, 1, 0, 1]),
        value=np.array(50, np.float32),
    )
    assert measured(model, [1, 2, 3, 4]).max_abs["a/Pad"] == 50.0


def test_images_are_streamed() -> None:
    """A batch is let go before the next but one is asked for, and nothing of its size leaves the graph."""
    model = onnx.load_from_string(canonical_bytes("hybrid"))
    alive: list[weakref.ref[object]] = []

    def stream() -> Iterator[dict[str, Array]]:
        for _ in range(4):
            gc.collect()
            assert sum(reference() is not None for reference in alive) <= 1
            batch = batches(4)[0]
            alive.append(weakref.ref(batch["input"]))
            yield batch

    assert measure_ranges(model, stream()).images == 16
    meter = RangeMeter(model)
    scalars = meter._session.get_outputs()[len(model.graph.output) :]
    assert scalars
    assert all(output.shape == [] for output in scalars)


def test_a_meter_hands_out_the_graphs_own_outputs() -> None:
    model = graph([node("Relu", ["input"], "a/Relu")], ["a/Relu"])
    outputs = RangeMeter(model).run(feed([1, -2, 3, -4]))
    assert list(outputs) == ["a/Relu"]
    np.testing.assert_array_equal(outputs["a/Relu"], [[1, 0, 3, 0]])


def test_outputs_are_looked_at_even_when_nothing_else_is() -> None:
    model = graph([node("Abs", ["input"], "a/Abs"), node("Neg", ["a/Abs"], "a/Neg")], ["a/Neg"])
    meter = RangeMeter(model, tensors=())
    meter.run(feed([1, -2, 3, -4]))
    assert meter.ranges().max_abs == {"input": 4.0, "a/Neg": 4.0}


def test_inner_tensors_of_marked_nodes_are_left_out_and_what_they_hand_on_is_not() -> None:
    square = mark_float32(node("Mul", ["input", "input"], "a/Mul"))
    total = mark_float32(node("Add", ["a/Mul", "a/Mul"], "a/Add"))
    model = graph([square, total, node("Relu", ["a/Add"], "b/Relu")], ["b/Relu"])
    assert list(measurable(model)) == ["a/Add", "b/Relu"]


def test_ranges_of_one_form_of_a_graph_serve_another() -> None:
    """Measured with depthwise convolutions, used with shifted products: what both have is known, views follow."""
    plain = measure_ranges(onnx.load_from_string(canonical_bytes("hybrid")), batches())
    shifted = target_graph("hybrid")
    known = plain.completed(ir.from_proto(shifted)).max_abs
    unmarked = set(measurable(shifted))
    assert unmarked <= known.keys()


@pytest.mark.parametrize(
    ("rows", "bad"),
    [([1e30, 1, 1, 1], "a/Mul"), ([float("nan"), 1, 1, 1], "input"), ([1e20, 1e20, 0, 0], "b/MatMul")],
    ids=["infinity", "NaN that came in", "NaN that came of infinities inside an operator"],
)
def test_the_first_tensor_that_is_not_finite_is_known(rows: list[float], bad: str) -> None:
    model = graph(
        [
            node("Mul", ["input", "w"], "a/Mul"),
            node("MatMul", ["a/Mul", "m"], "b/MatMul"),
            node("Relu", ["b/MatMul"], "c/Relu"),
        ],
        ["c/Relu"],
        w=array(1e9, 1e9, 1, 1),
        m=np.array([[1e30], [-1e30], [1], [1]], np.float32),
    )
    assert measured(model, rows).first_non_finite == bad


def test_no_images_is_an_error() -> None:
    with pytest.raises(ImageError, match="No images"):
        measure_ranges(graph([node("Relu", ["input"], "a/Relu")], ["a/Relu"]), [])


def test_without_onnxruntime_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'spach-deploy\[cpu\]'"):
        RangeMeter(graph([node("Relu", ["input"], "a/Relu")], ["a/Relu"]))

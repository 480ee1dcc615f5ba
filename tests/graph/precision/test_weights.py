"""Weights that a format cannot hold are counted, and those that would become other weights are not used."""

from __future__ import annotations

import numpy as np
import pytest

from spach_deploy.common.errors import PrecisionError
from spach_deploy.graph.precision.decision import LOST, encode
from spach_deploy.graph.precision.formats import BF16, FP16
from spach_deploy.options.specs import Precision
from tests.graph.precision.graphs import Array, array, graph, kept_for, measured, node
from tests.protos import TypedGraph, decode, initializers, type_graph


def test_each_misfit_is_counted() -> None:
    values = array(70000, -70000, 1e-9, 1e-9, 1e-9, 3e-6, 0, 1)
    bits, report = encode("w", values, FP16)
    assert (report.count, report.overflow, report.underflow, report.subnormal) == (8, 2, 3, 1)
    assert report.max_abs == 70000
    assert report.error == float("inf")
    np.testing.assert_array_equal(FP16.decode(bits), FP16.round(values))


def test_counts_do_not_depend_on_how_large_a_tensor_is() -> None:
    values = np.random.default_rng(0).standard_normal((300, 1000)).astype(np.float32) * np.float32(1e-6)
    bits, report = encode("w", values, FP16)
    rounded = FP16.round(values)
    assert bits.shape == values.shape
    assert report.underflow == np.count_nonzero((rounded == 0) & (values != 0))
    assert report.subnormal == np.count_nonzero((rounded != 0) & (np.abs(rounded) < FP16.smallest_normal))
    error = np.linalg.norm(rounded.astype(np.float64) - values) / np.linalg.norm(values.astype(np.float64))
    assert report.error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-34, 1e-20, 1.0, 1e20, 1e37])
def test_the_error_of_rounding_is_right_at_every_magnitude(scale: float) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * np.float32(scale)
    _, report = encode("w", values, BF16)
    rounded = BF16.round(values).astype(np.float64)
    assert report.error == pytest.approx(
        np.linalg.norm(rounded - values) / np.linalg.norm(values.astype(np.float64)), rel=1e-3
    )
    assert report.overflow == report.underflow == 0


def test_zeros_are_no_underflow() -> None:
    _, report = encode("w", array(0, -0.0, 0), FP16)
    assert (report.underflow, report.subnormal, report.error) == (0, 0, 0.0)


def gemm(weight: Array, bias: Array | None = None) -> TypedGraph:
    """A linear layer over `input`, typed for FP16."""
    bias = np.zeros(weight.shape[1], np.float32) if bias is None else bias
    model = graph(
        [node("Gemm", ["input", "fc.weight", "fc.bias"], "fc/Gemm"), node("Relu", ["fc/Gemm"], "act/Relu")],
        ["act/Relu"],
        fc__weight=weight,
        fc__bias=bias,
    )
    return type_graph(model, Precision.FP16, measured(model, [1e-3, 1e-3, 1e-3, 1e-3]))


def ordinary() -> Array:
    return np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32)


@pytest.mark.parametrize(
    "spoil",
    [lambda w: np.where(w > 2, 1e5, w), lambda w: w * 1e-9],
    ids=["one overflows", "all underflow"],
)
def test_lost_weights_keep_their_layer_in_fp32(spoil: object) -> None:
    weight = spoil(ordinary()).astype(np.float32)  # type: ignore[operator]
    typed = gemm(weight)
    (kept,) = typed.policy.kept
    assert (kept.node, kept.module, kept.reason, kept.tensor) == ("fc/Gemm", "fc", "weight", "fc.weight")
    np.testing.assert_array_equal(decode(initializers(typed.model.graph)["fc.weight"]), weight)
    assert [report.tensor for report in typed.policy.weights.notable] == ["fc.weight"]
    assert "fc.weight" in str(kept)


def test_some_small_weights_among_large_ones_are_reported_and_rounded() -> None:
    weight = ordinary()
    weight[0] = 1e-9
    typed = gemm(weight)
    assert not typed.policy.kept
    (report,) = typed.policy.weights.notable
    assert (report.tensor, report.underflow) == ("fc.weight", 100)
    assert report.error < LOST
    assert typed.policy.weights.underflow == 100


def test_a_tiny_bias_is_no_reason_for_fp32() -> None:
    assert not gemm(ordinary(), np.full(100, 1e-9, np.float32)).policy.kept


def test_an_overflowing_bias_is() -> None:
    (kept,) = kept_for(gemm(ordinary(), np.full(100, 1e5, np.float32)), "weight")
    assert kept.tensor == "fc.bias"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_damaged_weights_are_refused_by_name(value: float) -> None:
    with pytest.raises(PrecisionError, match=r"fc\.weight"):
        encode("fc.weight", array(1, value, 2), FP16)

"""A typed graph with every tensor rounded: overflow shows where ONNX Runtime would hide it, and typing prevents it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto

from spach_deploy.common.errors import PrecisionError, UnavailableError
from spach_deploy.graph.editing import owner
from spach_deploy.graph.precision import rounding
from spach_deploy.graph.precision.decision import TypingOptions
from spach_deploy.graph.precision.formats import BF16, FP16
from spach_deploy.graph.precision.ranges import Ranges
from spach_deploy.graph.precision.rounding import check_runtime_rounds
from spach_deploy.options.specs import IODtype, Precision
from tests.graph.precision.graphs import KINDS, array, batches, feed, graph, kept_for, node, target_graph, types_of
from tests.protos import TypedGraph, measure_ranges, rounded_graph, type_graph
from tests.static_models import images, logits, relative_l2, small_model

STREAM_LIMIT = 2e-3
"""Relative L2 that a scaled stream may cost: PyTorch in half loses 0.8e-3 to 1.4e-3 on the unscaled models."""


def run(model: ModelProto, feeds: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: list[Any] = session.run(None, feeds)
    return result


@functools.cache
def ranges_of(kind: str, scale: float) -> Ranges:
    return measure_ranges(target_graph(kind, scale), batches(), threads=1)


def typed(kind: str, precision: Precision, scale: float = 1.0, **options: Any) -> TypedGraph:
    return type_graph(target_graph(kind, scale), precision, ranges_of(kind, scale), TypingOptions(**options))


@functools.cache
def torchs_own_error(kind: str, dtype: torch.dtype) -> float:
    """What PyTorch itself loses in a half precision, on the same images."""
    model, batch = small_model(kind), images(8)
    with torch.inference_mode():
        half = copy.deepcopy(model).to(dtype)(torch.from_numpy(batch).to(dtype)).float().numpy()
    return relative_l2(half, logits(model, batch))


def rounding_error(exact: ModelProto, half: ModelProto) -> float:
    """Relative L2 of the typed graph, every tensor rounded, from the FP32 graph; NaN or infinite where it overflows."""
    batch = images(8)
    with np.errstate(invalid="ignore", over="ignore"):
        return relative_l2(run(rounded_graph(half), {"input": batch})[0], run(exact, {"input": batch})[0])


def test_the_twin_rounds_every_tensor_and_weight() -> None:
    model = graph(
        [node("Mul", ["input", "w"], "a/Mul"), node("Add", ["a/Mul", "input"], "a/Add")],
        ["a/Add"],
        w=array(1 / 3, 1e-5, 3, 1e-9),
    )
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    for precision, form in ((Precision.FP16, FP16), (Precision.BF16, BF16)):
        twin = rounded_graph(type_graph(model, precision).model)
        product = form.round(form.round(x) * form.round(array(1 / 3, 1e-5, 3, 1e-9)))
        np.testing.assert_array_equal(run(twin, {"input": x})[0], form.round(product + form.round(x)))


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_an_ordinary_model_loses_what_pytorch_loses(kind: str, precision: Precision) -> None:
    dtype = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}[precision]
    assert 0 < rounding_error(target_graph(kind), typed(kind, precision).model) <= 1.5 * torchs_own_error(kind, dtype)


@pytest.mark.parametrize("kind", ["hybrid", "ms_mlp"])
def test_onnxruntime_executes_the_fp16_graph(kind: str) -> None:
    batch = images(4)
    result = run(typed(kind, Precision.FP16).model, {"input": batch})[0]
    assert result.dtype == np.float32
    assert relative_l2(result, logits(small_model(kind), batch)) <= 1.5 * torchs_own_error(kind, torch.float16)


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("kind", ["hybrid", "ms_mlp"])
def test_a_scaled_stream_is_right_in_fp16(kind: str, scale: float) -> None:
    """The scaled graph is the same function, so its rounded twin is also held against the unscaled model."""
    model, half = target_graph(kind, scale), typed(kind, Precision.FP16, scale)
    assert rounding_error(model, half.model) <= STREAM_LIMIT
    batch = images(4)
    twin = run(rounded_graph(half.model), {"input": batch})[0]
    assert relative_l2(twin, logits(small_model(kind), batch)) <= STREAM_LIMIT
    if scale > 1e3:  # a thousandfold stream may fit, margin and all
        assert kept_for(half, "range")


@pytest.mark.parametrize("kind", ["hybrid", "ms_mlp"])
def test_with_a_stream_in_fp32_the_branches_stay_half(kind: str) -> None:
    half = typed(kind, Precision.FP16, 1e6)
    types = types_of(half.model)
    for name, made in types.items():
        if owner(name).endswith((".qkv", ".channel_func.fc1", ".act", "spatial_func.fc1")) and "/to_" not in name:
            assert made == "fp16", name
    large = [kept for kept in half.policy.kept if kept.max_abs is not None and kept.max_abs > 1e6]
    assert {"layer1.0/Add", "norm1/LayerNormalization"} <= {kept.node for kept in large}


@pytest.mark.parametrize("kind", ["hybrid", "ms_mlp"])
@pytest.mark.parametrize("naive", ["without ranges", "without margin"])
def test_what_the_guard_prevents_is_real(kind: str, naive: str) -> None:
    """The same stream with everything cast to half."""
    model = target_graph(kind, 1e6)
    ranges = None if naive == "without ranges" else ranges_of(kind, 1e6)
    half = type_graph(model, Precision.FP16, ranges, TypingOptions(margin=1e-9))
    assert not rounding_error(model, half.model) <= STREAM_LIMIT


def test_bfloat16_needs_no_islands_for_a_scaled_stream() -> None:
    half = typed("hybrid", Precision.BF16, 1e6)
    assert not kept_for(half, "range")
    error = rounding_error(target_graph("hybrid", 1e6), half.model)
    assert error <= 1.5 * torchs_own_error("hybrid", torch.bfloat16)


def test_a_stream_beyond_fp32_is_refused_by_name() -> None:
    model = target_graph("hybrid", 1e38)
    with pytest.raises(PrecisionError, match="not finite in FP32 already"):
        type_graph(model, Precision.FP16, measure_ranges(model, batches(4), threads=1))


def test_the_twin_shows_what_onnxruntime_hides() -> None:
    """4e4 * 4 is beyond FP16. On the typed graph itself ONNX Runtime 1.32 answers 160.06: it keeps FP32 in between."""
    model = graph(
        [
            node("Softplus", ["input"], "a/Softplus"),
            node("Mul", ["a/Softplus", "up"], "a/Mul"),
            node("Softplus", ["a/Mul"], "b/Softplus"),
            node("Mul", ["b/Softplus", "down"], "b/Mul"),
        ],
        ["b/Mul"],
        up=array(4e4, 1, 1, 1),
        down=array(1e-3, 1, 1, 1),
    )
    half = type_graph(model, Precision.FP16).model
    assert np.isinf(run(rounded_graph(half), feed([4, 3, 2, 1]))[0][0, 0])


@pytest.mark.parametrize("precision", [precision for precision in Precision if not precision.is_quantized])
def test_a_twin_takes_and_gives_what_the_typed_graph_does(precision: Precision) -> None:
    half = typed("hybrid", precision, io_dtype=IODtype.FP16).model
    twin = rounded_graph(half)
    onnx.checker.check_model(twin, full_check=True)
    assert list(twin.graph.input) == list(half.graph.input)
    assert list(twin.graph.output) == list(half.graph.output)
    result = run(twin, {"input": images(2).astype(np.float16)})[0]
    assert result.dtype == np.float16
    assert 0 < relative_l2(result, logits(small_model("hybrid"), images(2))) < 0.02


def test_a_twin_is_fp32_but_for_its_roundings() -> None:
    twin = rounded_graph(typed("hybrid", Precision.BF16).model)
    assert {t.data_type for t in twin.graph.initializer} == {TensorProto.FLOAT, TensorProto.INT64}
    for name, made in types_of(twin).items():
        assert made in ("fp32", "other") or name.endswith("/bf16"), name


def test_a_runtime_that_drops_roundings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful:
        def run(self, names: object, feeds: dict[str, Any]) -> list[Any]:
            return [feeds["x"] * 2]

    check_runtime_rounds.cache_clear()
    monkeypatch.setattr(rounding, "open_session", lambda model, threads=None: Forgetful())
    with pytest.raises(UnavailableError, match="removes roundings"):
        check_runtime_rounds()
    monkeypatch.undo()
    check_runtime_rounds()

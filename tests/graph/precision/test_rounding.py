"""The proof by rounding: overflow shows where ONNX Runtime would hide it, and the policy prevents it."""

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

from spach_deploy.common.errors import ImageError, PrecisionError, UnavailableError
from spach_deploy.graph.names import owner
from spach_deploy.graph.precision import rounding
from spach_deploy.graph.precision.decision import TypingOptions
from spach_deploy.graph.precision.formats import BF16, FP16
from spach_deploy.graph.precision.ranges import Ranges, measure_ranges
from spach_deploy.graph.precision.rounding import check_runtime_rounds, prove_policy, rounded_graph
from spach_deploy.graph.precision.typed_graph import TypedGraph, type_graph
from spach_deploy.options.specs import IODtype, Precision
from tests.graph.precision.graphs import KINDS, array, batches, feed, graph, measured, node, target_graph, types_of
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
    proof = prove_policy(target_graph(kind), typed(kind, precision).model, batches(), threads=1)
    assert proof.finite
    assert proof.first_bad is proof.module is None
    assert proof.images == 8
    dtype = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}[precision]
    assert 0 < proof.worst <= 1.5 * torchs_own_error(kind, dtype)


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
    proof = prove_policy(model, half.model, batches(), threads=1)
    assert proof.finite
    assert proof.worst <= STREAM_LIMIT
    batch = images(4)
    twin = run(rounded_graph(half.model), {"input": batch})[0]
    assert relative_l2(twin, logits(small_model(kind), batch)) <= STREAM_LIMIT
    if scale > 1e3:  # a thousandfold stream may fit, margin and all
        assert half.policy.kept_for("range")


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
    """The same stream with everything cast to half: the proof names the first tensor that overflows and its module."""
    model = target_graph(kind, 1e6)
    ranges = None if naive == "without ranges" else ranges_of(kind, 1e6)
    half = type_graph(model, Precision.FP16, ranges, TypingOptions(margin=1e-9))
    proof = prove_policy(model, half.model, batches(), threads=1)
    assert not proof.finite
    assert proof.first_bad is not None
    assert proof.module in {"layer1.0.cpe_net.net.1", "layer1.0.cpe_net", "norm1", "layer1.0"}
    assert not proof.worst <= STREAM_LIMIT


def test_bfloat16_needs_no_islands_for_a_scaled_stream() -> None:
    half = typed("hybrid", Precision.BF16, 1e6)
    assert not half.policy.kept_for("range")
    proof = prove_policy(target_graph("hybrid", 1e6), half.model, batches(), threads=1)
    assert proof.finite
    assert proof.worst <= 1.5 * torchs_own_error("hybrid", torch.bfloat16)


def test_a_stream_beyond_fp32_is_refused_by_name() -> None:
    model = target_graph("hybrid", 1e38)
    with pytest.raises(PrecisionError, match="not finite in FP32 already"):
        type_graph(model, Precision.FP16, measure_ranges(model, batches(4), threads=1))


def planted(*, hidden: bool) -> ModelProto:
    """A sum that overflows in FP16; hidden: as the score that a softmax turns into zero."""
    nodes = [node("Mul", ["input", "w"], "block/Mul"), node("Add", ["block/Mul", "block/Mul"], "block/Add")]
    last = "Softmax" if hidden else "Relu"
    return graph([*nodes, node(last, ["block/Add"], f"last/{last}")], [f"last/{last}"], w=array(-4e4, 1, 1, 1))


@pytest.mark.parametrize("hidden", [False, True])
def test_a_planted_overflow_is_found_though_outputs_are_finite(hidden: bool) -> None:
    model = planted(hidden=hidden)
    half = type_graph(model, Precision.FP16).model
    proof = prove_policy(model, half, [feed([1, 2, 3, 4])])
    assert np.isfinite(run(rounded_graph(half), feed([1, 2, 3, 4]))[0]).all()
    assert (proof.finite, proof.first_bad, proof.module) == (False, "block/Add", "block")
    guarded = type_graph(model, Precision.FP16, measured(model, [1, 2, 3, 4])).model
    assert prove_policy(model, guarded, [feed([1, 2, 3, 4])]).finite


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
    assert prove_policy(model, half, [feed([4, 3, 2, 1])]).first_bad == "a/Mul"


def test_an_overflowing_weight_is_named() -> None:
    model = graph([node("Mul", ["input", "fc.w"], "fc/Mul")], ["fc/Mul"], fc__w=array(1, 1, 1, 1))
    half = type_graph(model, Precision.FP16).model
    half.graph.initializer[0].CopyFrom(FP16.tensor("fc.w", FP16.encode(array(1, 1, 1, 1e6))))
    proof = prove_policy(model, half, [feed([1, 2, 3, 4])])
    assert (proof.finite, proof.first_bad, proof.module) == (False, "fc.w", "fc")


@pytest.mark.parametrize("precision", [precision for precision in Precision if not precision.is_quantized])
def test_a_twin_takes_and_gives_what_the_typed_graph_does(precision: Precision) -> None:
    half = typed("hybrid", precision, io_dtype=IODtype.FP16).model
    twin = rounded_graph(half)
    onnx.checker.check_model(twin, full_check=True)
    assert list(twin.graph.input) == list(half.graph.input)
    assert list(twin.graph.output) == list(half.graph.output)
    result = run(twin, {"input": images(2).astype(np.float16)})[0]
    assert result.dtype == np.float16
    proof = prove_policy(target_graph("hybrid"), half, batches(4))
    assert proof.finite
    assert 0 < proof.worst < 0.02


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


def test_a_proof_needs_images() -> None:
    model = planted(hidden=False)
    with pytest.raises(ImageError):
        prove_policy(model, type_graph(model, Precision.FP16).model, [])

"""From distributions to scales, held against brute force; and what a scale stores, against ONNX Runtime and PyTorch."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from spach_deploy.quantization.formats import FP8, INT8, EightBitFormat
from spach_deploy.quantization.scales import SMALLEST, Method, clipped_at, expected_error, store, weight_scales
from spach_deploy.quantization.statistics import BINS, CENTERS, TensorStatistics, mixture

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

BIN = 2.0**-4
"""Largest relative width of a bin."""

COUNT = 50_000

both = pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])


def normal() -> Float32:
    return np.random.default_rng(1).standard_normal(COUNT).astype(np.float32)


def uniform() -> Float32:
    return np.random.default_rng(2).uniform(-3, 3, COUNT).astype(np.float32)


def heavy_tailed() -> Float32:
    return np.random.default_rng(3).standard_t(2.5, COUNT).astype(np.float32)


def constant() -> Float32:
    return np.full(COUNT, 0.37, np.float32)


def one_outlier() -> Float32:
    values = normal()
    values[17] = 200.0
    return values


DATA = {data.__name__: data for data in (normal, uniform, heavy_tailed, constant, one_outlier)}
all_data = pytest.mark.parametrize("name", DATA)
varied_data = pytest.mark.parametrize("name", ["normal", "uniform", "heavy_tailed", "one_outlier"])


@functools.cache
def counted(name: str) -> tuple[Float64, float]:
    statistics = TensorStatistics.empty(1, histogram=True)
    statistics.see(DATA[name]().reshape(-1, 1))
    return mixture(statistics, np.ones(1)), float(statistics.max_abs[0])


def clip(method: Method, name: str, form: EightBitFormat = INT8) -> float:
    histogram, largest = counted(name)
    return clipped_at(method, histogram, largest, form)


def squared_error(values: Float32, clip: float, form: EightBitFormat) -> float:
    """Mean squared error of really storing `values`."""
    stored = store(values, form.scale_of(clip), form).astype(np.float64)
    return float(np.mean((stored - values) ** 2))


# Methods


@all_data
@both
def test_max_clips_nothing(name: str, form: EightBitFormat) -> None:
    assert clip(Method.MAX, name, form) == np.abs(DATA[name]()).max()


@all_data
def test_percentile_clips_one_in_ten_thousand_within_a_bin(name: str) -> None:
    exact = float(np.quantile(np.abs(DATA[name]()), 1 - 1e-4, method="inverted_cdf"))
    assert exact <= clip(Method.PERCENTILE, name) * (1 + 1e-6)
    assert clip(Method.PERCENTILE, name) <= exact * (1 + BIN) * (1 + 1e-6)


@varied_data
@both
def test_mse_finds_the_least_error_that_brute_force_finds(name: str, form: EightBitFormat) -> None:
    values = DATA[name]()
    largest = float(np.abs(values).max())
    least = min(squared_error(values, largest * share, form) for share in np.exp2(-np.arange(0, 65) / 16))
    assert squared_error(values, clip(Method.MSE, name, form), form) <= 1.1 * least


@both
@pytest.mark.parametrize("method", Method)
def test_a_constant_is_held_to_half_a_step(method: Method, form: EightBitFormat) -> None:
    held = min(clip(method, "constant", form), form.limit * form.scale_of(clip(method, "constant", form)))
    step = form.scale_of(held) * float(form.step(np.array(0.99 * form.limit)))
    assert squared_error(constant(), held, form) ** 0.5 <= 0.501 * step


@all_data
@both
def test_mse_is_never_worse_than_max_by_its_own_count(name: str, form: EightBitFormat) -> None:
    histogram, largest = counted(name)
    errors = [
        expected_error(histogram, np.minimum(CENTERS, largest), form.scale_of(clip(method, name, form)), form)
        for method in (Method.MSE, Method.MAX)
    ]
    assert errors[0] <= errors[1]


@varied_data
@both
def test_mse_is_never_worse_than_max_on_the_numbers_themselves(name: str, form: EightBitFormat) -> None:
    values = DATA[name]()
    errors = [squared_error(values, clip(method, name, form), form) for method in (Method.MSE, Method.MAX)]
    assert errors[0] <= 1.02 * errors[1]


def test_expected_errors_are_those_of_storing() -> None:
    for form, name, share in (
        (INT8, "normal", 1.0),
        (INT8, "normal", 0.5),
        (FP8, "normal", 1.0),
        (INT8, "uniform", 0.8),
    ):
        histogram, largest = counted(name)
        scale = form.scale_of(share * largest)
        expected = expected_error(histogram, CENTERS, scale, form) / COUNT
        assert expected == pytest.approx(squared_error(DATA[name](), share * largest, form), rel=0.05)


def kullback_leibler(values: Float32, clip: float) -> float:
    """Between the distribution of |x|, clipped, and its form in 128 levels; on bins as fine as TensorRT's."""
    width = float(np.abs(values).max()) / 2048
    counts = np.histogram(np.abs(values), 2048, (0, 2048 * width))[0].astype(float)
    size = round(clip / width)
    p = counts[:size].copy()
    p[-1] += counts[size:].sum()
    q = np.zeros(size)
    for level in np.array_split(np.arange(size), 128):
        present = level[counts[level] > 0]
        q[present] = counts[level].sum() / max(len(present), 1)
    used = p > 0
    p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-12)
    return float(np.sum(p[used] * np.log(p[used] / q[used])))


@pytest.mark.parametrize("name", ["normal", "uniform", "one_outlier"])
def test_entropy_finds_about_the_least_divergence(name: str) -> None:
    values = DATA[name]()
    largest = float(np.abs(values).max())
    divergences = [kullback_leibler(values, largest * size / 2048) for size in range(128, 2049, 16)]
    found = kullback_leibler(values, clip(Method.ENTROPY, name))
    assert found <= min(divergences) + 0.1 * (max(divergences) - min(divergences))


def test_entropy_halves_the_divergence_of_a_heavy_tail() -> None:
    """Its last numbers stand alone, and bins spread them, so it is not the least."""
    values = heavy_tailed()
    largest = float(np.abs(values).max())
    assert kullback_leibler(values, clip(Method.ENTROPY, "heavy_tailed")) < kullback_leibler(values, largest) / 2


def test_percentile_and_entropy_clip_an_outlier_and_mse_where_that_is_cheaper() -> None:
    assert clip(Method.PERCENTILE, "one_outlier") < 5
    assert clip(Method.ENTROPY, "one_outlier") < 200 / 7
    assert 50 < clip(Method.MSE, "one_outlier") < 200


@both
@pytest.mark.parametrize("method", Method)
def test_zeros_have_no_clip(method: Method, form: EightBitFormat) -> None:
    assert clipped_at(method, np.zeros(BINS), 0.0, form) == 0.0
    zeros = np.zeros(BINS)
    zeros[0] = 100
    assert clipped_at(method, zeros, 0.0, form) == 0.0


@both
@pytest.mark.parametrize("method", Method)
def test_no_method_goes_beyond_what_was_seen(method: Method, form: EightBitFormat) -> None:
    for name in DATA:
        histogram, largest = counted(name)
        assert 0 < clipped_at(method, histogram, largest, form) <= largest
    assert clipped_at(method, None, 3.0, form) == 3.0


# Weights


@both
def test_weights_have_a_scale_for_each_output_channel_or_one(form: EightBitFormat) -> None:
    weights = np.random.default_rng(5).standard_normal((7, 3, 2, 2)).astype(np.float32)
    by_channel = weight_scales(weights, form)
    assert np.allclose(by_channel * form.limit, np.abs(weights).max(axis=(1, 2, 3)))
    single = weight_scales(weights, form, per_channel=False)
    assert single.shape == (1,)
    assert single[0] == by_channel.max()


@both
def test_channels_of_zeros_or_almost_have_scales_that_can_be_written(form: EightBitFormat) -> None:
    weights = np.array([[0, 0], [1e-30, 0], [1, -2]], np.float32)
    assert weight_scales(weights, form).tolist() == [1.0, SMALLEST, 2 / form.limit]
    stored = store(weights, weight_scales(weights, form).astype(np.float32)[:, None], form)
    assert np.isfinite(stored).all()


# What a scale stores


def stored_by_onnxruntime(values: Float32, scale: Float32, form: EightBitFormat, axis: int | None = None) -> Float32:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], axis=axis or 0),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], axis=axis or 0),
    ]
    zero = helper.make_tensor("zero", form.dtype, scale.shape, bytes(scale.size), raw=True)
    constants = [helper.make_tensor("scale", TensorProto.FLOAT, scale.shape, scale.tobytes(), raw=True), zero]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, list(values.shape)) for name in "xy")
    model = helper.make_model(
        helper.make_graph(nodes, "pair", [x], [y], constants),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: Float32 = session.run(None, {"x": values})[0]
    return result


def varied(form: EightBitFormat, scale: float) -> Float32:
    """All over the format: random ones, ties between neighbours, limits and what lies beyond, signed zeros."""
    generator = np.random.default_rng(6)
    stored = np.arange(-130, 131, dtype=np.float32)
    if form is FP8:
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
        stored = np.sort(every[np.isfinite(every)])
    ties = (stored[1:] + stored[:-1]) / 2
    limits = np.array(
        [127.4, 127.5, 127.6, -127.5, -128.0, -128.4, -129.0, 448.0, 463.9, 464.0, 480.0, 1e6], np.float32
    )
    spread = generator.standard_normal(4000).astype(np.float32) * form.limit / 3
    tiny = generator.standard_normal(200).astype(np.float32) * np.float32(0.01)
    return np.concatenate([stored, ties, limits, -limits, spread, tiny, [0.0, -0.0]]).astype(np.float32) * np.float32(
        scale
    )


@both
@pytest.mark.parametrize("scale", [1.0, 0.0625, 0.0123, 3.7e-4, 517.3])
def test_what_is_stored_is_onnxruntimes_bit_for_bit(form: EightBitFormat, scale: float) -> None:
    values = varied(form, scale)
    found, expected = store(values, scale, form), stored_by_onnxruntime(values, np.array(scale, np.float32), form)
    assert np.array_equal(found, expected)
    assert found.dtype == np.float32


@both
def test_channels_are_stored_at_their_own_scales(form: EightBitFormat) -> None:
    scales = np.array([0.5, 0.003, 7.0], np.float32)
    values = np.stack([varied(form, float(scale)) for scale in scales])
    assert np.array_equal(store(values, scales[:, None], form), stored_by_onnxruntime(values, scales, form, axis=0))


def test_ties_go_to_even_and_int8_has_one_more_below() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 300.0, -127.5, -128.0, -128.5, -300.0], np.float32)
    assert store(values, 1.0, INT8).tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, -128, -128, -128]


def test_fp8_is_torchs_e4m3_with_what_is_too_large_clipped() -> None:
    values = varied(FP8, 1.0)
    inside = np.abs(values) <= 448
    expected = torch.from_numpy(values[inside]).to(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(store(values, 1.0, FP8)[inside], expected)
    assert set(np.abs(store(values[~inside], 1.0, FP8))) == {448.0}


@both
def test_storing_twice_changes_nothing(form: EightBitFormat) -> None:
    once = store(varied(form, 0.0123), 0.0123, form)
    assert np.array_equal(store(once, 0.0123, form), once)


@both
def test_the_step_of_a_format_is_the_distance_of_its_neighbours(form: EightBitFormat) -> None:
    every = np.unique(np.abs(store(varied(form, 1.0), 1.0, form))).astype(np.float64)
    every = every[every <= form.limit]
    middles = (every[1:] + every[:-1]) / 2
    assert np.array_equal(form.step(middles), np.diff(every))

"""What is kept of tensors while images stream by: exact where it says so, within a bin elsewhere, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from spach_deploy.common.errors import PrecisionError
from spach_deploy.quantization.statistics import (
    BINS,
    CENTERS,
    EDGES,
    ROWS,
    TensorRequest,
    TensorStatistics,
    mixture,
    rows_of,
    wanted_tensors,
)
from tests.graph.precision.graphs import graph, node
from tests.protos import Collector, find_sites
from tests.quantization.small_models import canonical
from tests.static_models import images

Float32 = NDArray[np.float32]


def heavy_tailed(count: int, channels: int, seed: int = 0) -> Float32:
    """Numbers over many octaves, each channel of another size."""
    generator = np.random.default_rng(seed)
    sizes = 4.0 ** np.arange(channels)
    return (generator.standard_t(3, (count, channels)) * sizes).astype(np.float32)


def seen(rows: Float32, size: int, *, histogram: bool = True) -> TensorStatistics:
    statistics = TensorStatistics.empty(rows.shape[1], histogram=histogram)
    for start in range(0, len(rows), size):
        statistics.see(rows[start : start + size])
    return statistics


def numpy_histogram(rows: Float32) -> NDArray[np.int64]:
    """The same bins by numpy: what lies below the first or above the last edge counts in the bin there."""
    inside = np.clip(np.abs(rows), EDGES[0], np.nextafter(EDGES[-1], 0))
    return np.stack([np.histogram(channel, EDGES)[0] for channel in inside.T])


def quantile_bin(histogram: NDArray[np.float64], share: float) -> int:
    total = np.cumsum(histogram)
    return int(np.searchsorted(total, share * total[-1]))


# Streaming


@pytest.mark.parametrize("size", [1, 3, 8])
def test_batches_of_any_size_give_the_same_statistics(size: int) -> None:
    rows = heavy_tailed(480, 5)
    whole, parts = seen(rows, 480), seen(rows, size)
    assert np.array_equal(parts.max_abs, np.abs(rows).max(axis=0))
    assert np.array_equal(whole.max_abs, parts.max_abs)
    assert whole.histogram is not None
    assert parts.histogram is not None
    assert np.array_equal(whole.histogram, parts.histogram)
    assert np.allclose(parts.sums, rows.astype(np.float64).sum(axis=0), rtol=1e-5, atol=1e-5 * np.abs(rows).max())
    assert np.allclose(parts.squares, np.square(rows.astype(np.float64)).sum(axis=0), rtol=1e-5)
    assert np.allclose(parts.variance, rows.astype(np.float64).var(axis=0), rtol=1e-4)
    assert parts.count == 480


def test_a_graph_is_measured_alike_in_batches_of_1_3_and_8() -> None:
    model, batch = canonical("ms_mlp"), images(24)
    sites = find_sites(model)
    wanted = wanted_tensors(sites, [site.node for site in sites])
    collectors = []
    for size in (1, 3, 8):
        collector = Collector(model, wanted, threads=1)
        for start in range(0, 24, size):
            collector.run({"input": batch[start : start + size]})
        collectors.append(collector)
    first = collectors[0]
    assert {collector.images for collector in collectors} == {24}
    assert set(first.statistics) == {item.tensor for item in wanted}
    for other in collectors[1:]:
        for name, entry in first.statistics.items():
            found = other.statistics[name]
            assert np.allclose(found.max_abs, entry.max_abs, rtol=1e-5)  # products may be summed in another order
            assert np.allclose(found.squares, entry.squares, rtol=1e-5)
            assert found.count == entry.count
            assert found.histogram is not None
            assert entry.histogram is not None
            assert np.abs(np.cumsum(found.histogram - entry.histogram, axis=1)).max() <= 2 + 1e-4 * entry.count


@pytest.mark.parametrize("histogram", [False, True])
def test_memory_does_not_grow_with_the_number_of_images(histogram: bool) -> None:
    rows = heavy_tailed(64, 6)

    def size_after(batches: int) -> int:
        statistics = TensorStatistics.empty(6, histogram=histogram)
        for _ in range(batches):
            statistics.see(rows)
        arrays = (statistics.max_abs, statistics.sums, statistics.squares, statistics.rows, statistics.histogram)
        return sum(array.nbytes for array in arrays if array is not None)

    assert size_after(64) == size_after(1000)
    assert size_after(1000) <= 8 * 6 * (3 + ROWS / 2 + histogram * BINS)


# Histograms


def test_histograms_are_numpys() -> None:
    rows = heavy_tailed(5000, 4)
    statistics = seen(rows, 700)
    assert statistics.histogram is not None
    assert np.array_equal(statistics.histogram, numpy_histogram(rows))


def test_what_lies_on_an_edge_begins_the_bin_above_it() -> None:
    rows = EDGES[:-1].astype(np.float32).reshape(-1, 1)
    statistics = seen(rows, len(rows))
    assert statistics.histogram is not None
    assert (statistics.histogram == 1).all()


def test_zeros_denormals_and_huge_numbers_are_counted_at_the_ends() -> None:
    tiny = np.float32(2.0**-149)
    rows = np.array([[0.0], [-0.0], [tiny], [-tiny], [2.0**-21], [3e38], [-3e38], [2.0**20]], np.float32)
    statistics = seen(rows, 3)
    assert statistics.histogram is not None
    assert statistics.histogram[0, 0] == 5
    assert statistics.histogram[0, -1] == 3
    assert statistics.histogram.sum() == len(rows)
    assert statistics.max_abs[0] == np.float32(3e38)
    assert statistics.mean_square[0] == pytest.approx(2 * float(np.float32(3e38)) ** 2 / len(rows))
    assert np.isfinite(statistics.variance).all()


def test_zeros_alone() -> None:
    statistics = seen(np.zeros((10, 2), np.float32), 4)
    assert not statistics.max_abs.any()
    assert not statistics.variance.any()
    assert mixture(statistics, np.ones(2)).sum() == 20


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_the_tensors_name(wrong: float) -> None:
    model = graph([node("Sqrt", ["input"], "root")], ["root"])
    collector = Collector(model, [TensorRequest("input", -1), TensorRequest("root", -1)], threads=1)
    collector.run({"input": np.ones((2, 4), np.float32)})
    rows = np.ones((2, 4), np.float32)
    rows[1, 2] = -1.0 if np.isnan(wrong) else wrong
    with pytest.raises(PrecisionError, match="root is not finite" if np.isnan(wrong) else "input is not finite"):
        collector.run({"input": rows})


# Channels divided by factors


def divided(rows: Float32, factors: Sequence[float]) -> NDArray[np.float64]:
    histograms = numpy_histogram((rows / np.array(factors)).astype(np.float32))
    total: NDArray[np.float64] = histograms.sum(axis=0).astype(np.float64)
    return total


@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (3.0, 0.1, 57.0), (1.03, 0.97, 1.4142), (2.0**12, 1.0, 2.0**-12)])
def test_a_mixture_is_the_histogram_of_the_divided_numbers_within_a_bin(factors: tuple[float, ...]) -> None:
    rows = heavy_tailed(40_000, 3, seed=2)
    mixed = mixture(seen(rows, 10_000), np.array(factors))
    expected = divided(rows, factors)
    assert mixed.sum() == pytest.approx(expected.sum())
    for share in (0.01, 0.1, 0.5, 0.9, 0.99, 0.999):
        assert abs(quantile_bin(mixed, share) - quantile_bin(expected, share)) <= 1
    assert mixed @ CENTERS == pytest.approx(expected @ CENTERS, rel=0.01)


def test_a_mixture_without_division_is_the_histogram_itself() -> None:
    rows = heavy_tailed(2000, 3)
    assert np.array_equal(mixture(seen(rows, 500), np.ones(3)), divided(rows, (1, 1, 1)))


def test_powers_of_two_move_a_histogram_by_whole_octaves() -> None:
    rows = heavy_tailed(2000, 3)
    factors = (8.0, 0.25, 1.0)
    assert np.array_equal(mixture(seen(rows, 500), np.array(factors)), divided(rows, factors))


def test_a_mixture_counts_channels_by_their_weights() -> None:
    rows = heavy_tailed(2000, 2)
    statistics = seen(rows, 500)
    assert statistics.histogram is not None
    mixed = mixture(statistics, np.ones(2), np.array([0.0, 2.5]))
    assert np.array_equal(mixed, 2.5 * statistics.histogram[1])


def test_what_division_moves_off_the_scale_gathers_at_its_ends() -> None:
    statistics = seen(np.ones((6, 2), np.float32), 6)
    mixed = mixture(statistics, np.array([2.0**30, 2.0**-30]))
    assert (mixed[0], mixed[-1], mixed.sum()) == (6, 6, 12)


# The sample of rows


def test_sampled_rows_are_rows_of_the_data_and_of_all_of_it() -> None:
    batches, size = 400, 5
    rows = np.arange(batches * size, dtype=np.float32).repeat(3).reshape(-1, 3) + np.array([0, 0.25, 0.5], np.float32)
    statistics = seen(rows, size)
    assert statistics.rows.shape == (ROWS, 3)
    assert {tuple(row) for row in statistics.rows} <= {tuple(row) for row in rows}
    quarters = np.histogram(statistics.rows[:, 0], 4, (0, len(rows)))[0]
    assert quarters.min() > ROWS / 4 * 0.75  # 96 of 128: 3.3 standard deviations
    assert statistics.rows[:, 0].mean() == pytest.approx(len(rows) / 2, rel=0.1)


def test_fewer_rows_are_kept_of_few_batches() -> None:
    assert len(seen(heavy_tailed(12, 2), 4).rows) == 3 * 8


# Which tensors, and their channels


@pytest.mark.parametrize(("axis", "shape"), [(None, (24, 1)), (-1, (6, 4)), (2, (6, 4)), (1, (8, 3))])
def test_rows_have_one_column_for_each_channel(axis: int | None, shape: tuple[int, int]) -> None:
    tensor = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    rows = rows_of(tensor, axis)
    assert rows.shape == shape
    assert rows.flags.c_contiguous
    if axis is not None:
        for channel in range(shape[1]):
            assert set(rows[:, channel]) == set(np.take(tensor, channel, axis).ravel())


def test_a_tensor_is_measured_by_channel_where_any_site_wants_channels() -> None:
    sites = find_sites(canonical("trans"))
    by_channel = {item.tensor: item.axis for item in wanted_tensors(sites, [site.node for site in sites])}
    as_a_whole = {item.tensor: item.axis for item in wanted_tensors(sites, [])}
    assert set(by_channel) == set(as_a_whole) == {tensor for site in sites for tensor in site.measured}
    assert set(as_a_whole.values()) == {None}
    assert by_channel["blocks.0.spatial_func/Reshape"] == -1
    assert by_channel["input"] == 1
    assert by_channel["blocks.0.spatial_func/Softmax"] is None

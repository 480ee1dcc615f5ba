"""Statistics of the activations that quantized layers read, in one pass over the images and constant memory.

Each input channel of each site has: the largest |x|, the sums of x and x^2, a sample of rows, and a histogram of |x|.

A histogram's bin is given by the top bits of the float32 number, its exponent and four bits of mantissa: sixteen bins
for each power of two, found by one shift. Such bins fit any range, so no first pass is needed to find it. Dividing a
channel by a factor shifts its histogram, so the distribution after equalization follows without a second pass.

Statistics of parts of a set can be merged; the result is bit for bit that of the whole (`TensorStatistics.merge`).
Counts and maxima do not depend on the order. Sums of floats do, so they are taken over blocks of a fixed number of
images, and blocks are added in the images' order. Which rows of the sample a batch replaces depends on the batch's
number alone, and the latest batch wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.common.errors import PrecisionError
from spach_deploy.graph.editing import name_of
from spach_deploy.graph.precision.ranges import Arrays, more_outputs, open_session
from spach_deploy.quantization.formats import Float32, Float64
from spach_deploy.quantization.sites import Site

_MANTISSA_BITS = 4
PER_OCTAVE = 1 << _MANTISSA_BITS
"""Bins between a power of two and the next."""

_LOWEST, _HIGHEST = -20, 20
BINS = (_HIGHEST - _LOWEST) * PER_OCTAVE
_SHIFT = 23 - _MANTISSA_BITS
_FIRST = (127 + _LOWEST) << _MANTISSA_BITS
_CHUNK = 1 << 16

ROWS = 512
"""Most rows of a tensor that are kept as a sample."""

_ROWS_A_BATCH = 8
_FULL = ROWS // _ROWS_A_BATCH
"""Batches until the sample is full."""

BLOCK = 64
"""Batches in a block, whose sums are added up before they are added to the total."""

_UINT32 = 2**32 - 1
_SQUARES_FIT = 2.0**40
"""Largest sum of squares that is taken in float32, which is fast and far from overflow there."""

EDGES: Float64 = np.concatenate(
    [2.0 ** (_LOWEST + octave) * (1 + np.arange(PER_OCTAVE) / PER_OCTAVE) for octave in range(_HIGHEST - _LOWEST)]
    + [np.array([2.0**_HIGHEST])]
)
"""Lower edge of every bin, and the upper edge of the last (BINS + 1)."""

CENTERS: Float64 = (EDGES[1:] + EDGES[:-1]) / 2


@dataclasses.dataclass
class TensorStatistics:
    """Statistics of one tensor, for each of its C channels (C = 1 for a tensor that is measured as a whole).

    `max_abs` float64 (C): largest |x|. `count`: numbers in each channel. `batches`: number of the last batch.
    `closed_sums`, `closed_squares` float64 (C): sums of x and x^2 over finished blocks; `block_sums`, `block_squares`:
    over the current block. `sample` float32 (ROWS, C): rows chosen at random; `stamps` (ROWS): the number of the batch
    that each row is from, 0 for an empty row. `histogram` int64 (C, BINS), or None where only maxima are kept.
    `blocks`: sums of every finished block, in statistics of a part that will be merged; else None.
    """

    max_abs: Float64
    closed_sums: Float64
    closed_squares: Float64
    block_sums: Float64
    block_squares: Float64
    count: int
    batches: int
    sample: Float32
    stamps: NDArray[np.int64]
    histogram: NDArray[np.integer[Any]] | None
    blocks: list[tuple[Float64, Float64]] | None = None

    @classmethod
    def empty(cls, channels: int, *, histogram: bool, after: int | None = None) -> TensorStatistics:
        """Statistics of nothing. `after`: for a part that will be merged, the number of batches before it, a multiple
        of BLOCK.
        """
        counts = np.zeros((channels, BINS), np.int64) if histogram else None
        return cls(
            max_abs=np.zeros(channels),
            closed_sums=np.zeros(channels),
            closed_squares=np.zeros(channels),
            block_sums=np.zeros(channels),
            block_squares=np.zeros(channels),
            count=0,
            batches=after or 0,
            sample=np.zeros((ROWS, channels), np.float32),
            stamps=np.zeros(ROWS, np.int64),
            histogram=counts,
            blocks=None if after is None else [],
        )

    def see(self, rows: Float32) -> None:
        """Add one batch, float32 (n, C). Raises FloatingPointError when a number is not finite."""
        bits = rows.view(np.uint32) & np.uint32(0x7FFFFFFF)
        extremes = bits.max(axis=0)
        if (extremes >= np.uint32(0x7F800000)).any():
            raise FloatingPointError
        largest = extremes.view(np.float32)
        np.maximum(self.max_abs, largest, out=self.max_abs)
        wide = np.float64 if largest.max() > _SQUARES_FIT else None
        self.block_sums += rows.sum(axis=0, dtype=wide)
        self.block_squares += np.einsum("nc,nc->c", rows, rows, dtype=wide)
        self.count += len(rows)
        self.batches += 1
        self._sample(rows)
        if self.histogram is not None:
            self._count(bits)
        if self.batches % BLOCK == 0:
            self._close()

    def _close(self) -> None:
        """Finish the current block."""
        if self.blocks is not None:
            self.blocks.append((self.block_sums, self.block_squares))
        else:
            self.closed_sums += self.block_sums
            self.closed_squares += self.block_squares
        self.block_sums, self.block_squares = np.zeros_like(self.block_sums), np.zeros_like(self.block_squares)

    def merge(self, part: TensorStatistics) -> None:
        """Add the statistics of the next batches. ValueError if `part` begins at another batch, or has no `blocks`."""
        whole = self.batches // BLOCK
        if part.blocks is None or self.batches % BLOCK or part.batches // BLOCK - len(part.blocks) != whole:
            raise ValueError("this is not the part that comes next")
        for sums, squares in part.blocks:
            self.closed_sums += sums
            self.closed_squares += squares
        self.block_sums, self.block_squares = part.block_sums.copy(), part.block_squares.copy()
        np.maximum(self.max_abs, part.max_abs, out=self.max_abs)
        self.count += part.count
        self.batches = part.batches
        later = part.stamps > 0
        self.sample[later], self.stamps[later] = part.rows, part.stamps[later]
        if self.histogram is not None and part.histogram is not None:
            self.histogram += part.histogram

    def packed(self) -> TensorStatistics:
        """A smaller copy to be sent and merged: without empty rows, and with counts in half the bytes."""
        small = self.histogram if self.histogram is None or self.count > _UINT32 else self.histogram.astype(np.uint32)
        return dataclasses.replace(self, sample=self.rows, histogram=small)

    def _count(self, bits: NDArray[np.uint32]) -> None:
        assert self.histogram is not None
        channels = bits.shape[1]
        first = np.arange(channels, dtype=np.int64) * BINS - _FIRST
        lowest, highest = first + _FIRST, first + _FIRST + BINS - 1
        flat = self.histogram.reshape(-1)
        step = max(1, _CHUNK // channels)
        for start in range(0, len(bits), step):
            index = (bits[start : start + step] >> np.uint32(_SHIFT)).astype(np.int64)
            index += first
            np.clip(index, lowest, highest, out=index)
            flat += np.bincount(index.reshape(-1), minlength=flat.size)

    def _sample(self, rows: Float32) -> None:
        """Put some rows of this batch into the sample. When it is full, later batches replace fewer and fewer rows, so
        that rows of all batches are equally likely.
        """
        generator = np.random.default_rng(self.batches)
        taken = rows[generator.integers(0, len(rows), _ROWS_A_BATCH)]
        if self.batches <= _FULL:
            places = (self.batches - 1) * _ROWS_A_BATCH + np.arange(_ROWS_A_BATCH)
        else:
            places = generator.integers(0, self.batches * _ROWS_A_BATCH, _ROWS_A_BATCH)
        kept = places < ROWS
        self.sample[places[kept]] = taken[kept]
        self.stamps[places[kept]] = self.batches

    @property
    def rows(self) -> Float32:
        """The sample (up to ROWS, C)."""
        taken = self.stamps > 0
        return self.sample if len(self.sample) == np.count_nonzero(taken) else self.sample[taken]

    @property
    def sums(self) -> Float64:
        """Sum of x in each channel (C)."""
        total: Float64 = self.closed_sums + self.block_sums
        return total

    @property
    def squares(self) -> Float64:
        """Sum of x^2 in each channel (C)."""
        total: Float64 = self.closed_squares + self.block_squares
        return total

    @property
    def mean(self) -> Float64:
        """E[x] of each channel (C)."""
        mean: Float64 = self.sums / max(self.count, 1)
        return mean

    @property
    def mean_square(self) -> Float64:
        """E[x^2] of each channel (C)."""
        mean: Float64 = self.squares / max(self.count, 1)
        return mean

    @property
    def variance(self) -> Float64:
        """Variance of each channel (C)."""
        variance: Float64 = np.maximum(self.mean_square - self.mean**2, 0.0)
        return variance


def rows_of(tensor: Float32, axis: int | None) -> Float32:
    """`tensor` as (n, C), C being its `axis`; (n, 1) for None."""
    if axis is None:
        return tensor.reshape(-1, 1)
    if axis in (-1, tensor.ndim - 1):
        return tensor.reshape(-1, tensor.shape[-1])
    moved = np.moveaxis(tensor, axis, -1)
    return np.ascontiguousarray(moved).reshape(-1, tensor.shape[axis])


@dataclasses.dataclass(frozen=True)
class TensorRequest:
    """A tensor to be measured, for each channel of `axis`, or as a whole where that is None."""

    tensor: str
    axis: int | None


def wanted_tensors(sites: Iterable[Site], per_channel: Iterable[str]) -> tuple[TensorRequest, ...]:
    """The tensors of `sites`, each once; tensors of the nodes named in `per_channel` are measured by channel."""
    nodes = set(per_channel)
    wanted: dict[str, TensorRequest] = {}
    for site in sites:
        for tensor in site.measured:
            axis = site.channel_axis if site.node in nodes else None
            known = wanted.get(tensor)
            wanted[tensor] = TensorRequest(tensor, axis if known is None or known.axis is None else known.axis)
    return tuple(wanted.values())


class Collector:
    """Runs the FP32 graph batch by batch and keeps `TensorStatistics` of the `wanted` tensors.

    `histograms` False: keep maxima only, which is all that the method `max` needs. `threads` None lets ONNX Runtime
    choose. `after`: for a part of a set, how many images come before it. Raises MissingPackageError without
    onnxruntime.
    """

    def __init__(
        self,
        model: ir.Model,
        wanted: Sequence[TensorRequest],
        *,
        histograms: bool = True,
        threads: int | None = None,
        after: int | None = None,
    ) -> None:
        self._wanted = tuple(wanted)
        self._histograms = histograms
        self._after = after
        self._inputs = [name_of(value) for value in model.graph.inputs]
        self.statistics: dict[str, TensorStatistics] = {}
        self.images = 0
        made = [item.tensor for item in self._wanted if item.tensor not in self._inputs]
        self._outputs = [name_of(value) for value in model.graph.outputs] + made
        probes = more_outputs(model, [ir.val(name, ir.DataType.FLOAT) for name in made])
        self._session = open_session(model, probes, threads=threads)

    def run(self, feeds: Arrays) -> None:
        """Run one batch, by input name, and add it. PrecisionError for a tensor that is not finite."""
        values = dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))
        for item in self._wanted:
            self._see(item, feeds[item.tensor] if item.tensor in feeds else values.pop(item.tensor))
        self.images += len(next(iter(feeds.values())))

    def _see(self, item: TensorRequest, value: NDArray[Any]) -> None:
        rows = rows_of(value, item.axis)
        if item.tensor not in self.statistics:
            empty = TensorStatistics.empty(rows.shape[1], histogram=self._histograms, after=self._after)
            self.statistics[item.tensor] = empty
        try:
            self.statistics[item.tensor].see(rows)
        except FloatingPointError:
            raise PrecisionError(
                f"{item.tensor} is not finite in FP32 for one of the calibration images.",
                "Check the checkpoint and the images: the model itself gives NaN or infinity.",
            ) from None


def mixture(statistics: TensorStatistics, factors: Float64, weights: Float64 | None = None) -> Float64:
    """Histogram, float64 (BINS), of a tensor whose channel c is divided by factors[c] and counted weights[c] times.

    A bin's center that falls between two centers shares its count between them, by distance.
    """
    assert statistics.histogram is not None
    used = np.flatnonzero(statistics.histogram.any(axis=0))
    if not len(used):
        return np.zeros(BINS)
    low, high = int(used[0]), int(used[-1]) + 1
    counts = statistics.histogram[:, low:high].astype(np.float64)
    if weights is not None:
        counts *= weights[:, None]
    octave, place = np.divmod(np.arange(low, high), PER_OCTAVE)
    position = octave * PER_OCTAVE + _divided_positions(factors)[:, place]
    whole = np.floor(position)
    part = position - whole
    bins = whole.astype(np.int64)
    return _gathered(bins, counts * (1 - part)) + _gathered(bins + 1, counts * part)


def _divided_positions(factors: Float64) -> Float64:
    """Positions of one octave's centers after division by `factors`, in bins from its first, (channels, PER_OCTAVE)."""
    mantissa, exponent = np.frexp(CENTERS[-PER_OCTAVE:] / factors[:, None])  # 2 m is in 1..2
    moved = exponent - np.frexp(CENTERS[-1])[1]
    positions: Float64 = PER_OCTAVE * (moved + 2 * mantissa - 1) - 0.5
    return positions


def _gathered(bins: NDArray[np.int64], counts: Float64) -> Float64:
    """Counts by bin; counts beyond the first or last bin are added to that bin."""
    inside = np.clip(bins, 0, BINS - 1)
    total: Float64 = np.bincount(inside.reshape(-1), counts.reshape(-1), BINS).astype(np.float64)
    return total

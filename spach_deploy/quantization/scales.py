"""Scales of activations, from histograms by one of four methods, and of weights.

An activation has one scale for the whole tensor, from the histogram of |x|:

- `max`: nothing of the calibration images is clipped;
- `percentile`: the largest one in ten thousand numbers are clipped, whichever channel they are in;
- `entropy`: least Kullback-Leibler divergence between the distribution and its eight-bit form (as TensorRT's entropy
  calibrator: Migacz, "8-bit Inference with TensorRT", GTC 2017);
- `mse`: least expected squared error of the layer's output: each input channel is weighted by the squares of its
  weights.

Weights have one scale for each output channel, or one for all, from their largest |w|. (Clipping weights where that
lowers the squared error was tried: it changed the logits' relative L2 by less than a hundredth of itself.)
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import numpy as np

from spach_deploy.quantization.formats import INT8, EightBitFormat, Float32, Float64
from spach_deploy.quantization.statistics import BINS, CENTERS, EDGES

SMALLEST = 2.0**-24
"""Smallest scale that is written: FP16's smallest number. A channel of zeros gets the scale 1."""

_PERCENTILE = 1 - 1e-4
_ENTROPY_BINS, _ENTROPY_LEVELS = 2048, 128
_CLIPS = np.exp2(-np.arange(0, 49) / 12)  # of the largest |x|, down to a sixteenth


class Method(str, enum.Enum):
    """How the number above which an activation is clipped is chosen."""

    MAX = "max"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"

    @property
    def needs_histograms(self) -> bool:
        """Whether the method needs a histogram, not only the largest |x|."""
        return self is not Method.MAX


def clipped_at(method: Method, histogram: Float64 | None, largest: float, form: EightBitFormat) -> float:
    """The |x| above which an activation is clipped, at most `largest`.

    `histogram`: counts, float64 (BINS), None with the method `max`. `largest`: largest |x| in calibration.
    """
    if method is Method.MAX or histogram is None or largest <= 0 or not histogram.any():
        return largest
    choose: dict[Method, Callable[[Float64, float, EightBitFormat], float]] = {
        Method.PERCENTILE: _percentile,
        Method.ENTROPY: _entropy,
        Method.MSE: _least_error,
    }
    return min(largest, choose[method](histogram, largest, form))


def _percentile(histogram: Float64, largest: float, form: EightBitFormat) -> float:
    total = np.cumsum(histogram)
    index = int(np.searchsorted(total, _PERCENTILE * total[-1]))
    return float(EDGES[min(index + 1, BINS)])


def _least_error(histogram: Float64, largest: float, form: EightBitFormat) -> float:
    used = np.flatnonzero(histogram)
    counts, values = histogram[used], np.minimum(CENTERS[used], largest)
    clips = largest * _CLIPS
    errors = [expected_error(counts, values, form.scale_of(clip), form) for clip in clips]
    return float(clips[int(np.argmin(errors))])


def expected_error(counts: Float64, values: Float64, scale: float, form: EightBitFormat) -> float:
    """Expected squared error of storing `values` at `scale`, summed with `counts`."""
    return float(counts @ form.squared_error(values / scale)) * scale**2


def _entropy(histogram: Float64, largest: float, form: EightBitFormat) -> float:
    linear = _linear(histogram, largest)
    width = largest / _ENTROPY_BINS
    candidates = range(_ENTROPY_LEVELS, _ENTROPY_BINS + 1, 16)
    divergences = [_divergence(linear, size) for size in candidates]
    return float(candidates[int(np.argmin(divergences))] * width)


def _linear(histogram: Float64, largest: float) -> Float64:
    """The histogram in bins of equal width from 0 to `largest`; counts of an old bin are spread evenly over it."""
    total = np.concatenate([[0.0], np.cumsum(histogram)])
    edges = np.concatenate([[0.0], EDGES[1:]])
    edges[-1] = max(edges[-1], largest)
    wanted = np.linspace(0.0, largest, _ENTROPY_BINS + 1)
    cumulated = np.interp(wanted, edges, total)
    cumulated[-1] = total[-1]
    counts: Float64 = np.diff(cumulated)
    return counts


def _divergence(linear: Float64, size: int) -> float:
    """KL divergence of clipping after `size` bins: the first `size` bins, with all beyond added to the last, against
    the same in 128 levels.
    """
    reference = linear[:size].copy()
    reference[-1] += linear[size:].sum()
    groups = np.minimum(np.arange(size) * _ENTROPY_LEVELS // size, _ENTROPY_LEVELS - 1)
    present = linear[:size] > 0
    sums = np.bincount(groups, linear[:size], _ENTROPY_LEVELS)
    shares = np.bincount(groups, present, _ENTROPY_LEVELS)
    candidate = np.where(present, (sums / np.maximum(shares, 1))[groups], 0.0)
    if not candidate.any():
        return float("inf")
    p, q = reference / reference.sum(), candidate / candidate.sum()
    used = p > 0
    return float(np.sum(p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))))


def weight_scales(weights: Float32, form: EightBitFormat, *, per_channel: bool = True) -> Float64:
    """Scales of `weights`, (outputs, ...) float32: float64 (outputs,), or (1,) for the whole tensor."""
    rows = weights.reshape(len(weights), -1) if per_channel else weights.reshape(1, -1)
    scales: Float64 = np.abs(rows).max(axis=1).astype(np.float64) / form.limit
    scales[scales == 0] = 1.0
    kept: Float64 = np.maximum(scales, SMALLEST)
    return kept


def store(values: Float32, scale: Float32 | float, form: EightBitFormat) -> Float32:
    """`values` quantized to `form` at `scale` and dequantized, float32: rounded to nearest, ties to even, and clipped.

    INT8 is clipped to -128..127, as ONNX and TensorRT do.
    """
    scaled: Float32 = np.divide(values, np.asarray(scale, np.float32), dtype=np.float32)
    np.clip(scaled, -form.limit - (form == INT8), form.limit, out=scaled)
    if form == INT8:
        np.rint(scaled, out=scaled)
    else:
        import torch

        scaled = torch.from_numpy(scaled).to(torch.float8_e4m3fn).float().numpy()
    scaled *= np.asarray(scale, np.float32)
    return scaled

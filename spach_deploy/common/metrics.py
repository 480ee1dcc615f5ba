"""Relative L2 error, the measure by which all outputs are compared, with all sums in float64; and the best classes.

An output of a few numbers for each image, such as an angle, may be close to zero by chance, and any error is large
beside that. Its error is relative to what it usually is: the root mean square over the images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


FEW_NUMBERS = 8
"""Outputs with fewer numbers for each image are compared relative to their root mean square over the images."""


def usual_square(reference: Float64, numbers: int) -> Float64:
    """What errors of each image are relative to, squared: its own sum of squares `reference` (N), or, of a few
    `numbers`, at least their mean over the images.
    """
    return np.maximum(reference, reference.mean()) if numbers < FEW_NUMBERS and len(reference) else reference


def relative_l2(value: Array, reference: Array) -> float:
    """||value - reference|| / ||reference|| over all elements of two arrays of equal size.

    0 where they are equal; infinite where `reference` is all zeros and `value` is not; NaN or infinite where `value` is
    not finite.
    """
    return float(relative_l2_by_image(value.reshape(1, -1), reference.reshape(1, -1))[0])


def relative_l2_by_image(values: Array, reference: Array) -> Float64:
    """`relative_l2` of each image (N) of two arrays (N, ...)."""
    exact = reference.reshape(len(reference), -1).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.square(values.reshape(exact.shape).astype(np.float64) - exact)
        # Not a dot product: BLAS threads spin while they wait, and take cores from other work.
        squares = usual_square(np.square(exact).sum(axis=1), exact.shape[1])
        return relative_norm(difference.sum(axis=1), squares)


def worst_relative_l2(values: Array, reference: Array) -> float:
    """`relative_l2` of the worst image of two arrays (N, ...)."""
    return float(relative_l2_by_image(values, reference).max())


def best_indices(scores: Array, count: int) -> npt.NDArray[np.int64]:
    """Indices (N, count) of the largest of `scores` (N, classes) in each row, the best first; of equal ones the lower
    index first. NaN counts as the smallest.

    The start of a stable sort; among many classes, only those that may be in it are sorted.
    """
    if scores.shape[1] <= _FEW_SCORES or count > scores.shape[1] // 8 or np.isnan(scores).any():
        return np.argsort(-scores, axis=1, kind="stable")[:, :count].astype(np.int64)
    least = np.partition(scores, -count, axis=1)[:, -count]
    candidates = [np.flatnonzero(row >= limit) for row, limit in zip(scores, least, strict=True)]
    ordered = [at[np.argsort(-row[at], kind="stable")] for row, at in zip(scores, candidates, strict=True)]
    return np.stack([order[:count] for order in ordered]).astype(np.int64)


_FEW_SCORES = 4096


def relative_norm(difference: Float64, reference: Float64) -> Float64:
    """Relative L2 from sums of squares: of the difference (N), and of the reference (N)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt(difference / reference)  # a zero reference gives infinity
    return np.asarray(np.where(difference == 0, 0.0, ratio), np.float64)

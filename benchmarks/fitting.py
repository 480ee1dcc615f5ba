"""How a cost grows: the slope of a straight line through the logarithms of both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """p in cost = c * size^p, least squares; NaN with fewer than two sizes, or a cost that is not positive."""
    if len(set(sizes)) < 2 or min(costs) <= 0:
        return math.nan
    slope, _ = np.polyfit(np.log(np.asarray(sizes, np.float64)), np.log(np.asarray(costs, np.float64)), 1)
    return float(slope)


def marginal(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """b in cost = a + b * size, least squares: what one more takes, without the fixed part. NaN for a single size."""
    if len(set(sizes)) < 2:
        return math.nan
    return float(np.polyfit(np.asarray(sizes, np.float64), np.asarray(costs, np.float64), 1)[0])

"""Latencies and ratios, and whether a ratio can be told from these rounds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)
"""Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; beyond them 2.09 and less."""

_T_BEYOND = 2.09
WIDEST = 1.3
"""Upper over lower end of the interval of a ratio that is still told: about +-14 %."""

SAME = 1.1
"""The same of an interval with 1 in it: about +-5 %, so that neither is faster by more than some percent."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds of one batch. `p90` and `p99` are None where there are too few runs (10, 100) to speak of them."""

    runs: int
    median: float
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, samples: Sequence[float]) -> Latency:
        """Of the runs of all rounds."""
        ordered = sorted(samples)
        return cls(len(ordered), statistics.median(ordered), _quantile(ordered, 90), _quantile(ordered, 99))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def _quantile(ordered: Sequence[float], percent: int) -> float | None:
    if len(ordered) * (100 - percent) < 100:
        return None
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast, with the 95 % interval over the rounds."""

    value: float
    low: float
    high: float

    @property
    def is_told(self) -> bool:
        """Whether the rounds agree well enough to print it: a wider interval with 1 in it cannot even tell which."""
        return self.high / self.low <= (SAME if self.includes_one else WIDEST)

    @property
    def includes_one(self) -> bool:
        """Whether neither is known to be the faster."""
        return self.low <= 1 <= self.high

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; without the value where it cannot be told."""
        told = {"value": self.value if self.is_told else None, "low": self.low, "high": self.high}
        return {**told, "told": self.is_told, "same": self.is_told and self.includes_one}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio | None:
    """How many times as fast as `theirs` `ours` is, from the medians of the same rounds; None with fewer than two.

    The mean of the logarithms of the ratios round by round, with Student's interval: what slows a whole round cancels.
    """
    logs = [math.log(other / own) for own, other in zip(ours, theirs, strict=True)]
    if len(logs) < 2:
        return None
    mean = statistics.fmean(logs)
    t = _T95[len(logs) - 2] if len(logs) - 2 < len(_T95) else _T_BEYOND
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))

"""Results of a benchmark: latencies, speed ratios with confidence intervals, errors, and the whole as plain JSON."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from spach_deploy.benchmark.layers import Layer
from spach_deploy.benchmark.runners import CPU, TITLES

_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)
"""Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; beyond them 2.09 and less."""

_T_BEYOND = 2.09
WIDEST = 1.3
"""A ratio is conclusive while its interval's upper end is at most this many times the lower one: about +-14 %."""

SAME = 1.1
"""The same for an interval that includes 1: about +-5 %. Then neither runner is faster by more than some percent."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds for one batch. `p90` and `p99` are None with fewer than 10 and 100 runs."""

    runs: int
    median: float
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, samples: Sequence[float]) -> Latency:
        """From the seconds of all runs in all rounds."""
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
    """A speed ratio, with its 95 % confidence interval over the rounds."""

    value: float
    low: float
    high: float

    @property
    def is_conclusive(self) -> bool:
        """Whether the interval is narrow enough to print the ratio: `WIDEST`, or `SAME` where it includes 1."""
        return self.high / self.low <= (SAME if self.includes_one else WIDEST)

    @property
    def includes_one(self) -> bool:
        """Whether the interval includes 1: neither runner is known to be faster."""
        return self.low <= 1 <= self.high

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `value` is null where the ratio is not conclusive."""
        content = {"value": self.value if self.is_conclusive else None, "low": self.low, "high": self.high}
        return {**content, "told": self.is_conclusive, "same": self.is_conclusive and self.includes_one}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio | None:
    """How many times as fast `ours` is as `theirs`, from the medians of the same rounds; None with fewer than two
    rounds.

    The mean of the logarithms of the ratios round by round, with Student's t interval: what slows a whole round
    cancels.
    """
    logs = [math.log(other / own) for own, other in zip(ours, theirs, strict=True)]
    if len(logs) < 2:
        return None
    mean = statistics.fmean(logs)
    t = _T95[len(logs) - 2] if len(logs) - 2 < len(_T95) else _T_BEYOND
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


VERSION = 1


@dataclasses.dataclass(frozen=True)
class OutputError:
    """The largest relative L2 of an image's logits (of a model without them: its first output) against the golden ones,
    and what the bundle's tolerances allow.

    For a runner: the worst of all batch sizes and rounds.
    """

    rel_l2: float
    allowed: float

    @property
    def is_right(self) -> bool:
        """Whether the error is allowed; False for NaN."""
        return self.rel_l2 <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"rel_l2": _finite(self.rel_l2), "allowed": self.allowed, "right": self.is_right}


def _finite(value: float | None) -> float | None:
    """None for inf and NaN, which JSON has not."""
    return value if value is not None and math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Timing:
    """One runner at one batch size.

    `ratio`: times as fast as PyTorch eager. `roofline`: the roofline time over the median latency. `first_s`: seconds
    of the very first run at this batch size, in which some runtimes compile. `rel_l2`: worst error at this batch size.
    `medians`: seconds, one for each round.
    """

    batch: int
    latency: Latency
    peak_bytes: int
    first_s: float
    ratio: Ratio | None = None
    roofline: float | None = None
    rel_l2: float | None = None
    medians: tuple[float, ...] = ()

    @property
    def images_per_second(self) -> float:
        """Throughput at the median latency."""
        return self.batch / self.latency.median

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "batch": self.batch,
            "seconds": self.latency.to_dict(),
            "images_per_second": self.images_per_second,
            "seconds_by_round": list(self.medians),
            "peak_bytes": self.peak_bytes,
            "first_seconds": self.first_s,
            "ratio_to_eager": None if self.ratio is None else self.ratio.to_dict(),
            "share_of_roofline": self.roofline,
            "rel_l2": _finite(self.rel_l2),
        }


@dataclasses.dataclass(frozen=True)
class RunnerResult:
    """One runner: its error, its timings by batch size, and seconds of one run by module where it has a profiler.

    `must_be_right`: False for a runner in another precision that was not asked for by name, such as bf16 autocast of an
    FP32 bundle. `open_s`: seconds of opening it, imports included.
    """

    name: str
    accuracy: OutputError
    timings: tuple[Timing, ...]
    modules: Mapping[str, float] = dataclasses.field(default_factory=dict)
    problem: str = ""
    device: str = CPU
    must_be_right: bool = True
    open_s: float = 0.0

    @property
    def title(self) -> str:
        """Its display name, with the device where that is not the CPU."""
        return TITLES[self.name] if self.device == CPU else f"{TITLES[self.name]} (GPU)"

    @property
    def start_s(self) -> float:
        """Seconds from opening to its first answer, at the smallest batch size."""
        return self.open_s + self.timings[0].first_s

    def at(self, batch: int) -> Timing | None:
        """The timing at a batch size; None where the runner stopped before."""
        return next((timing for timing in self.timings if timing.batch == batch), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "runner": self.name,
            "title": self.title,
            "device": self.device,
            "accuracy": self.accuracy.to_dict(),
            "timings": [timing.to_dict() for timing in self.timings],
            "seconds_by_module": dict(self.modules),
            "problem": self.problem,
            "start_seconds": self.start_s,
        }


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A whole benchmark.

    `skipped`: runners that did not run, with the reason. `peaks`: FLOP/s and bytes/s of the CPU; `gpu_peaks`: of the
    GPU, empty where it was not used. `layers`: the graph's, at the largest batch size. `output`: the one that
    errors are of. `is_cold`: engines started without a runtime cache.
    """

    bundle: str
    model: str
    precision: str
    batches: tuple[int, ...]
    rounds: int
    runners: tuple[RunnerResult, ...]
    skipped: Mapping[str, str]
    layers: tuple[Layer, ...]
    peaks: Mapping[str, float]
    machine: Mapping[str, Any]
    gpu_peaks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    output: str = "logits"
    is_cold: bool = False

    @property
    def wrong(self) -> tuple[RunnerResult, ...]:
        """Runners whose error is beyond the bundle's tolerances."""
        return tuple(runner for runner in self.runners if not runner.accuracy.is_right)

    @property
    def exit_code(self) -> int:
        """1 where a runner that must be right is wrong, else 0."""
        return 1 if any(runner.must_be_right for runner in self.wrong) else 0

    def ranked(self, batch: int) -> list[tuple[RunnerResult, Timing]]:
        """Runners with the right numbers, the fastest first."""
        right = [(runner, runner.at(batch)) for runner in self.runners if runner.accuracy.is_right]
        measured = [(runner, timing) for runner, timing in right if timing is not None]
        return sorted(measured, key=lambda entry: entry[1].latency.median)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "benchmark_version": VERSION,
            "bundle": self.bundle,
            "model": self.model,
            "precision": self.precision,
            "batches": list(self.batches),
            "rounds": self.rounds,
            "cold": self.is_cold,
            "runners": [runner.to_dict() for runner in self.runners],
            "skipped": dict(self.skipped),
            "layers": [layer.to_dict() for layer in self.layers],
            "macs": sum(layer.macs for layer in self.layers),
            "bytes": sum(layer.bytes for layer in self.layers),
            "peaks": dict(self.peaks),
            "gpu_peaks": dict(self.gpu_peaks),
            "machine": dict(self.machine),
        }

"""What a benchmark found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spach_deploy.benchmark.contestants import EAGER, TITLES
from spach_deploy.benchmark.layers import Layer
from spach_deploy.benchmark.statistics import Latency, Ratio

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Worst relative L2 of an image's logits against the golden answers, and what the bundle's tolerances allow."""

    rel_l2: float
    allowed: float

    @property
    def is_right(self) -> bool:
        """False also for what is not a number."""
        return self.rel_l2 <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        finite = self.rel_l2 if self.rel_l2 == self.rel_l2 and self.rel_l2 != float("inf") else None
        return {"rel_l2": finite, "allowed": self.allowed, "right": self.is_right}


@dataclasses.dataclass(frozen=True)
class Timing:
    """One runner at one batch. `ratio`: times as fast as PyTorch eager. `roofline`: share of the least time reached.

    `first_s`: seconds of its very first run of this batch, in which some compile.
    """

    batch: int
    latency: Latency
    peak_bytes: int
    first_s: float
    ratio: Ratio | None = None
    roofline: float | None = None

    @property
    def images_per_second(self) -> float:
        """From the median."""
        return self.batch / self.latency.median

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "batch": self.batch,
            "seconds": self.latency.to_dict(),
            "images_per_second": self.images_per_second,
            "peak_bytes": self.peak_bytes,
            "first_seconds": self.first_s,
            "ratio_to_eager": None if self.ratio is None else self.ratio.to_dict(),
            "share_of_roofline": self.roofline,
        }


@dataclasses.dataclass(frozen=True)
class Runner:
    """One runner: how right it is, its timings by batch, seconds of one run by module where it can tell them."""

    name: str
    accuracy: Accuracy
    timings: tuple[Timing, ...]
    modules: Mapping[str, float] = dataclasses.field(default_factory=dict)
    problem: str = ""

    @property
    def title(self) -> str:
        """Its name in words."""
        return TITLES[self.name]

    def at(self, batch: int) -> Timing | None:
        """Its timing at a batch, where it got that far."""
        return next((timing for timing in self.timings if timing.batch == batch), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "runner": self.name,
            "title": self.title,
            "accuracy": self.accuracy.to_dict(),
            "timings": [timing.to_dict() for timing in self.timings],
            "seconds_by_module": dict(self.modules),
            "problem": self.problem,
        }


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """All of it. `skipped`: runners that did not run, with the reason. `peaks`: FLOP/s and bytes/s of this machine."""

    bundle: str
    model: str
    precision: str
    batches: tuple[int, ...]
    rounds: int
    runners: tuple[Runner, ...]
    skipped: Mapping[str, str]
    layers: tuple[Layer, ...]
    peaks: Mapping[str, float]
    machine: Mapping[str, Any]

    @property
    def wrong(self) -> tuple[Runner, ...]:
        """Runners whose numbers are outside the bundle's tolerances."""
        return tuple(runner for runner in self.runners if not runner.accuracy.is_right)

    @property
    def exit_code(self) -> int:
        """1 where a runner computes something else than the bundle may."""
        return 1 if self.wrong else 0

    @property
    def has_eager(self) -> bool:
        """Whether ratios to PyTorch eager could be made."""
        return any(runner.name == EAGER for runner in self.runners)

    def best(self, batch: int) -> Runner | None:
        """The fastest of the runners that compute the right numbers."""
        right = [(timing.latency.median, runner) for runner in self.runners if (timing := runner.at(batch))]
        right = [entry for entry in right if entry[1].accuracy.is_right]
        return min(right, key=lambda entry: entry[0])[1] if right else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "benchmark_version": VERSION,
            "bundle": self.bundle,
            "model": self.model,
            "precision": self.precision,
            "batches": list(self.batches),
            "rounds": self.rounds,
            "runners": [runner.to_dict() for runner in self.runners],
            "skipped": dict(self.skipped),
            "layers": [layer.to_dict() for layer in self.layers],
            "macs": sum(layer.macs for layer in self.layers),
            "peaks": dict(self.peaks),
            "machine": dict(self.machine),
        }

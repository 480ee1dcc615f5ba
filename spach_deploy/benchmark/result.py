"""What a benchmark found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from spach_deploy.benchmark.contestants import CPU, EAGER, TITLES
from spach_deploy.benchmark.layers import Layer
from spach_deploy.benchmark.statistics import Latency, Ratio

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Worst relative L2 of an image's logits against the golden answers, and what the bundle's tolerances allow.

    Of a runner: the worst of all batches and turns.
    """

    rel_l2: float
    allowed: float

    @property
    def is_right(self) -> bool:
        """False also for what is not a number."""
        return self.rel_l2 <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"rel_l2": _finite(self.rel_l2), "allowed": self.allowed, "right": self.is_right}


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Timing:
    """One runner at one batch. `ratio`: times as fast as PyTorch eager. `roofline`: the least time over the median.

    `first_s`: seconds of its very first run of this batch, in which some compile. `rel_l2`: worst error at this batch.
    `medians`: seconds, of each round.
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
        """From the median."""
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
class Runner:
    """One runner: how right it is, its timings by batch, seconds of one run by module where it can tell them.

    `must_be_right`: false for an experiment that nobody asked for by name, such as bf16 autocast of an FP32 bundle.
    """

    name: str
    accuracy: Accuracy
    timings: tuple[Timing, ...]
    modules: Mapping[str, float] = dataclasses.field(default_factory=dict)
    problem: str = ""
    device: str = CPU
    must_be_right: bool = True

    @property
    def title(self) -> str:
        """Its name in words, with the device where that is not the processor."""
        return TITLES[self.name] if self.device == CPU else f"{TITLES[self.name]} (GPU)"

    def at(self, batch: int) -> Timing | None:
        """Its timing at a batch, where it got that far."""
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
        }


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """All of it. `skipped`: runners that did not run, with the reason. `peaks`: FLOP/s and bytes/s of this machine.

    `layers` are those of the largest batch. `gpu_peaks`: the same of the GPU, empty where it was not used.
    """

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
    gpu_peaks: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def wrong(self) -> tuple[Runner, ...]:
        """Runners whose numbers are outside the bundle's tolerances."""
        return tuple(runner for runner in self.runners if not runner.accuracy.is_right)

    @property
    def exit_code(self) -> int:
        """1 where a runner that must be right computes something else than the bundle may."""
        return 1 if any(runner.must_be_right for runner in self.wrong) else 0

    @property
    def has_eager(self) -> bool:
        """Whether ratios to PyTorch eager could be made."""
        return any(runner.name == EAGER for runner in self.runners)

    def ranked(self, batch: int) -> list[tuple[Runner, Timing]]:
        """The runners that compute the right numbers, the fastest first."""
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
            "runners": [runner.to_dict() for runner in self.runners],
            "skipped": dict(self.skipped),
            "layers": [layer.to_dict() for layer in self.layers],
            "macs": sum(layer.macs for layer in self.layers),
            "bytes": sum(layer.bytes for layer in self.layers),
            "peaks": dict(self.peaks),
            "gpu_peaks": dict(self.gpu_peaks),
            "machine": dict(self.machine),
        }

"""The benchmark itself: all runners are timed in every round, in random order, so that other load slows them all alike.

Each runner has a process of its own, which stays open for all rounds.

The result names the machine: processor, threads, versions, load and GPUs, and its measured peak FLOP/s and
bandwidth.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from spach_deploy.benchmark.layers import Layer, layers
from spach_deploy.benchmark.result import Benchmark, Latency, OutputError, RunnerResult, Timing, ratio
from spach_deploy.benchmark.runners import (
    CPU,
    EAGER,
    GPU,
    IN_BF16,
    PLAIN,
    TITLES,
    TORCH,
    RunnerSetup,
    lacks_weights,
    why_not,
)
from spach_deploy.benchmark.worker import RunnerProcess
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.inputs import Batch
from spach_deploy.bundle.outputs import model_outputs
from spach_deploy.bundle.store import GOLDEN, GRAPH, Bundle
from spach_deploy.common.errors import UnavailableError, UsageError
from spach_deploy.common.machine import available_threads, cpu_flags, processor_name, torch_threads
from spach_deploy.common.metrics import worst_relative_l2
from spach_deploy.common.operating_system import load_average
from spach_deploy.common.versions import installed, tool_versions
from spach_deploy.options.specs import BatchProfile
from spach_deploy.validation.bundle_facts import BundleFacts
from spach_deploy.validation.tolerance import ToleranceSet

Array = npt.NDArray[Any]
Key = TypeVar("Key")
OnProgress = Callable[[str, float], None]
"""Called with what is under way, and the share of the benchmark that is done."""


@dataclasses.dataclass(frozen=True)
class BenchmarkRequest:
    """What to measure.

    `batches` empty: the smallest and the usual batch of the profile. `names` empty: every runner that can run here.
    `optional`: those of `names` that may fail, as when none had been named. `seconds`: how long a runner is timed in
    each round at each batch size.
    """

    setup: RunnerSetup
    batches: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    rounds: int = 5
    seconds: float = 1.0
    optional: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class GoldenBatch:
    """All golden inputs, and `exact`, the first of the golden outputs (N, ...)."""

    inputs: Batch
    exact: Array

    @classmethod
    def of(cls, golden: Golden, facts: BundleFacts) -> GoldenBatch:
        """Of a bundle's golden pack."""
        return cls(golden.batch(facts.inputs), next(iter(golden.outputs.values())))


@dataclasses.dataclass
class _RunnerRecord:
    """A runner's process and its measurements by batch size.

    `allowed`: relative L2 of the output that is compared; `medians`: one for each round;
    `runs`: seconds of every run; `problem`: why it stopped, if it did.
    """

    worker: RunnerProcess
    allowed: float
    medians: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    runs: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    peak_bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    first_s: dict[int, float] = dataclasses.field(default_factory=dict)
    errors: dict[int, OutputError] = dataclasses.field(default_factory=dict)
    problem: str = ""

    def run_golden(self, golden: GoldenBatch, batch: int) -> None:
        """Run all golden images in batches of this size before timing: measures the error, and the first run, which may
        compile.
        """
        with self._recording_failure(batch):
            outputs = self.worker.first_outputs(golden.inputs, batch)
            self.first_s[batch] = outputs.first_s
            self._compare(batch, outputs.values, golden.exact)

    def take_turn(self, golden: GoldenBatch, batch: int, seconds: float) -> None:
        """Time the runner for one round at this batch size, and check its last output too."""
        chosen = np.arange(batch) % len(golden.inputs)
        with self._recording_failure(batch):
            turn = self.worker.turn(golden.inputs[chosen], seconds)
            self.medians.setdefault(batch, []).append(float(np.median(turn.seconds)))
            self.runs.setdefault(batch, []).extend(turn.seconds)
            self.peak_bytes[batch] = turn.peak_bytes
            self._compare(batch, turn.values, golden.exact[chosen])

    @property
    def accuracy(self) -> OutputError:
        """The worst error of all batch sizes."""
        return max(self.errors.values(), key=lambda error: error.rel_l2)

    def _compare(self, batch: int, values: Array, exact: Array) -> None:
        errors = [*([self.errors[batch]] if batch in self.errors else []), accuracy(values, exact, self.allowed)]
        self.errors[batch] = max(errors, key=lambda error: error.rel_l2)

    @contextlib.contextmanager
    def _recording_failure(self, batch: int) -> Iterator[None]:
        """Record a failure as `problem`; the runner takes no further part."""
        try:
            yield
        except UnavailableError as error:
            self.problem = f"stopped at batch {batch}: {error}"


def measure(request: BenchmarkRequest, report: OnProgress = lambda what, share: None) -> Benchmark:
    """Run the benchmark.

    `report` is called with what is under way and the share done. Raises BundleError and UsageError for what cannot be
    measured, UnavailableError when a runner that was asked for by name, or every one, cannot run here.
    """
    bundle = Bundle.open(request.setup.bundle)
    facts = BundleFacts.of(bundle)
    golden = GoldenBatch.of(Golden.load(bundle.file(GOLDEN)), facts)
    batches, output = chosen_batches(request.batches, facts.batch), model_outputs(facts.outputs)[0].name
    skipped = _skipped(request, bundle)
    machine = machine_facts(request.setup.threads)
    with contextlib.ExitStack() as stack:
        records = _open_runners(stack, request, facts.tolerances, output, skipped, report)
        limits = {device: Peaks(request.setup.threads, device) for device in _devices_of(records)}
        _take_turns(records, golden, batches, request, _RoundProgress(report, limits.values()))
        machine |= facts_after()
        _drop_unmeasured(records, request, skipped)
        report("time by module", 1.0)
        modules = _profiled(records, golden, batches)
    counted = {batch: layers(bundle.file(GRAPH), batch) for batch in batches}
    peaks = {device: of_device.best for device, of_device in limits.items()}
    return Benchmark(
        str(request.setup.bundle),
        bundle.manifest.model.name,
        bundle.manifest.precision.asked.value,
        batches,
        request.rounds,
        tuple(_runner(name, records, _LeastTimes(counted, peaks), modules, request) for name in records),
        skipped,
        counted[batches[-1]],
        peaks[CPU],
        machine,
        peaks.get(GPU, {}),
        output,
        request.setup.is_cold,
    )


def _devices_of(records: Mapping[str, _RunnerRecord]) -> list[str]:
    return sorted({CPU, *(record.worker.device for record in records.values())})


def _open_runners(
    stack: contextlib.ExitStack,
    request: BenchmarkRequest,
    allowed: ToleranceSet,
    output: str,
    skipped: dict[str, str],
    report: OnProgress,
) -> dict[str, _RunnerRecord]:
    """A process for each runner. One that does not open joins `skipped`; UnavailableError where it was asked for by
    name.
    """
    records: dict[str, _RunnerRecord] = {}
    for name in _runnable(request, skipped):
        report(f"open {TITLES[name]}", 0.0)
        worker = RunnerProcess(name, request.setup)
        try:
            stack.enter_context(worker)
            bounds = allowed.engine if worker.device == GPU else allowed.graph
            records[name] = _RunnerRecord(worker, bounds.outputs[output].rel_l2)
        except UnavailableError as error:
            _skip_or_raise(name, str(error), request, skipped)
    return records


def _skip_or_raise(name: str, reason: str, request: BenchmarkRequest, skipped: dict[str, str]) -> None:
    if name in request.names and name not in request.optional:
        raise UnavailableError(f"{TITLES[name]} cannot run here: {reason}.")
    skipped[name] = reason


def _drop_unmeasured(records: dict[str, _RunnerRecord], request: BenchmarkRequest, skipped: dict[str, str]) -> None:
    """Drop runners that finished no round. UnavailableError where that is all of them, or one that was asked for by
    name.
    """
    for name in [name for name, record in records.items() if not record.runs]:
        _skip_or_raise(name, records.pop(name).problem, request, skipped)
    if not records:
        reasons = "; ".join(f"{TITLES[name]}: {reason}" for name, reason in skipped.items())
        raise UnavailableError(f"Nothing here can run this bundle. {reasons}.", "See spach-doctor.")


def paired_rounds(
    workers: Mapping[Key, RunnerProcess], inputs: Batch, rounds: int, seconds: float, report: OnProgress
) -> dict[Key, tuple[float, ...]]:
    """Median seconds of a batch of `inputs` in each round, in which all workers take turns in random order."""
    times: dict[Key, list[float]] = {key: [] for key in workers}
    shuffler = random.Random(0)
    for number in range(rounds):
        for key in shuffler.sample(list(workers), len(workers)):
            report(f"round {number + 1} of {rounds}: {TITLES[workers[key].name]}", number / rounds)
            times[key].append(float(np.median(workers[key].turn(inputs, seconds).seconds)))
    return {key: tuple(medians) for key, medians in times.items()}


def chosen_batches(asked: Sequence[int], profile: BatchProfile) -> tuple[int, ...]:
    """The batch sizes asked for, or the smallest and the usual one. UsageError for one that the engine would refuse."""
    batches = tuple(sorted({*asked})) or tuple(sorted({profile.min, profile.opt}))
    for batch in batches:
        if not profile.min <= batch <= profile.max:
            raise UsageError(
                f"The bundle takes batches of {profile.min} to {profile.max}, not {batch}.",
                "Give others, or export with another --batch.",
            )
    return batches


def _skipped(request: BenchmarkRequest, bundle: Bundle) -> dict[str, str]:
    """Runners that cannot run here, with the reason.

    For one that was asked for by name: UsageError where it lacks a checkpoint, else UnavailableError.
    """
    reasons = {name: why_not(name, request.setup, bundle) for name in request.names or TITLES}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    for name in request.names:
        if name in skipped:
            kind = UsageError if name in TORCH and lacks_weights(request.setup, bundle) else UnavailableError
            raise kind(f"{TITLES[name]} cannot run here: {skipped[name]}.")
    return skipped


def _runnable(request: BenchmarkRequest, skipped: dict[str, str]) -> Iterable[str]:
    return [name for name in request.names or TITLES if name not in skipped]


def accuracy(values: Array, exact: Array, allowed: float) -> OutputError:
    """The error of an output (N, ...) against the golden one, `exact`, image by image."""
    if values.shape != exact.shape or not np.isfinite(values).all():
        return OutputError(float("inf"), allowed)
    return OutputError(worst_relative_l2(values, exact), allowed)


@dataclasses.dataclass(frozen=True)
class _RoundProgress:
    """Reports progress, and measures the machine's peaks between the rounds."""

    report: OnProgress
    peaks: Collection[Peaks]

    def between_rounds(self, share: float) -> None:
        for peaks in self.peaks:
            self.report("this machine's peaks", share)
            peaks.measure()


def _take_turns(
    records: dict[str, _RunnerRecord],
    golden: GoldenBatch,
    batches: Sequence[int],
    request: BenchmarkRequest,
    progress: _RoundProgress,
) -> None:
    """For each batch size: all runners on the golden images, then round after round in random order."""
    shuffler = random.Random(0)
    steps = len(batches) * (1 + request.rounds)
    for index, batch in enumerate(batches):
        for number in range(1 + request.rounds):
            what = f"round {number} of {request.rounds}" if number else "answers"
            share = (index * (1 + request.rounds) + number) / steps
            progress.between_rounds(share)
            for name in shuffler.sample(list(records), len(records)):
                progress.report(f"batch {batch}, {what}: {TITLES[name]}", share)
                record = records[name]
                if record.problem:
                    continue
                if number:
                    record.take_turn(golden, batch, request.seconds)
                else:
                    record.run_golden(golden, batch)
    for peaks in progress.peaks:
        peaks.release()


def _profiled(
    records: dict[str, _RunnerRecord], golden: GoldenBatch, batches: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Seconds by module at the largest batch size, for runners with a profiler; one whose profiler fails is left
    out.
    """
    inputs = golden.inputs[np.arange(batches[-1]) % len(golden.inputs)]
    seconds: dict[str, dict[str, float]] = {}
    for name, record in records.items():
        if not record.problem:
            with contextlib.suppress(UnavailableError):
                seconds[name] = record.worker.profile(inputs)
    return seconds


@dataclasses.dataclass(frozen=True)
class _LeastTimes:
    """Roofline times of the graph's products, by batch size and device."""

    layers: Mapping[int, Sequence[Layer]]
    limits: Mapping[str, Mapping[str, float]]

    def seconds(self, batch: int, device: str) -> float | None:
        limits = self.limits[device]
        if not limits:
            return None
        return sum(layer.least_seconds(limits["flops"], limits["bytes"]) for layer in self.layers[batch])


def _runner(
    name: str,
    records: dict[str, _RunnerRecord],
    least: _LeastTimes,
    modules: dict[str, dict[str, float]],
    request: BenchmarkRequest,
) -> RunnerResult:
    record = records[name]
    timings = tuple(_timing(record, records.get(EAGER), batch, least) for batch in record.runs)
    must_be_right = name not in (*IN_BF16, *PLAIN) or name in request.names
    seconds = modules.get(name, {})
    return RunnerResult(
        *(name, record.accuracy, timings, seconds, record.problem, record.worker.device, must_be_right),
        open_s=record.worker.open_s,
    )


def _timing(record: _RunnerRecord, eager: _RunnerRecord | None, batch: int, least: _LeastTimes) -> Timing:
    latency, compared = Latency.of(record.runs[batch]), None
    if eager is not None and eager is not record and len(eager.medians.get(batch, ())) == len(record.medians[batch]):
        compared = ratio(record.medians[batch], eager.medians[batch])
    seconds = least.seconds(batch, record.worker.device)
    share = None if seconds is None else seconds / latency.median
    error = record.errors[batch].rel_l2
    medians = tuple(record.medians[batch])
    return Timing(batch, latency, record.peak_bytes[batch], record.first_s[batch], compared, share, error, medians)


_GPU_QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,memory.used"
_GEMM, _COPY_BYTES, _PEAK_S = 1024, 256 << 20, 0.15


def machine_facts(threads: int) -> dict[str, Any]:
    """Everything about this machine that latencies depend on, before the benchmark. Plain JSON."""
    return {
        "processor": processor_name(),
        "flags": sorted(cpu_flags()),
        "cores": available_threads(),
        "threads": threads,
        "load_before": load(),
        "versions": tool_versions() | ({"openvino": found} if (found := installed("openvino")) else {}),
        "gpus": gpus(),
    }


def facts_after() -> dict[str, Any]:
    """The load after the benchmark, and clocks and memory of the GPUs while the runners are still open. Plain JSON."""
    return {"load_after": load(), "gpus_after": gpus()}


def load() -> float | None:
    """The load average of the last minute: processes that wanted a core. None on Windows, which does not count them."""
    average = load_average()
    return None if average is None else round(average, 2)


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi reports of each GPU, clocks included; empty without nvidia-smi, or where it does not answer."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    command = [program, f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # a driver that hangs is no reason not to measure
        return []
    keys = _GPU_QUERY.split(",")
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]


class Peaks:
    """Peak performance of a device: FP32 matrix products (FLOP/s) and copies in its memory (bytes/s, read plus
    written).

    Measured again between the rounds, because the machine may be busy at any one time; the best result counts. Empty
    for a GPU that the installed PyTorch cannot use.
    """

    def __init__(self, threads: int, device: str = "cpu") -> None:
        self.best: dict[str, float] = {}
        self._threads = threads
        self._device = device
        self._work: dict[str, tuple[float, Callable[[], Any]]] = {}

    def measure(self) -> None:
        """Measure once, which takes some tenths of a second. The first call imports torch and allocates half a
        gigabyte.
        """
        import torch

        if self._device != "cpu" and not torch.cuda.is_available():
            return
        self._work = self._work or self._prepared()
        with torch_threads(self._threads):
            for name, (amount, work) in self._work.items():
                self.best[name] = max(self.best.get(name, 0.0), amount / shortest(work, self._device))

    def release(self) -> None:
        """Free the memory that `measure` allocated."""
        self._work = {}

    def _prepared(self) -> dict[str, tuple[float, Callable[[], Any]]]:
        """For each peak: how many operations or bytes its piece of work has, and the work."""
        import torch

        size = _GEMM if self._device == "cpu" else 4 * _GEMM
        left, right = (torch.rand(size, size, device=self._device) for _ in range(2))
        source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return {
            "flops": (2.0 * size**3, lambda: torch.mm(left, right)),
            "bytes": (2.0 * _COPY_BYTES, lambda: target.copy_(source)),
        }


def shortest(work: Callable[[], Any], device: str) -> float:
    """Seconds of the shortest of at least three runs; on a GPU each run is synchronized."""
    import torch

    wait: Callable[[], Any] = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    work()
    wait()
    times: list[float] = []
    end = time.perf_counter() + _PEAK_S
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)

"""Runners in turn, round after round: what the machine does besides meets all of them alike."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.benchmark import runners as contestants
from spach_deploy.benchmark.layers import Layer, layers
from spach_deploy.benchmark.machine import Peaks, facts_after, machine_facts
from spach_deploy.benchmark.result import Benchmark, Latency, LogitsError, RunnerResult, Timing, ratio
from spach_deploy.benchmark.runners import CPU, EAGER, GPU, IN_BF16, TITLES, TORCH, RunnerSetup, lacks_weights
from spach_deploy.benchmark.worker import RunnerProcess
from spach_deploy.bundle.golden import LOGITS, Golden
from spach_deploy.bundle.store import GOLDEN, GRAPH, Bundle
from spach_deploy.common.errors import UnavailableError, UsageError
from spach_deploy.common.metrics import worst_relative_l2
from spach_deploy.options.specs import BatchProfile
from spach_deploy.validation.bundle_facts import BundleFacts
from spach_deploy.validation.tolerance import Bounds, ToleranceSet

Array = npt.NDArray[Any]
OnProgress = Callable[[str, float], None]
"""What is under way, and the share that is done."""


@dataclasses.dataclass(frozen=True)
class BenchmarkRequest:
    """What to measure. `batches` and `names` empty: those of the profile that suit a CPU, and all that can run here.

    `seconds`: of each runner's turn in each of `rounds`, for each batch.
    """

    setup: RunnerSetup
    batches: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    rounds: int = 5
    seconds: float = 1.0


@dataclasses.dataclass
class _Entry:
    """A runner's worker, and what it did so far, by batch: medians of its turns, all its runs, peak memory, errors."""

    worker: RunnerProcess
    bounds: Bounds
    medians: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    runs: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    peak_bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    first_s: dict[int, float] = dataclasses.field(default_factory=dict)
    errors: dict[int, LogitsError] = dataclasses.field(default_factory=dict)
    problem: str = ""

    def answer(self, golden: Golden, batch: int) -> None:
        """All golden images in such batches, before the first turn: whether it is right, and what it has to compile."""
        with self._failing_at(batch):
            answers = self.worker.answers(golden.input, batch)
            self.first_s[batch] = answers.first_s
            self._compare(batch, answers.logits, golden.logits)

    def take_turn(self, golden: Golden, batch: int, seconds: float) -> None:
        """One turn at this batch, its last answer held against the golden one too."""
        chosen = np.arange(batch) % len(golden.input)
        with self._failing_at(batch):
            turn = self.worker.turn(golden.input[chosen], seconds)
            self.medians.setdefault(batch, []).append(float(np.median(turn.seconds)))
            self.runs.setdefault(batch, []).extend(turn.seconds)
            self.peak_bytes[batch] = turn.peak_bytes
            self._compare(batch, turn.logits, golden.logits[chosen])

    @property
    def accuracy(self) -> LogitsError:
        """The worst of all batches."""
        return max(self.errors.values(), key=lambda error: error.rel_l2)

    def _compare(self, batch: int, answers: Array, exact: Array) -> None:
        found = [*([self.errors[batch]] if batch in self.errors else []), accuracy(answers, exact, self.bounds)]
        self.errors[batch] = max(found, key=lambda error: error.rel_l2)

    @contextlib.contextmanager
    def _failing_at(self, batch: int) -> Iterator[None]:
        """A runner that fails is out from here on."""
        try:
            yield
        except UnavailableError as error:
            self.problem = f"stopped at batch {batch}: {error}"


def measure(question: BenchmarkRequest, tell: OnProgress = lambda what, share: None) -> Benchmark:
    """Run the benchmark.

    Raises BundleError and UsageError for what cannot be measured, UnavailableError when a runner that was asked for by
    name, or every one, cannot run here.
    """
    bundle = Bundle.open(question.setup.bundle)
    facts, golden = BundleFacts.of(bundle), Golden.load(bundle.file(GOLDEN))
    batches = chosen_batches(question.batches, facts.batch)
    skipped = _skipped(question, bundle)
    machine = machine_facts(question.setup.threads)
    with contextlib.ExitStack() as stack:
        entries = _opened(stack, question, facts.tolerances, skipped, tell)
        limits = {device: Peaks(question.setup.threads, device) for device in _devices(entries)}
        _take_turns(entries, golden, batches, question, _Watched(tell, limits.values()))
        machine |= facts_after()
        _set_aside(entries, question, skipped)
        tell("time by module", 1.0)
        modules = _profiled(entries, golden, batches)
    counted = {batch: layers(bundle.file(GRAPH), batch) for batch in batches}
    peaks = {device: of_device.best for device, of_device in limits.items()}
    return Benchmark(
        str(question.setup.bundle),
        bundle.manifest.model.name,
        bundle.manifest.precision.asked.value,
        batches,
        question.rounds,
        tuple(_runner(name, entries, _Least(counted, peaks), modules, question) for name in entries),
        skipped,
        counted[batches[-1]],
        peaks[CPU],
        machine,
        peaks.get(GPU, {}),
    )


def _devices(entries: Mapping[str, _Entry]) -> list[str]:
    return sorted({CPU, *(entry.worker.device for entry in entries.values())})


def _opened(
    stack: contextlib.ExitStack,
    question: BenchmarkRequest,
    allowed: ToleranceSet,
    skipped: dict[str, str],
    tell: OnProgress,
) -> dict[str, _Entry]:
    """A worker for each runner; one that does not open joins `skipped`, or is an error where it was asked for."""
    entries: dict[str, _Entry] = {}
    for name in _wanted(question, skipped):
        tell(f"open {TITLES[name]}", 0.0)
        worker = RunnerProcess(name, question.setup)
        try:
            stack.enter_context(worker)
            entries[name] = _Entry(worker, allowed.engine if worker.device == GPU else allowed.graph)
        except UnavailableError as error:
            _skip(name, str(error), question, skipped)
    return entries


def _skip(name: str, reason: str, question: BenchmarkRequest, skipped: dict[str, str]) -> None:
    if name in question.names:
        raise UnavailableError(f"{TITLES[name]} cannot run here: {reason}.")
    skipped[name] = reason


def _set_aside(entries: dict[str, _Entry], question: BenchmarkRequest, skipped: dict[str, str]) -> None:
    """What did not finish one turn was not measured; UnavailableError where that is everything, or was asked for."""
    for name in [name for name, entry in entries.items() if not entry.runs]:
        _skip(name, entries.pop(name).problem, question, skipped)
    if not entries:
        reasons = "; ".join(f"{TITLES[name]}: {reason}" for name, reason in skipped.items())
        raise UnavailableError(f"Nothing here can run this bundle. {reasons}.", "See spach-doctor.")


def chosen_batches(asked: Sequence[int], profile: BatchProfile) -> tuple[int, ...]:
    """Those asked for, or the smallest and the usual one; UsageError for one that the engine would refuse."""
    batches = tuple(sorted({*asked})) or tuple(sorted({profile.min, profile.opt}))
    for batch in batches:
        if not profile.min <= batch <= profile.max:
            raise UsageError(
                f"The bundle takes batches of {profile.min} to {profile.max}, not {batch}.",
                "Give others, or export with another --batch.",
            )
    return batches


def _skipped(question: BenchmarkRequest, bundle: Bundle) -> dict[str, str]:
    """What cannot run here, with the reason; for what was asked for by name UnavailableError, or UsageError where the
    user has to give more.
    """
    reasons = {name: contestants.why_not(name, question.setup, bundle) for name in question.names or TITLES}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    for name in question.names:
        if name in skipped:
            kind = UsageError if name in TORCH and lacks_weights(question.setup, bundle) else UnavailableError
            raise kind(f"{TITLES[name]} cannot run here: {skipped[name]}.")
    return skipped


def _wanted(question: BenchmarkRequest, skipped: dict[str, str]) -> Iterable[str]:
    return [name for name in question.names or TITLES if name not in skipped]


def accuracy(answers: Array, exact: Array, bounds: Bounds) -> LogitsError:
    """Against the golden logits (N, classes), image by image."""
    allowed = bounds.outputs[LOGITS].rel_l2
    if answers.shape != exact.shape or not np.isfinite(answers).all():
        return LogitsError(float("inf"), allowed)
    return LogitsError(worst_relative_l2(answers, exact), allowed)


@dataclasses.dataclass(frozen=True)
class _Watched:
    """Who is told of the progress, and the peaks to measure between the rounds."""

    tell: OnProgress
    peaks: Collection[Peaks]

    def between_rounds(self, share: float) -> None:
        for peaks in self.peaks:
            self.tell("this machine's peaks", share)
            peaks.measure()


def _take_turns(
    entries: dict[str, _Entry], golden: Golden, batches: Sequence[int], question: BenchmarkRequest, watched: _Watched
) -> None:
    """Every batch, in every round every runner, in an order of chance."""
    chance = random.Random(0)
    steps = len(batches) * (1 + question.rounds)
    for index, batch in enumerate(batches):
        for number in range(1 + question.rounds):
            what = f"round {number} of {question.rounds}" if number else "answers"
            share = (index * (1 + question.rounds) + number) / steps
            watched.between_rounds(share)
            for name in chance.sample(list(entries), len(entries)):
                watched.tell(f"batch {batch}, {what}: {TITLES[name]}", share)
                entry = entries[name]
                if entry.problem:
                    continue
                if number:
                    entry.take_turn(golden, batch, question.seconds)
                else:
                    entry.answer(golden, batch)
    for peaks in watched.peaks:
        peaks.release()


def _profiled(entries: dict[str, _Entry], golden: Golden, batches: Sequence[int]) -> dict[str, dict[str, float]]:
    """Seconds by module, of those that can tell, at the largest batch; nothing where that fails, which is no fault."""
    inputs = golden.input[np.arange(batches[-1]) % len(golden.input)]
    found: dict[str, dict[str, float]] = {}
    for name, entry in entries.items():
        if not entry.problem:
            with contextlib.suppress(UnavailableError):
                found[name] = entry.worker.profile(inputs)
    return found


@dataclasses.dataclass(frozen=True)
class _Least:
    """The least seconds that the products take, by batch and device."""

    layers: Mapping[int, Sequence[Layer]]
    limits: Mapping[str, Mapping[str, float]]

    def seconds(self, batch: int, device: str) -> float | None:
        limits = self.limits[device]
        if not limits:
            return None
        return sum(layer.least_seconds(limits["flops"], limits["bytes"]) for layer in self.layers[batch])


def _runner(
    name: str,
    entries: dict[str, _Entry],
    least: _Least,
    modules: dict[str, dict[str, float]],
    question: BenchmarkRequest,
) -> RunnerResult:
    entry = entries[name]
    timings = tuple(_timing(entry, entries.get(EAGER), batch, least) for batch in entry.runs)
    must_be_right = name not in IN_BF16 or name in question.names
    seconds = modules.get(name, {})
    return RunnerResult(name, entry.accuracy, timings, seconds, entry.problem, entry.worker.device, must_be_right)


def _timing(entry: _Entry, eager: _Entry | None, batch: int, least: _Least) -> Timing:
    latency, compared = Latency.of(entry.runs[batch]), None
    if eager is not None and eager is not entry and len(eager.medians.get(batch, ())) == len(entry.medians[batch]):
        compared = ratio(entry.medians[batch], eager.medians[batch])
    seconds = least.seconds(batch, entry.worker.device)
    share = None if seconds is None else seconds / latency.median
    error = entry.errors[batch].rel_l2
    medians = tuple(entry.medians[batch])
    return Timing(batch, latency, entry.peak_bytes[batch], entry.first_s[batch], compared, share, error, medians)

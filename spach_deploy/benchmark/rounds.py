"""Runners in turn, round after round: what the machine does besides meets all of them alike."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.benchmark import contestants
from spach_deploy.benchmark.contestants import EAGER, ONNX_RUNTIME, TITLES, Setup
from spach_deploy.benchmark.layers import Layer, layers
from spach_deploy.benchmark.machine import machine_facts, peaks
from spach_deploy.benchmark.result import Accuracy, Benchmark, Runner, Timing
from spach_deploy.benchmark.statistics import Latency, ratio
from spach_deploy.benchmark.worker import Turn, Worker
from spach_deploy.bundle import GOLDEN, GRAPH, Bundle
from spach_deploy.errors import UnavailableError, UsageError
from spach_deploy.specs import BatchProfile
from spach_deploy.validation.bundle_facts import BundleFacts
from spach_deploy.validation.reference import LOGITS, Golden
from spach_deploy.validation.tolerance import Bounds

Array = npt.NDArray[Any]
Tell = Callable[[str, float], None]
"""What is under way, and the share that is done."""

_GOLDEN_IMAGES, _ANSWER_BATCH = 8, 4


@dataclasses.dataclass(frozen=True)
class Question:
    """What to measure. `batches` and `names` empty: those of the profile that suit a CPU, and all that can run here.

    `seconds`: of each runner's turn in each of `rounds`, for each batch.
    """

    setup: Setup
    batches: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    rounds: int = 5
    seconds: float = 1.0
    seed: int = 0


@dataclasses.dataclass
class _Entry:
    """A runner's worker, and what it did so far: medians of its turns and all its runs, by batch."""

    worker: Worker
    accuracy: Accuracy
    medians: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    runs: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    firsts: dict[int, Turn] = dataclasses.field(default_factory=dict)
    problem: str = ""

    def take_turn(self, inputs: Array, seconds: float) -> None:
        """One turn at this batch; a runner that fails is out from here on."""
        batch = len(inputs)
        try:
            turn = self.worker.turn(inputs, seconds)
        except UnavailableError as error:
            self.problem = f"stopped at batch {batch}: {error}"
            return
        self.medians.setdefault(batch, []).append(float(np.median(turn.seconds)))
        self.runs.setdefault(batch, []).extend(turn.seconds)
        self.firsts.setdefault(batch, turn)


def measure(question: Question, tell: Tell = lambda what, share: None) -> Benchmark:
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
        entries: dict[str, _Entry] = {}
        for name in _wanted(question, skipped):
            tell(f"open {TITLES[name]}", 0.0)
            worker = Worker(name, question.setup)
            try:
                entries[name] = _entered(stack.enter_context(worker), golden, facts.tolerances.graph)
            except UnavailableError as error:
                if question.names:
                    raise UnavailableError(f"{TITLES[name]} cannot run here: {error}.") from None
                skipped[name] = str(error)
        if not entries:
            reasons = "; ".join(f"{TITLES[name]}: {reason}" for name, reason in skipped.items())
            raise UnavailableError(f"Nothing here can run this bundle. {reasons}.", "See spach-doctor.")
        _take_turns(entries, golden, batches, question, tell)
        modules = _profiled(entries, golden, batches[-1])
    counted = {batch: layers(bundle.file(GRAPH), batch) for batch in batches}
    limits = peaks(question.setup.threads)
    least = {batch: _least_seconds(counted[batch], limits) for batch in batches}
    return Benchmark(
        str(question.setup.bundle),
        str(bundle.manifest.model["name"]),
        bundle.manifest.precision,
        batches,
        question.rounds,
        tuple(_runner(name, entries, least, modules) for name in entries),
        skipped,
        counted[batches[-1]],
        limits,
        machine,
    )


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


def _skipped(question: Question, bundle: Bundle) -> dict[str, str]:
    """What cannot run here, with the reason; UnavailableError for what was asked for by name."""
    reasons = {name: contestants.why_not(name, question.setup, bundle) for name in question.names or TITLES}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    for name in question.names:
        if name in skipped:
            raise UnavailableError(f"{TITLES[name]} cannot run here: {skipped[name]}.")
    return skipped


def _wanted(question: Question, skipped: dict[str, str]) -> Iterable[str]:
    return [name for name in question.names or TITLES if name not in skipped]


def _entered(worker: Worker, golden: Golden, bounds: Bounds) -> _Entry:
    count = min(len(golden.logits), _GOLDEN_IMAGES)
    parts = [worker.logits(golden.input[i : i + _ANSWER_BATCH]) for i in range(0, count, _ANSWER_BATCH)]
    return _Entry(worker, accuracy(np.concatenate(parts)[:count], golden.logits[:count], bounds))


def accuracy(answers: Array, exact: Array, bounds: Bounds) -> Accuracy:
    """Against the golden logits (N, classes), image by image."""
    allowed = bounds.outputs[LOGITS].rel_l2
    if answers.shape != exact.shape or not np.isfinite(answers).all():
        return Accuracy(float("inf"), allowed)
    errors = np.linalg.norm(answers.astype(np.float64) - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return Accuracy(float(errors.max()), allowed)


def _take_turns(
    entries: dict[str, _Entry], golden: Golden, batches: Sequence[int], question: Question, tell: Tell
) -> None:
    """Every batch, in every round every runner, in an order of chance."""
    chance = random.Random(question.seed)
    turns = len(batches) * question.rounds
    for done, (batch, number) in enumerate((b, r) for b in batches for r in range(question.rounds)):
        inputs = golden.input[np.arange(batch) % len(golden.input)]
        for name in chance.sample(list(entries), len(entries)):
            tell(f"batch {batch}, round {number + 1} of {question.rounds}: {TITLES[name]}", done / turns)
            if not entries[name].problem:
                entries[name].take_turn(inputs, question.seconds)


def _profiled(entries: dict[str, _Entry], golden: Golden, batch: int) -> dict[str, dict[str, float]]:
    entry = entries.get(ONNX_RUNTIME)
    if entry is None or entry.problem:
        return {}
    return {ONNX_RUNTIME: entry.worker.profile(golden.input[np.arange(batch) % len(golden.input)])}


def _least_seconds(found: Sequence[Layer], limits: dict[str, float]) -> float:
    return sum(layer.least_seconds(limits["flops"], limits["bytes"]) for layer in found)


def _runner(
    name: str, entries: dict[str, _Entry], least: dict[int, float], modules: dict[str, dict[str, float]]
) -> Runner:
    entry, eager = entries[name], entries.get(EAGER)
    timings = []
    for batch, runs in entry.runs.items():
        latency = Latency.of(runs)
        compared = None
        if eager is not None and eager is not entry and len(eager.medians.get(batch, ())) == len(entry.medians[batch]):
            compared = ratio(entry.medians[batch], eager.medians[batch])
        first, share = entry.firsts[batch], least[batch] / latency.median
        timings.append(Timing(batch, latency, first.peak_bytes, first.first_s, compared, share))
    return Runner(name, entry.accuracy, tuple(timings), modules.get(name, {}), entry.problem)

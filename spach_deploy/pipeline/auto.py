"""`spach-export --auto`: export a model in FP16, INT8 and FP8, compare the bundles, and recommend one.

The comparison uses what is known without a GPU: number of kernels, bytes moved, size of the plan, relative L2 of the
logits, changed predictions, and the time that follows from the plan's schedule and public figures of the cards it is
for (`engine.cost_model`), which is predicted, not measured. FP16 is recommended, unless another candidate is predicted
to be faster on every card that both are for; where nothing is predicted, unless another has no more kernels and moves
less memory. The recommendation says what only a measurement on the GPU can decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spach_deploy.bundle.schema import KernelsEntry
from spach_deploy.bundle.store import check_target, default_directory
from spach_deploy.common.errors import MismatchError, SpachError, UsageError
from spach_deploy.common.files import Destination
from spach_deploy.common.progress import ExportObserver
from spach_deploy.common.text import escaped
from spach_deploy.engine.cost_model import error_in_words, in_words
from spach_deploy.models.registry import known_name
from spach_deploy.options.specs import ExportOptions, Precision, QuantizationSpec
from spach_deploy.pipeline.export import ExportResult, export
from spach_deploy.pipeline.scheduler import Scheduler

CANDIDATES = (Precision.FP16, Precision.INT8, Precision.FP8)


@dataclasses.dataclass(frozen=True)
class PrecisionCandidate:
    """One precision: its bundle and figures, or why there is none. `rel_l2`: of the logits over all golden images.
    `predicted_ms`: by card.
    """

    precision: Precision
    bundle: Path | None = None
    rel_l2: float | None = None
    top1_agreement: float | None = None
    kernels: int | None = None
    bytes_moved: int | None = None
    plan_bytes: int | None = None
    batch: int | None = None
    predicted_ms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    problem: str = ""

    def keeps(self, bound: float | None) -> bool:
        """Whether there is a bundle and its relative L2 is within `bound`; None accepts every bundle."""
        return self.rel_l2 is not None and (bound is None or self.rel_l2 <= bound)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        named = {"precision": self.precision.value, "bundle": None if self.bundle is None else str(self.bundle)}
        return {**dataclasses.asdict(self), **named}


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """All candidates, the recommended one (None where none keeps the bound), and the reasons in sentences."""

    candidates: tuple[PrecisionCandidate, ...]
    chosen: PrecisionCandidate | None
    bound: float | None
    reasons: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 with a recommendation, 1 without."""
        return 0 if self.chosen else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "candidates": [
                {**entry.to_dict(), "pareto": entry in pareto(self.candidates)} for entry in self.candidates
            ],
            "recommended": None if self.chosen is None else self.chosen.precision.value,
            "bound_rel_l2": self.bound,
            "reasons": list(self.reasons),
        }


def check_auto(options: ExportOptions) -> None:
    """UsageError for options that contradict --auto, before any work."""
    if options.quantization.calibration is None:
        raise UsageError(
            "--auto compares FP16 with eight bits, and these need images to calibrate on.",
            "Give --calibration DIR, or choose --fp16 yourself.",
        )
    if options.quantization.max_drop is not None:
        raise UsageError(
            "--auto judges by relative L2; --max-drop needs labels.", "Give --max-rel-l2, or --int8 --max-drop."
        )


def recommend(
    options: ExportOptions, observer: ExportObserver | None = None, scheduler: Scheduler | None = None
) -> Recommendation:
    """Export every candidate and compare them. UsageError for options that no candidate could honour."""
    check_auto(options)
    targets = {precision: _destination(options_for(options, precision)) for precision in CANDIDATES}
    candidates = tuple(_candidate(options, precision, observer, to, scheduler) for precision, to in targets.items())
    if not any(entry.bundle for entry in candidates):
        raise MismatchError(
            f"No precision could be exported: {candidates[0].problem}", "Export one of them by itself to see more."
        )
    return judge_candidates(candidates, options.quantization.max_rel_l2)


def _destination(options: ExportOptions) -> Destination | None:
    """Where a candidate's bundle goes; None where that is not known yet. BundleError where it cannot be written."""
    return None if options.output is None else check_target(options.output, overwrite=options.overwrite)


def _candidate(
    options: ExportOptions,
    precision: Precision,
    observer: ExportObserver | None,
    destination: Destination | None,
    scheduler: Scheduler | None,
) -> PrecisionCandidate:
    own = options_for(options, precision)
    try:
        return _figures(precision, export(own, observer, destination=destination, scheduler=scheduler))
    except UsageError as error:
        if precision is Precision.FP8:  # GPUs before Ada
            return PrecisionCandidate(precision, problem=str(error))
        raise
    except MismatchError as error:
        return PrecisionCandidate(precision, problem=str(error))
    except SpachError as error:
        if precision is CANDIDATES[0]:
            raise
        return PrecisionCandidate(precision, problem=str(error))


def options_for(options: ExportOptions, precision: Precision) -> ExportOptions:
    """Options of one candidate: a bundle of its own, and calibration only for int8 and fp8."""
    output = options.output / precision.value if options.output is not None else None
    if output is None and (name := known_name(options.model)) is not None:
        output = default_directory(name, precision.value)
    quantization = options.quantization if precision.is_quantized else QuantizationSpec()
    return dataclasses.replace(options, precision=precision, output=output, quantization=quantization)


def _figures(precision: Precision, result: ExportResult) -> PrecisionCandidate:
    comparison = result.validation.evidence[-1].comparison
    first = comparison.outputs[0]  # of a classifier the logits
    engine = result.bundle.manifest.engine
    kernels = engine.kernels or KernelsEntry()
    return PrecisionCandidate(
        precision=precision,
        bundle=result.bundle.path,
        rel_l2=first.rel_l2,
        top1_agreement=None if first.scores is None else first.scores.top1_agreement,
        kernels=kernels.total,
        bytes_moved=kernels.bytes_moved,
        plan_bytes=engine.bytes,
        batch=kernels.batch,
        predicted_ms=kernels.predicted_ms,
    )


def pareto(candidates: tuple[PrecisionCandidate, ...]) -> tuple[PrecisionCandidate, ...]:
    """The Pareto front: the candidates that no other dominates in the known figures."""
    known = [entry for entry in candidates if entry.bundle is not None]
    return tuple(entry for entry in known if not any(_dominates(other, entry) for other in known))


def _dominates(one: PrecisionCandidate, other: PrecisionCandidate) -> bool:
    pairs = [
        (one.rel_l2, other.rel_l2),
        (one.kernels, other.kernels),
        (one.bytes_moved, other.bytes_moved),
        (one.plan_bytes, other.plan_bytes),
    ]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return all(a <= b for a, b in known) and any(a < b for a, b in known)


def judge_candidates(candidates: tuple[PrecisionCandidate, ...], bound: float | None) -> Recommendation:
    """Choose among the candidates that keep the bound, and give the reasons."""
    fitting = [entry for entry in candidates if entry.keeps(bound)]
    if not fitting:
        least = min((entry.rel_l2 for entry in candidates if entry.rel_l2 is not None), default=float("nan"))
        reason = f"No precision stays within a relative L2 of {bound:g}; the closest has {least:.2g}. Stay with --fp32."
        return Recommendation(candidates, None, bound, (reason,))
    first = fitting[0]
    better = [entry for entry in fitting[1:] if _is_better(entry, first)]
    chosen = min(better, key=lambda entry: _share_of_time(entry, first) or entry.bytes_moved or 0) if better else first
    return Recommendation(candidates, chosen, bound, tuple(_reasons(candidates, chosen, first, bound)))


def _is_better(one: PrecisionCandidate, other: PrecisionCandidate) -> bool:
    """Whether `one` is predicted to be faster on every card that both are for; where none is known, whether it is
    lighter.
    """
    common = one.predicted_ms.keys() & other.predicted_ms.keys()
    if not common:
        return _is_lighter(one, other)
    return all(one.predicted_ms[card] < other.predicted_ms[card] for card in common)


def _share_of_time(one: PrecisionCandidate, other: PrecisionCandidate) -> float:
    """Predicted time of `one` over that of `other`, the mean over the cards that both are for; 0 without any."""
    common = one.predicted_ms.keys() & other.predicted_ms.keys()
    shares = [one.predicted_ms[card] / other.predicted_ms[card] for card in common]
    return sum(shares) / len(shares) if shares else 0.0


def _is_lighter(one: PrecisionCandidate, other: PrecisionCandidate) -> bool:
    """Whether `one` has no more kernels than `other` and moves less memory; False where that is not known."""
    if None in (one.kernels, other.kernels, one.bytes_moved, other.bytes_moved):
        return False
    assert one.kernels is not None
    assert other.kernels is not None
    assert one.bytes_moved is not None
    assert other.bytes_moved is not None
    return one.kernels <= other.kernels and one.bytes_moved < other.bytes_moved


def _reasons(
    candidates: tuple[PrecisionCandidate, ...],
    chosen: PrecisionCandidate,
    first: PrecisionCandidate,
    bound: float | None,
) -> Iterator[str]:
    name = chosen.precision.value
    if chosen is not first and (share := _share_of_time(chosen, first)):
        yield (
            f"{name} is predicted to take {share:.0%} of the time of {first.precision.value}, the mean over"
            f" {len(chosen.predicted_ms)} cards, and less on each, within the bound."
        )
    elif chosen is not first:
        yield f"{name} has no more kernels than {first.precision.value} and moves less memory, within the bound."
    elif bound is not None:
        yield f"{name} stays within a relative L2 of {bound:g}."
    else:
        yield f"{name} is the closest to PyTorch, and nothing that is known without a GPU is against it."
    for entry in candidates:
        if entry is chosen:
            continue
        if entry.bundle is None:
            yield f"{entry.precision.value} could not be had: {entry.problem}"
        elif not entry.keeps(bound):
            yield f"{entry.precision.value} changes the logits by {entry.rel_l2:.2g}, more than {bound:g}."
        elif entry.precision.is_quantized:
            yield from _against(entry, first)
    yield "Kernels and bytes are the compiler's word. Which is faster, a stopwatch on the card decides: measure both."
    if chosen.predicted_ms:
        yield error_in_words()


def _against(entry: PrecisionCandidate, half: PrecisionCandidate) -> Iterator[str]:
    name, other = entry.precision.value, half.precision.value
    if entry.kernels is None or half.kernels is None or entry is half:
        yield f"{name} halves the weights' memory; whether it is faster is not known without an engine."
        return
    if common := sorted(entry.predicted_ms.keys() & half.predicted_ms.keys()):
        shares = [entry.predicted_ms[card] / half.predicted_ms[card] for card in common]
        yield (
            f"{name} is predicted to take {min(shares):.0%} to {max(shares):.0%} of the time of {other}, by card"
            f" ({entry.kernels} kernels against {half.kernels})."
        )
        return
    moved = ""
    if entry.bytes_moved and half.bytes_moved:
        moved = f" and moves {entry.bytes_moved / half.bytes_moved:.0%} of the bytes"
    yield (
        f"{name} does its products in half the time at best, but has {entry.kernels} kernels against {half.kernels} in"
        f" {other}{moved}: it wins where arithmetic is what takes the time, at large batches."
    )


def as_table(recommendation: Recommendation) -> str:
    """The candidates as a table for the terminal, and the reasons."""
    lines = ["          rel. L2   top-1 kept   kernels   MB moved   plan MB   bundle"]
    best = pareto(recommendation.candidates)
    for entry in recommendation.candidates:
        mark = "->" if entry is recommendation.chosen else " *" if entry in best else "  "
        lines.append(f"{mark} {entry.precision.value:<5} {_row(entry)}")
    lines += [
        f"{entry.precision.value:>8} {said}"
        for entry in recommendation.candidates
        if (said := in_words(entry.predicted_ms, entry.batch))
    ]
    lines += ["", "-> recommended, * not beaten in everything that is known", "", *recommendation.reasons]
    return escaped(lines)


def _row(entry: PrecisionCandidate) -> str:
    if entry.bundle is None:
        return entry.problem
    agreement = "" if entry.top1_agreement is None else f"{entry.top1_agreement:.1%}"
    moved = "" if entry.bytes_moved is None else f"{entry.bytes_moved / 1e6:,.0f}"
    size = "" if entry.plan_bytes is None else f"{entry.plan_bytes / 1e6:.1f}"
    kernels = "" if entry.kernels is None else str(entry.kernels)
    return f"{entry.rel_l2:9.2e} {agreement:>12} {kernels:>9} {moved:>10} {size:>9}   {entry.bundle}"

"""Judge a comparison: each figure against a tolerance, and each problem a finding.

    verdict = judge(comparison, {"logits": Tolerance(rel_l2=2e-3, flip_margin=0.05, origin="measured")})

`compare` measures; this module alone decides what passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from spach_deploy.common.errors import UsageError
from spach_deploy.validation.compare import Comparison, Flip, IndexComparison, OutputComparison, Record, label, listed


@dataclasses.dataclass(frozen=True)
class Tolerance(Record):
    """How far one output may differ.

    `rel_l2` and `cosine_min` hold for every single image. `max_abs` and `flip_margin` are in units of the output; an
    image may flip where its reference margin is at most `flip_margin`. `origin`: in words, how the numbers were
    derived. Raises UsageError for numbers with which nothing could fail.
    """

    rel_l2: float
    max_abs: float | None = None
    cosine_min: float | None = None
    flip_margin: float = 0.0
    origin: str = ""

    def __post_init__(self) -> None:
        for field in ("rel_l2", "max_abs", "flip_margin"):
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"A tolerance of {field}={value} means nothing.", "Give a number of 0 or more.")
        if self.cosine_min is not None and not -1 <= self.cosine_min <= 1:
            raise UsageError(f"cosine_min={self.cosine_min} is no cosine.", "Give a number from -1 to 1.")


@dataclasses.dataclass(frozen=True)
class Verdict(Record):
    """Whether a comparison passed. `findings`: why not, one sentence each."""

    passed: bool
    findings: tuple[str, ...]


def judge(comparison: Comparison, tolerances: Mapping[str, Tolerance]) -> Verdict:
    """Judge `comparison` by one tolerance for each output.

    Findings are: every problem, an output without a tolerance, a tolerance without its output, and every figure beyond
    its tolerance. An integer output needs no tolerance of its own where it ranks an output that has one.
    """
    findings = list(comparison.problems)
    for output in comparison.outputs:
        findings += _judge_output(output, tolerances.get(output.name))
    for index in comparison.indices:
        findings += _judge_index(index, tolerances.get(index.name) or tolerances.get(index.ranks or ""))
    compared = {o.name for o in comparison.outputs} | {i.name for i in comparison.indices}
    if not compared and not findings:
        findings.append("No output was compared.")
    if not comparison.problems:
        findings += [f"Output '{n}' has a tolerance and was not compared." for n in tolerances if n not in compared]
    return Verdict(not findings, tuple(findings))


def _judge_output(output: OutputComparison, tolerance: Tolerance | None) -> list[str]:
    if tolerance is None:
        return [f"Output '{output.name}' has no tolerance, so nothing can be said of it."]
    findings = [*_judge_figures(output, tolerance), *_judge_flips(output, tolerance)]
    if findings and output.resembles:
        findings.append(f"Output '{output.name}' looks like the reference's '{output.resembles}': were they swapped?")
    return findings


def _judge_figures(output: OutputComparison, tolerance: Tolerance) -> Iterator[str]:
    """Compares by `not a <= b` rather than `a > b`, so that NaN does not pass."""
    origin = f" ({tolerance.origin})" if tolerance.origin else ""
    if not output.rel_l2_worst <= tolerance.rel_l2:
        yield (
            f"Output '{output.name}': relative L2 is {output.rel_l2_worst:.3g} in "
            f"{label(output.worst_image, output.worst_name)} and "
            f"{output.rel_l2:.3g} overall; {tolerance.rel_l2:.3g} is allowed{origin}."
        )
    if tolerance.max_abs is not None and not output.max_abs <= tolerance.max_abs:
        yield (
            f"Output '{output.name}': the largest absolute error is {output.max_abs:.3g}; "
            f"{tolerance.max_abs:.3g} is allowed{origin}."
        )
    if tolerance.cosine_min is not None and not output.cosine_worst >= tolerance.cosine_min:
        yield (
            f"Output '{output.name}': the smallest cosine of an image is {output.cosine_worst:.6g}; "
            f"{tolerance.cosine_min:.6g} is required{origin}."
        )


def _judge_flips(output: OutputComparison, tolerance: Tolerance) -> list[str]:
    flips = output.scores.flips if output.scores else ()
    bad = [flip for flip in flips if not flip.reference_margin <= tolerance.flip_margin]
    if not bad:
        return []
    return [
        f"Output '{output.name}': {len(bad)} of {output.shape[0]} images change class although the reference "
        f"prefers its own by more than {tolerance.flip_margin:.3g}: {listed([_described(f) for f in bad])}."
    ]


def _judge_index(index: IndexComparison, tolerance: Tolerance | None) -> list[str]:
    margin = tolerance.flip_margin if tolerance else 0.0
    bad = [d for d in index.differences if d.gap is None or not d.gap <= margin]
    if not bad:
        return []
    shown = listed([f"{label(d.image, d.name)} rank {d.rank}: {d.candidate} for {d.reference}" for d in bad])
    return [f"Output '{index.name}': {len(bad)} indices differ by more than a tie: {shown}."]


def _described(flip: Flip) -> str:
    classes = f"from {flip.reference_class} to {flip.candidate_class}"
    return f"{label(flip.image, flip.name)} {classes}, margin {flip.reference_margin:.3g}"

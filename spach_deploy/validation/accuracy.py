"""Accuracy of the reference and of the exported model on the same labelled images, and whether their difference is
chance.

    measured = paired(reference_logits, candidate_logits, labels)
    measured.sentence()

Both models see the same images, so only images that one classifies right and the other wrong tell them apart. From
these follow

- the 95 % confidence interval of the drop: Tango's score interval for the difference of two paired proportions (T.
  Tango, Statistics in Medicine 17, 1998, 891-908), which keeps its level with few such images, even with none;
- McNemar's exact test: without a difference between the two, each such image is a fair coin (Q. McNemar, Psychometrika
  12, 1947, 153-157, with binomial tails instead of the chi-squared approximation).

`notable_predictions` chooses the images to show in a report: those whose best class changed; without any, those that
came closest to it.

A picture with both best classes says more about a flip than its figures do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.common.batches import ranges
from spach_deploy.common.errors import UsageError
from spach_deploy.validation.compare import Record

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]

LEVEL = 0.95
METHODS = "Tango's score interval for paired proportions (1998); McNemar's exact test, two-sided"
ASKED_POINTS = 1.0
"""The drop, in points, that the images should be able to show where `--max-drop` does not say another."""

TOP = 5
_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
_LIKELY = 1 - LEVEL
_STEPS = 200  # of bisection: more than a float64 has bits, so that limits are exact to its last
_CHANCE = 0.01
_CHUNK = 4096  # images that are ranked at a time


# What was measured


@dataclasses.dataclass(frozen=True)
class PairedAccuracy:
    """Accuracy of two models on the same `images`.

    `top1_*`, `top5_*`: shares of images whose class is the best, or among the best five (None with five classes or
    fewer). `drop_points`: top-1 of the reference minus that of the candidate, in percentage points, so that a loss is
    positive; `interval`: its 95 % confidence interval. `only_reference_right`, `only_candidate_right`: images that only
    one classifies right (top-1). `p_value`: McNemar's exact test of these, two-sided.
    """

    images: int
    classes: int
    top1_reference: float
    top1_candidate: float
    top5_reference: float | None
    top5_candidate: float | None
    drop_points: float
    interval: tuple[float, float]
    only_reference_right: int
    only_candidate_right: int
    p_value: float
    top5_drop_points: float | None
    top5_interval: tuple[float, float] | None

    def sentence(self) -> str:
        """The difference in top-1, its interval, and whether chance explains it."""
        start = f"Top-1 {_move(self.drop_points)} ({interval_in_words(self.interval)}): "
        if not self.only_reference_right + self.only_candidate_right:
            return f"{start}not one of {_images(self.images)} is right with one and wrong with the other."
        return (
            f"{start}{self.only_reference_right:,} of {_images(self.images)} only PyTorch gets right, "
            f"{self.only_candidate_right:,} only the candidate, which "
            f"{'is more than chance' if self.p_value < _LIKELY else 'may be chance'} (McNemar's exact p = "
            f"{self.p_value:.2g})."
        )

    @property
    def visible_points(self) -> float:
        """The smallest drop, in points, that this many images can show: half the interval's width."""
        return (self.interval[1] - self.interval[0]) / 2

    def images_for(self, points: float) -> int:
        """How many images would show a drop of `points`, if the models differ as often as here; rounded up to two
        digits.
        """
        share_lost, share_gained = (n / self.images for n in (self.only_reference_right, self.only_candidate_right))

        def is_enough(images: int) -> bool:
            low, high = tango_interval(share_lost * images, share_gained * images, images)
            return 100 * (high - low) / 2 <= points

        enough = 1
        while not is_enough(enough):
            enough *= 2
        return _rounded_up(_first(is_enough, enough // 2, enough))

    def too_few(self, points: float = ASKED_POINTS) -> str:
        """A sentence where these images cannot tell a drop of `points` from none; else empty."""
        low, high = self.interval
        if self.visible_points <= points or low > points or high <= points:
            return ""
        return (
            f"With {_images(self.images)} a drop below {self.visible_points:.2g} points cannot be seen; to see one of "
            f"{points:g} {'point' if points == 1 else 'points'}, give {self.images_for(points):,} images or more."
        )

    @property
    def is_guessing(self) -> bool:
        """Whether the reference is right no more often than a constant answer. Then the labels are probably of
        something else.
        """
        right = round(self.top1_reference * self.images)
        return upper_tail(right, self.images, 1 / self.classes) > _CHANCE

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def paired(reference_logits: Array, candidate_logits: Array, labels: npt.ArrayLike) -> PairedAccuracy:
    """Compare the accuracy of two sets of logits (N, classes), of any float dtype; `labels` (N) are class indices.

    Among equal scores the lower index ranks first, as in argmax. Logits that are not finite are never right. Raises
    UsageError for other shapes, no image, and labels that are no class indices.
    """
    classes = np.asarray(labels)
    _check_arrays(reference_logits, candidate_logits, classes)
    reference, candidate = (_ranks(logits, classes) for logits in (reference_logits, candidate_logits))
    count = reference_logits.shape[1]
    first = _Pairs.of(reference < 1, candidate < 1)
    five = _Pairs.of(reference < TOP, candidate < TOP) if count > TOP else None
    return PairedAccuracy(
        images=len(classes),
        classes=count,
        top1_reference=first.reference,
        top1_candidate=first.candidate,
        top5_reference=five.reference if five else None,
        top5_candidate=five.candidate if five else None,
        drop_points=first.drop_points,
        interval=first.interval,
        only_reference_right=first.lost,
        only_candidate_right=first.gained,
        p_value=mcnemar_exact(first.lost, first.gained),
        top5_drop_points=five.drop_points if five else None,
        top5_interval=five.interval if five else None,
    )


def _check_arrays(reference: Array, candidate: Array, labels: Array) -> None:
    if reference.ndim != 2 or reference.shape != candidate.shape or labels.shape != reference.shape[:1]:
        shapes = f"{reference.shape}, {candidate.shape} and {labels.shape}"
        raise UsageError(f"Logits and labels of shapes {shapes} do not belong together.", "Give (N, C), (N, C), (N).")
    if not reference.size:
        raise UsageError("There is no labelled image.", "Give at least one.")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= reference.shape[1]:
        raise UsageError("Labels are not class indices.", f"Give integers from 0 to {reference.shape[1] - 1}.")


def _ranks(logits: Array, labels: Array) -> npt.NDArray[np.int64]:
    """The rank (N) of each image's class among its scores, 0 for the best; the last rank where a score is not
    finite.
    """
    parts = ranges(len(logits), _CHUNK)
    return np.concatenate([_ranks_of_some(logits[start:stop], labels[start:stop]) for start, stop in parts])


def _ranks_of_some(logits: Array, labels: Array) -> npt.NDArray[np.int64]:
    scores: Array = logits.astype(np.float32 if logits.dtype.itemsize <= 4 else np.float64)
    own: Array = np.take_along_axis(scores, labels[:, None].astype(np.int64), axis=1)  # (n, 1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & before)).sum(axis=1)
    answered = np.isfinite(scores).all(axis=1)
    return np.asarray(np.where(answered, rank, scores.shape[1]), np.int64)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """How often both, one or the other are right, as shares and counts."""

    images: int
    reference: float
    candidate: float
    lost: int
    gained: int

    @classmethod
    def of(cls, reference: Bools, candidate: Bools) -> _Pairs:
        lost, gained = int((reference & ~candidate).sum()), int((candidate & ~reference).sum())
        return cls(len(reference), float(reference.mean()), float(candidate.mean()), lost, gained)

    @property
    def drop_points(self) -> float:
        return 100 * (self.lost - self.gained) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        low, high = tango_interval(self.lost, self.gained, self.images)
        return 100 * low, 100 * high


# Statistics


def mcnemar_exact(one: int, other: int) -> float:
    """Two-sided p-value of a split of `one + other` fair coins as uneven as this, exact in integers. 1 without
    coins.
    """
    tosses, fewer = one + other, min(one, other)
    if one == other:
        return 1.0
    ways, total = 1, 0
    for heads in range(fewer + 1):
        total += ways
        ways = ways * (tosses - heads) // (heads + 1)
    return 2 * total / (1 << tosses)  # a quotient of integers of any size, rounded once


def tango_interval(lost: float, gained: float, images: float, level: float = LEVEL) -> tuple[float, float]:
    """Confidence interval of (lost - gained) / images; `lost` and `gained` are pairs that differ one way and the other.

    All drops that the score test does not reject: those within z standard errors of the estimate, where the standard
    error assumes that drop. Counts need not be whole, for planning.
    """
    z = _Z if level == LEVEL else NormalDist().inv_cdf(0.5 + level / 2)
    estimate = (lost - gained) / images

    def within(drop: float) -> bool:
        variance = images * (2 * _gained_given(drop, lost, gained, images) + drop * (1 - drop))
        return (lost - gained - images * drop) ** 2 <= z * z * max(variance, 0.0)

    return _edge(within, estimate, -1.0), _edge(within, estimate, 1.0)


def _gained_given(drop: float, lost: float, gained: float, images: float) -> float:
    """The most likely share of gained pairs if the true drop is `drop`: the root of Tango's quadratic, equation 8."""
    a, c = 2 * images, -gained * drop * (1 - drop)
    b = (2 * images - lost + gained) * drop - lost - gained
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    return -2 * c / (b + root) if b > 0 else (root - b) / (2 * a)  # the same root, without cancellation


def _edge(within: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where `within` becomes false between `inside` and `outside`, by bisection."""
    if within(outside):
        return outside
    for _ in range(_STEPS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if within(middle) else (inside, middle)
    return inside


def _first(holds: Callable[[int], bool], below: int, above: int) -> int:
    """The least integer in (below, above] for which `holds` is true; it stays true from there on."""
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if holds(middle) else (middle, above)
    return above


def upper_tail(successes: int, trials: int, chance: float) -> float:
    """Probability of at least `successes` in `trials`, each with probability `chance`."""
    if successes <= 0:
        return 1.0
    if chance >= 1:
        return 1.0
    log_yes, log_no = math.log(chance), math.log1p(-chance)

    def term(k: int) -> float:
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        return math.exp(ways + k * log_yes + (trials - k) * log_no)

    return min(1.0, math.fsum(term(k) for k in range(successes, trials + 1)))


def _rounded_up(count: int) -> int:
    step = int(10 ** max(0, len(str(count)) - 2))
    return -(-count // step) * step


def _move(points: float) -> str:
    if points == 0:
        return "stays the same"
    return f"{'falls' if points > 0 else 'rises'} by {abs(points):.2f} points"


def interval_in_words(interval: tuple[float, float]) -> str:
    """The confidence interval of a drop, for sentences."""
    low, high = interval
    return f"95 % interval of the drop {low:.2f} to {high:.2f} points"


def _images(count: int) -> str:
    return f"{count:,} {'image' if count == 1 else 'images'}"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The accuracy section of a validation. `ran`: what was measured; `labels`: where they come from; `max_drop`: in
    points.
    """

    measured: PairedAccuracy
    ran: str
    labels: str
    max_drop: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def findings(self) -> tuple[str, ...]:
        """The drop, where the estimate exceeds the allowed one."""
        drop = self.measured.drop_points
        if self.max_drop is None or drop <= self.max_drop:
            return ()
        return (
            f"Top-1 accuracy falls by {drop:.2f} points ({interval_in_words(self.measured.interval)}), more than the "
            f"{self.max_drop:g} that --max-drop allows.",
        )

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the figures show, and what they cannot."""
        return tuple(filter(None, (self.measured.sentence(), self._too_few(), self._guessing(), *self.notes)))

    def _too_few(self) -> str:
        asked = self.max_drop or ASKED_POINTS  # no number of images shows that there is no drop at all
        sentence = self.measured.too_few(asked)
        return f"{sentence.rstrip('.')} (--max-images {self.measured.images_for(asked)})." if sentence else ""

    def _guessing(self) -> str:
        if not self.measured.is_guessing:
            return ""
        return (
            f"PyTorch itself is right no more often than a blind choice among {self.measured.classes} classes: the "
            "weights are untrained, the labels count classes in another order, or the images are too few."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            **self.measured.to_dict(),
            "ran": self.ran,
            "labels": self.labels,
            "max_drop": self.max_drop,
            "methods": METHODS,
            "sentences": list(self.sentences),
        }


MOST_FLIPS = 12
MOST_CLOSE = 8

Float64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Ranked(Record):
    """One of an image's best classes: its score, and its softmax probability over all classes."""

    index: int
    score: float
    probability: float


@dataclasses.dataclass(frozen=True)
class ImagePredictions(Record):
    """An image's best classes in both models, best first, with margins in units of the scores.

    For a flip, the margins are those of `compare.Flip`, between the two models' best classes. For other images they are
    between each model's best and second class.
    """

    image: int
    name: str
    flipped: bool
    reference: tuple[Ranked, ...]
    candidate: tuple[Ranked, ...]
    reference_margin: float
    candidate_margin: float


def notable_predictions(
    reference: Array, candidate: Array | None, names: Sequence[str]
) -> tuple[ImagePredictions, ...]:
    """The flips, largest margin first; without any, the images that came closest to one, closest first.

    `reference`, `candidate`: class scores (N, classes) of any float dtype. Empty where they cannot be ranked: no
    candidate, other shapes, fewer than two classes, numbers that are not finite.
    """
    if candidate is None or candidate.shape != reference.shape or reference.ndim != 2 or reference.shape[1] < 2:
        return ()
    if not (np.isfinite(reference).all() and np.isfinite(candidate.astype(np.float64)).all()):
        return ()
    answers = [_predictions_of(i, reference, candidate, names) for i in _notable_images(reference, candidate)]
    return tuple(sorted(answers, key=lambda answer: (-1 if answer.flipped else 1) * answer.reference_margin))


def _notable_images(reference: Array, candidate: Array) -> list[int]:
    own = reference.argmax(axis=1)
    other = candidate.argmax(axis=1)
    rows = np.arange(len(reference))
    margins = reference[rows, own].astype(np.float64) - reference[rows, other]
    flips = np.flatnonzero(margins > 0)  # classes that the reference scores alike are no flip
    if len(flips):
        return [int(i) for i in flips[np.argsort(-margins[flips], kind="stable")][:MOST_FLIPS]]
    return [int(i) for i in np.argsort(_margins(reference), kind="stable")[:MOST_CLOSE]]


def _margins(scores: Array) -> Float64:
    """The margin (N) between each image's best and second class, from scores (N, classes)."""
    best = np.partition(scores.astype(np.float64), -2, axis=1)[:, -2:]
    return np.asarray(best[:, 1] - best[:, 0], np.float64)


def _predictions_of(image: int, reference: Array, candidate: Array, names: Sequence[str]) -> ImagePredictions:
    ours, theirs = reference[image].astype(np.float64), candidate[image].astype(np.float64)
    best, chosen = int(ours.argmax()), int(theirs.argmax())
    flipped = bool(ours[best] > ours[chosen])
    return ImagePredictions(
        image=image,
        name=names[image] if image < len(names) else "",
        flipped=flipped,
        reference=_ranked(ours),
        candidate=_ranked(theirs),
        reference_margin=float(ours[best] - ours[chosen]) if flipped else float(_margins(ours[None])[0]),
        candidate_margin=float(theirs[chosen] - theirs[best]) if flipped else float(_margins(theirs[None])[0]),
    )


def _ranked(scores: Float64) -> tuple[Ranked, ...]:
    """The best classes; among equal scores the lower index comes first."""
    exponents = np.exp(scores - scores.max())
    shares = exponents / exponents.sum()
    best = np.argsort(-scores, kind="stable")[:TOP]
    return tuple(Ranked(int(i), float(scores[i]), float(shares[i])) for i in best)

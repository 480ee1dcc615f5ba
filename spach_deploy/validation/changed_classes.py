"""The images whose answers a reader wants to see: those that change class, or those that come closest to it.

A picture with both sets of best classes says more of a flip than its figures do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from spach_deploy.validation.compare import TOP, Array, Record

MOST_FLIPS = 12
MOST_CLOSE = 8

Float64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Ranked(Record):
    """A class among an image's best: its score, and its probability after a softmax over all classes."""

    index: int
    score: float
    probability: float


@dataclasses.dataclass(frozen=True)
class ImagePredictions(Record):
    """An image's best classes by both, best first, and how clearly each prefers its own.

    The margins of a flip are `compare.Flip`'s: between both best classes. Of others they are those between each one's
    best class and its next. In units of the scores.
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
    """The flips, the surest first; where there is none, the images that came closest to one, the closest first.

    `reference`, `candidate`: class scores (N, classes) of any float dtype. Empty where they cannot be ranked: no
    candidate, other shapes, fewer than two classes, numbers that are not finite.
    """
    if candidate is None or candidate.shape != reference.shape or reference.ndim != 2 or reference.shape[1] < 2:
        return ()
    if not (np.isfinite(reference).all() and np.isfinite(candidate.astype(np.float64)).all()):
        return ()
    answers = [_answer(i, reference, candidate, names) for i in _telling(reference, candidate)]
    return tuple(sorted(answers, key=lambda answer: (-1 if answer.flipped else 1) * answer.reference_margin))


def _telling(reference: Array, candidate: Array) -> list[int]:
    own = reference.argmax(axis=1)
    other = candidate.argmax(axis=1)
    rows = np.arange(len(reference))
    margins = reference[rows, own].astype(np.float64) - reference[rows, other]
    flips = np.flatnonzero(margins > 0)  # classes that the reference scores alike are no flip
    if len(flips):
        return [int(i) for i in flips[np.argsort(-margins[flips], kind="stable")][:MOST_FLIPS]]
    return [int(i) for i in np.argsort(_leads(reference), kind="stable")[:MOST_CLOSE]]


def _leads(scores: Array) -> Float64:
    """By how much each image's best class (N, classes) is ahead of the next (N)."""
    best = np.partition(scores.astype(np.float64), -2, axis=1)[:, -2:]
    return np.asarray(best[:, 1] - best[:, 0], np.float64)


def _answer(image: int, reference: Array, candidate: Array, names: Sequence[str]) -> ImagePredictions:
    ours, theirs = reference[image].astype(np.float64), candidate[image].astype(np.float64)
    best, chosen = int(ours.argmax()), int(theirs.argmax())
    flipped = bool(ours[best] > ours[chosen])
    return ImagePredictions(
        image=image,
        name=names[image] if image < len(names) else "",
        flipped=flipped,
        reference=_ranked(ours),
        candidate=_ranked(theirs),
        reference_margin=float(ours[best] - ours[chosen]) if flipped else float(_leads(ours[None])[0]),
        candidate_margin=float(theirs[chosen] - theirs[best]) if flipped else float(_leads(theirs[None])[0]),
    )


def _ranked(scores: Float64) -> tuple[Ranked, ...]:
    """The best classes; among equal scores the lower index comes first."""
    exponents = np.exp(scores - scores.max())
    shares = exponents / exponents.sum()
    best = np.argsort(-scores, kind="stable")[:TOP]
    return tuple(Ranked(int(i), float(scores[i]), float(shares[i])) for i in best)

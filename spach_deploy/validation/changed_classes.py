"""The images to show in a report: those whose best class changed; without any, those that came closest to it.

A picture with both models' best classes says more about a flip than its figures do.
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

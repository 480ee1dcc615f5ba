"""Compare the outputs of two forms of one model. NumPy only; all sums are in float64.

    comparison = compare_outputs({"logits": reference}, {"logits": candidate}, image_names=names)

The first axis of every output is the image. Names, dtypes and shapes are compared before values. Whatever does not
match there, is not finite, or could not have shown a fault (nothing compared, a reference of zeros, a reference that
ignores its image) is a *problem*, and a comparison with a problem never passes. Differences of values are only measured
here; `verdict.judge` compares them with tolerances.

Class scores are the outputs whose role says so; where no roles are given, float outputs (N, classes). A *flip* is an
image whose best class differs. Its reference margin is the reference's score of its own best class minus its score of
the candidate's; the candidate margin is the same in the candidate's scores, the other way around. Where the reference
scores both classes alike, it is no flip.

Integer outputs are ranked class indices, such as top-k. Where the reference also has the scores that they rank, an
index at a wrong rank carries the gap between the two classes' reference scores, and a gap within
`Tolerance.flip_margin` is a tie. Without such scores, integers must be equal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.outputs import CLASS_SCORES
from spach_deploy.bundle.schema import role_of_name
from spach_deploy.common.batches import ranges
from spach_deploy.common.metrics import FEW_NUMBERS, best_indices, relative_norm, usual_square
from spach_deploy.options.specs import Role

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Outputs = Mapping[str, Array]

TOP = 5
_CHUNK_VALUES = 1 << 22  # converted to float64 at a time, so that large comparisons take little memory
_SHOWN = 5  # images that a finding spells out
_SUSPICIOUS = 0.05  # above this relative L2 an output may have been swapped with another ...
_CLOSER = 0.1  # ... if its distance to that one is at most this share of it


@dataclasses.dataclass(frozen=True)
class Record:
    """Converts itself to plain JSON types; inf and NaN, which JSON has not, become strings."""

    def to_dict(self) -> dict[str, Any]:
        """Fields as str, int, float, bool, None, list and dict."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class Flip(Record):
    """An image whose best class differs. Margins are in units of the scores; see the module's docstring."""

    image: int
    name: str
    reference_class: int
    candidate_class: int
    reference_margin: float
    candidate_margin: float


@dataclasses.dataclass(frozen=True)
class ScoreComparison(Record):
    """What changes for a classifier's user.

    `top1_agreement`: share of images without a flip. `top5_agreement`: mean share of the reference's best five classes
    among the candidate's best five, in any order; None with five classes or fewer. `kl_mean`, `kl_worst`:
    Kullback-Leibler divergence of the candidate's class probabilities from the reference's, in nats, over images.
    """

    classes: int
    top1_agreement: float
    top5_agreement: float | None
    kl_mean: float
    kl_worst: float
    flips: tuple[Flip, ...]


@dataclasses.dataclass(frozen=True)
class OutputComparison(Record):
    """How far one float output is from its reference.

    `rel_l2`: norm of the difference over norm of the reference, over all images; `rel_l2_worst`: of the worst image,
    `worst_image`. `cosine`, `cosine_worst`: likewise, between candidate and reference. `snr_db`: signal-to-noise ratio
    in decibels, infinite where equal. `resembles`: another reference output to which the candidate is far closer, a
    sign of swapped outputs. `scores`: for class scores only. `role`: what the output means.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    rel_l2: float
    rel_l2_worst: float
    worst_image: int
    worst_name: str
    cosine: float
    cosine_worst: float
    snr_db: float
    resembles: str | None
    scores: ScoreComparison | None
    role: str = Role.OTHER.value


@dataclasses.dataclass(frozen=True)
class IndexDifference(Record):
    """A rank with another index. `gap`: difference of both classes' reference scores, None where it is unknown."""

    image: int
    name: str
    rank: int
    reference: int
    candidate: int
    gap: float | None


@dataclasses.dataclass(frozen=True)
class IndexComparison(Record):
    """How far one integer output agrees. `agreement`: share of equal values. `ranks`: name of the scores that it
    ranks.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    agreement: float
    ranks: str | None
    differences: tuple[IndexDifference, ...]


@dataclasses.dataclass(frozen=True)
class Comparison(Record):
    """A whole comparison: number of images, one result for each output, and problems, one sentence each."""

    images: int
    outputs: tuple[OutputComparison, ...]
    indices: tuple[IndexComparison, ...]
    problems: tuple[str, ...]


def compare_outputs(
    reference: Outputs,
    candidate: Outputs,
    *,
    image_names: Sequence[str] = (),
    dtypes: Mapping[str, npt.DTypeLike] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Comparison:
    """Measure how far `candidate` is from `reference`. Never raises for their contents.

    `image_names`: names of the images in the result; without them their numbers are used. `dtypes`: dtypes that the
    candidate promises, where they are not the reference's: float16 logits of a float16 engine. `roles`: what each
    output means; without them, names and shapes say it.
    """
    comparable, problems = _checked(reference, candidate, dtypes or {}, image_names)
    floats = [name for name in comparable if _is_float(reference[name])]
    rankable = [name for name in floats if roles is None or roles.get(name) in CLASS_SCORES]
    ranked = {name: _ranked_by(name, reference, rankable) for name in comparable if name not in floats}
    scores = {*rankable}.difference(_top_k_values(reference, floats, ranked) if roles is None else ())
    known = roles or {name: role_of_name(name) for name in floats}
    outputs = (
        dataclasses.replace(
            _compare_float(name, reference, candidate, image_names, name in scores),
            role=known.get(name, Role.OTHER).value,
        )
        for name in floats
    )
    indices = (_compare_integer(n, reference, candidate, image_names, by) for n, by in ranked.items())
    return Comparison(_image_count(reference), tuple(outputs), tuple(indices), tuple(problems))


# Names, dtypes, shapes, and values that prove nothing


def _checked(
    reference: Outputs,
    candidate: Outputs,
    dtypes: Mapping[str, npt.DTypeLike],
    image_names: Sequence[str],
) -> tuple[list[str], list[str]]:
    """Names of outputs whose values can be compared, in the reference's order, and the problems of all others."""
    problems = [*_set_faults(reference, candidate, image_names)]
    comparable = []
    images = _image_count(reference)
    for name in (n for n in reference if n in candidate):
        ours, theirs = reference[name], candidate[name]
        faults = [*_form_faults(name, ours, theirs, np.dtype(dtypes.get(name, ours.dtype)), images)]
        faults = faults or [*_value_faults(name, ours, theirs, image_names)]
        problems += faults
        if not faults:
            comparable.append(name)
    return comparable, problems


def _set_faults(reference: Outputs, candidate: Outputs, image_names: Sequence[str]) -> Iterator[str]:
    if not reference:
        yield "The reference has no output, so nothing was compared."
    if image_names and len(image_names) != _image_count(reference):
        yield f"{len(image_names)} image names were given for {_image_count(reference)} images."
    unexpected = {name: array for name, array in candidate.items() if name not in reference}
    for name in reference:
        if name not in candidate:
            yield f"Output '{name}' is missing{_renamed(reference[name], unexpected)}."
    for name in unexpected:
        yield f"Output '{name}' is unexpected: the reference has none of that name."


def _renamed(wanted: Array, unexpected: Outputs) -> str:
    """An unexpected output that may be the missing one: the same shape, and the closest in value."""
    alike = [n for n, array in unexpected.items() if array.shape == wanted.shape and _is_number(array)]
    if not alike or not _is_number(wanted):
        return ""
    distance, best = min((_distance(unexpected[name], wanted), name) for name in alike)
    return f"; '{best}' has its shape (relative L2 {distance:.3g} from it): was it renamed?"


def _form_faults(name: str, reference: Array, candidate: Array, promised: np.dtype[Any], images: int) -> Iterator[str]:
    dtypes = f"Output '{name}' has dtype {candidate.dtype}, the reference {reference.dtype}"
    if not (_is_number(reference) and _is_number(candidate)):
        yield f"{dtypes}: not numbers."
    elif candidate.dtype != promised:
        yield f"Output '{name}' has dtype {candidate.dtype}, expected {promised}."
    elif _is_float(reference) != _is_float(candidate):
        yield f"{dtypes}: they cannot be compared."
    if candidate.shape != reference.shape:
        yield f"Output '{name}' has shape {candidate.shape}, the reference {reference.shape}."
    elif reference.ndim == 0 or reference.size == 0:
        yield f"Output '{name}' has shape {reference.shape}: nothing was compared."
    elif len(reference) != images:
        yield f"Output '{name}' has {len(reference)} images, another output {images}."


def _value_faults(name: str, reference: Array, candidate: Array, image_names: Sequence[str]) -> Iterator[str]:
    """Faults in the values themselves. Zeros and repetition are legitimate in class indices, so only floats are checked
    for them.
    """
    if not _is_float(reference):
        return
    for whose, array in (("reference", reference), ("candidate", candidate)):
        if images := _images_not_finite(array):
            where = listed([label(i, _name(i, image_names)) for i in images])
            yield f"Output '{name}' of the {whose} has NaN or infinite values in {where}."
    if not reference.any():
        yield f"Output '{name}' of the reference is zero everywhere: comparing it proves nothing."
    elif len(reference) > 1 and (reference == reference[:1]).all():
        yield (
            f"Output '{name}' of the reference is the same for all {len(reference)} images: comparing it "
            "proves nothing. Give different images, or weights that respond to them."
        )


def _images_not_finite(array: Array) -> list[int]:
    finite = [bool(np.isfinite(image).all()) for image in array]  # image by image: no copy of everything
    return [i for i, is_finite in enumerate(finite) if not is_finite]


def _image_count(reference: Outputs) -> int:
    return next((len(array) for array in reference.values() if array.ndim), 0)


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _is_number(array: Array) -> bool:
    return _is_float(array) or array.dtype.kind in "iub"


# Floats


def _compare_float(
    name: str, reference: Outputs, candidate: Outputs, image_names: Sequence[str], may_be_scores: bool
) -> OutputComparison:
    ours, theirs = reference[name], candidate[name]
    sums = _ImageSums.of(ours, theirs)
    numbers = ours[:1].size
    rel_l2, total = sums.rel_l2(numbers), sums.total()
    cosine = total.cosine() if numbers < FEW_NUMBERS else sums.cosine()
    worst = int(np.argmax(rel_l2))
    is_scores = may_be_scores and ours.ndim == 2 and ours.shape[1] >= 2
    return OutputComparison(
        name=name,
        dtype=theirs.dtype.name,
        shape=ours.shape,
        max_abs=float(total.max_abs[0]),
        mean_abs=float(total.abs_difference[0] / ours.size),
        rel_l2=float(total.rel_l2()[0]),
        rel_l2_worst=float(rel_l2[worst]),
        worst_image=worst,
        worst_name=_name(worst, image_names),
        cosine=float(total.cosine()[0]),
        cosine_worst=float(cosine.min()),
        snr_db=_snr_db(float(total.reference[0]), float(total.difference[0])),
        resembles=_resembles(name, reference, theirs, float(total.rel_l2()[0])),
        scores=_compare_scores(ours, theirs, image_names) if is_scores else None,
    )


@dataclasses.dataclass(frozen=True)
class _ImageSums:
    """Sums for each image (N): largest and total absolute difference, squares, and products."""

    max_abs: Float64
    abs_difference: Float64
    difference: Float64
    reference: Float64
    candidate: Float64
    product: Float64

    @classmethod
    def of(cls, reference: Array, candidate: Array) -> _ImageSums:
        parts = [_chunk_sums(r, c) for r, c in _float64_chunks(reference, candidate)]
        return cls(*np.concatenate(parts, axis=1))

    def total(self) -> _ImageSums:
        """The same over all images together, as if of one (1)."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return _ImageSums(self.max_abs.max(keepdims=True), *(values.sum(keepdims=True) for values in fields[1:]))

    def rel_l2(self, numbers: int = FEW_NUMBERS) -> Float64:
        """Relative L2 of each image with this many numbers."""
        return relative_norm(self.difference, usual_square(self.reference, numbers))

    def cosine(self) -> Float64:
        """Cosine similarity; 1 where both are zero, 0 where one is."""
        norms = np.sqrt(self.reference) * np.sqrt(self.candidate)
        both_zero = (self.reference == 0) & (self.candidate == 0)
        cosine = np.divide(self.product, norms, out=both_zero.astype(np.float64), where=norms > 0)
        return np.asarray(np.clip(cosine, -1.0, 1.0), np.float64)


def _chunk_sums(reference: Float64, candidate: Float64) -> Float64:
    """(n, values) twice -> (6, n), in the order of `_ImageSums`."""
    difference = candidate - reference
    absolute = np.abs(difference)
    squares = [np.einsum("nv,nv->n", a, b) for a, b in _products(difference, reference, candidate)]
    return np.stack([absolute.max(axis=1), absolute.sum(axis=1), *squares])


def _products(difference: Float64, reference: Float64, candidate: Float64) -> list[tuple[Float64, Float64]]:
    return [(difference, difference), (reference, reference), (candidate, candidate), (reference, candidate)]


def _snr_db(signal: float, noise: float) -> float:
    if noise == 0 or signal == 0:  # zero by underflow of the squares
        return math.inf if noise == 0 else -math.inf
    return 10 * (math.log10(signal) - math.log10(noise))


def _distance(candidate: Array, reference: Array) -> float:
    """Relative L2 over everything; infinite instead of NaN."""
    if candidate.size == 0:
        return math.inf
    with np.errstate(invalid="ignore", over="ignore"):
        sums = _ImageSums.of(np.atleast_1d(reference), np.atleast_1d(candidate))
        distance = float(sums.total().rel_l2()[0])
    return math.inf if math.isnan(distance) else distance


def _resembles(name: str, reference: Outputs, candidate: Array, distance: float) -> str | None:
    if distance < _SUSPICIOUS:
        return None
    others = (n for n, a in reference.items() if n != name and a.shape == candidate.shape and _is_float(a))
    closer = [n for n in others if _distance(candidate, reference[n]) < _CLOSER * distance]
    return closer[0] if closer else None


# Class scores


def _compare_scores(reference: Array, candidate: Array, image_names: Sequence[str]) -> ScoreComparison:
    classes = reference.shape[1]
    flips: list[Flip] = []
    overlaps, divergences = [], []
    start = 0
    for ours, theirs in _float64_chunks(reference, candidate):
        flips += _flips(ours, theirs, start, image_names)
        overlaps.append(_top_overlap(ours, theirs))
        divergences.append(_kl_divergence(ours, theirs))
        start += len(ours)
    divergence = np.concatenate(divergences)
    return ScoreComparison(
        classes=classes,
        top1_agreement=1 - len(flips) / len(reference),
        top5_agreement=float(np.concatenate(overlaps).mean()) if classes > TOP else None,
        kl_mean=float(divergence.mean()),
        kl_worst=float(divergence.max()),
        flips=tuple(flips),
    )


def _flips(reference: Float64, candidate: Float64, start: int, image_names: Sequence[str]) -> Iterator[Flip]:
    best_reference, best_candidate = reference.argmax(axis=1), candidate.argmax(axis=1)
    for i in np.flatnonzero(best_reference != best_candidate).tolist():
        ours, theirs = int(best_reference[i]), int(best_candidate[i])
        margin = float(reference[i, ours] - reference[i, theirs])
        if margin > 0:
            gained = float(candidate[i, theirs] - candidate[i, ours])
            yield Flip(start + i, _name(start + i, image_names), ours, theirs, margin, gained)


def _top_overlap(reference: Float64, candidate: Float64) -> Float64:
    """Share of the reference's best TOP classes that are among the candidate's, for each image (n)."""
    ours, theirs = (best_indices(scores, TOP) for scores in (reference, candidate))
    shared = (ours[:, :, None] == theirs[:, None, :]).any(axis=2)  # (n, 5, 5) -> (n, 5)
    return np.asarray(shared.mean(axis=1), np.float64)


def _kl_divergence(reference: Float64, candidate: Float64) -> Float64:
    """KL(reference || candidate) per image (n), in nats."""
    # Outputs that are probabilities already (none negative, sums of 1) only need the logarithm.
    normalized = bool((reference >= 0).all() and np.allclose(reference.sum(axis=1), 1.0, atol=1e-2))
    log_p, log_q = _log_probabilities(reference, normalized), _log_probabilities(candidate, normalized)
    terms = np.exp(log_p) * (log_p - log_q)
    return np.maximum(np.asarray(terms.sum(axis=1), np.float64), 0.0)  # below zero only by rounding


def _log_probabilities(scores: Float64, normalized: bool) -> Float64:
    if normalized:
        return np.log(np.maximum(scores, np.finfo(np.float32).tiny))
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), np.float64)


# Integers


def _ranked_by(name: str, reference: Outputs, floats: list[str]) -> str | None:
    """The class scores (N, classes) that the integer output `name` ranks."""
    indices = reference[name].reshape(len(reference[name]), -1)
    return next((other for other in floats if _is_ranking(indices, reference[other])), None)


def _is_ranking(indices: Array, scores: Array) -> bool:
    if scores.ndim != 2 or indices.shape[1] > scores.shape[1] or indices.dtype.kind == "b":
        return False
    if indices.min() < 0 or indices.max() >= scores.shape[1]:
        return False
    best = np.sort(scores, axis=1)[:, ::-1][:, : indices.shape[1]]
    return bool((np.take_along_axis(scores, indices.astype(np.int64), axis=1) == best).all())


def _top_k_values(reference: Outputs, floats: list[str], ranked: Mapping[str, str | None]) -> set[str]:
    """Float outputs that are sorted scores for top-k indices: their columns are ranks, not classes."""
    shapes = {reference[name].shape for name in ranked}
    candidates = [name for name in floats if reference[name].ndim == 2 and reference[name].shape in shapes]
    return {name for name in candidates if (reference[name][:, :-1] >= reference[name][:, 1:]).all()}


def _compare_integer(
    name: str, reference: Outputs, candidate: Outputs, image_names: Sequence[str], ranks: str | None
) -> IndexComparison:
    ours = reference[name].reshape(len(reference[name]), -1)
    theirs = candidate[name].reshape(ours.shape)
    scores = None if ranks is None else reference[ranks]
    rows, columns = np.nonzero(ours != theirs)
    differences = (
        IndexDifference(
            i, _name(i, image_names), j, int(ours[i, j]), int(theirs[i, j]), _gap(scores, ours, theirs, i, j)
        )
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
    )
    shape = reference[name].shape
    agreement = 1 - len(rows) / ours.size
    return IndexComparison(name, candidate[name].dtype.name, shape, agreement, ranks, tuple(differences))


def _gap(scores: Array | None, ours: Array, theirs: Array, image: int, rank: int) -> float | None:
    """Difference of both classes' reference scores; None where a tie cannot explain the difference."""
    index = int(theirs[image, rank])
    is_repeated = np.count_nonzero(theirs[image] == index) > 1
    if scores is None or is_repeated or not 0 <= index < scores.shape[1]:
        return None
    return abs(float(scores[image, int(ours[image, rank])]) - float(scores[image, index]))


# Helpers


def label(image: int, name: str) -> str:
    """An image's number and, where it has one, its name."""
    return f"image {image} ({name})" if name else f"image {image}"


def _name(image: int, image_names: Sequence[str]) -> str:
    return image_names[image] if image < len(image_names) else ""


def listed(items: list[str]) -> str:
    """The first items of a list, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more


def _float64_chunks(reference: Array, candidate: Array) -> Iterator[tuple[Float64, Float64]]:
    """Chunks of the same images of both, as float64 (n, values), of bounded size."""
    ours, theirs = (array.reshape(len(array), -1) for array in (reference, candidate))
    step = max(1, _CHUNK_VALUES // ours.shape[1])
    for start, stop in ranges(len(ours), step):
        yield ours[start:stop].astype(np.float64), theirs[start:stop].astype(np.float64)


def _plain(value: object) -> object:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

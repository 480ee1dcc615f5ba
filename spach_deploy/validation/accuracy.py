"""Accuracy of the reference and of what was exported, on the same labelled images, and what their difference proves.

    measured = paired(reference_logits, candidate_logits, labels)
    measured.sentence()

Both answer the same images, so only images that one gets right and the other wrong tell them apart. From these come

- the 95 % confidence interval of the drop: Tango's score interval for the difference of two paired proportions
  (T. Tango, Statistics in Medicine 17, 1998, 891-908), which keeps its level with few such images, even none;
- McNemar's exact test: with no difference between the two, each such image is a toss of a coin (Q. McNemar,
  Psychometrika 12, 1947, 153-157, with binomial tails in place of the chi-squared approximation).

The second half of the file reads labels. NumPy only.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from spach_deploy.errors import UsageError, printable

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int64]

LEVEL = 0.95
METHODS = "Tango's score interval for paired proportions (1998); McNemar's exact test, two-sided"
ASKED_POINTS = 1.0
"""The drop that images must be able to show where nobody says which (`--max-drop`)."""

TOP = 5
_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
_LIKELY = 1 - LEVEL
_STEPS = 200  # of bisection: more than a float64 has bits, so that limits are exact to its last
_CHANCE = 0.01
_NAMED = 3  # images that a sentence spells out
_CHUNK = 4096  # images that are ranked at a time


# What was measured


@dataclasses.dataclass(frozen=True)
class PairedAccuracy:
    """Accuracy of two sets of answers to the same `images`.

    `top1_*`, `top5_*`: shares of images whose class is the best, or among the best five (None with five classes or
    fewer). `drop_points`: top-1 of the reference minus that of the candidate, in percentage points, so that a loss is
    positive; `interval` its 95 % confidence interval. `only_reference_right`, `only_candidate_right`: images of which
    only one has the class right (top-1). `p_value`: McNemar's exact test of these, two-sided.
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
        """The smallest drop, in points, that so many images show: half the interval's width."""
        return (self.interval[1] - self.interval[0]) / 2

    def images_for(self, points: float) -> int:
        """How many images show a drop of `points`, if they differ as often as these do; rounded up to two digits."""
        share_lost, share_gained = (n / self.images for n in (self.only_reference_right, self.only_candidate_right))

        def is_enough(images: int) -> bool:
            low, high = tango_interval(share_lost * images, share_gained * images, images)
            return 100 * (high - low) / 2 <= points

        enough = 1
        while not is_enough(enough):
            enough *= 2
        return _rounded_up(_first(is_enough, enough // 2, enough))

    def too_few(self, points: float = ASKED_POINTS) -> str:
        """A sentence where so many images cannot tell a drop of `points` from none, else nothing."""
        low, high = self.interval
        if self.visible_points <= points or low > points or high <= points:
            return ""
        return (
            f"With {_images(self.images)} a drop below {self.visible_points:.2g} points cannot be seen; to see one of "
            f"{points:g} {'point' if points == 1 else 'points'}, give {self.images_for(points):,} images or more."
        )

    @property
    def is_guessing(self) -> bool:
        """Whether the reference is right no more often than by naming a class blindly: labels of something else?"""
        right = round(self.top1_reference * self.images)
        return upper_tail(right, self.images, 1 / self.classes) > _CHANCE

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def paired(reference_logits: Array, candidate_logits: Array, labels: npt.ArrayLike) -> PairedAccuracy:
    """Compare the accuracy of two sets of logits (N, classes), of any float dtype; `labels` (N) are class indices.

    Among equal scores the lower index comes first, as in argmax; an answer that is not finite is never right. Raises
    UsageError for other shapes, no image, and labels that are no class indices.
    """
    classes = np.asarray(labels)
    _check_arrays(reference_logits, candidate_logits, classes)
    reference, candidate = (_places(logits, classes) for logits in (reference_logits, candidate_logits))
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


def _places(logits: Array, labels: Array) -> npt.NDArray[np.int64]:
    """The place (N) of each image's class among its scores, 0 for the best; the last where one is not finite."""
    parts = range(0, len(logits), _CHUNK)
    return np.concatenate([_places_of_some(logits[i : i + _CHUNK], labels[i : i + _CHUNK]) for i in parts])


def _places_of_some(logits: Array, labels: Array) -> npt.NDArray[np.int64]:
    scores: Array = logits.astype(np.float32 if logits.dtype.itemsize <= 4 else np.float64)
    own: Array = np.take_along_axis(scores, labels[:, None].astype(np.int64), axis=1)  # (n, 1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    place = ((scores > own) | ((scores == own) & before)).sum(axis=1)
    answered = np.isfinite(scores).all(axis=1)
    return np.asarray(np.where(answered, place, scores.shape[1]), np.int64)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Images that both, one or the other have right, as shares and counts."""

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
    """Two-sided p-value of as uneven a split of `one + other` fair coins, exact in integers. 1 where there is none."""
    tosses, fewer = one + other, min(one, other)
    if one == other:
        return 1.0
    ways, total = 1, 0
    for heads in range(fewer + 1):
        total += ways
        ways = ways * (tosses - heads) // (heads + 1)
    return 2 * total / (1 << tosses)  # a quotient of integers of any size, rounded once


def tango_interval(lost: float, gained: float, images: float, level: float = LEVEL) -> tuple[float, float]:
    """Confidence interval of (lost - gained) / images, shares of `images` pairs that differ one way and the other.

    All drops that the score test does not reject: those where the estimate is within z of them, in standard errors
    that are taken with that drop for true. Counts need not be whole, for planning.
    """
    z = _Z if level == LEVEL else NormalDist().inv_cdf(0.5 + level / 2)
    estimate = (lost - gained) / images

    def within(drop: float) -> bool:
        variance = images * (2 * _gained_given(drop, lost, gained, images) + drop * (1 - drop))
        return (lost - gained - images * drop) ** 2 <= z * z * max(variance, 0.0)

    return _edge(within, estimate, -1.0), _edge(within, estimate, 1.0)


def _gained_given(drop: float, lost: float, gained: float, images: float) -> float:
    """The likeliest share of gained pairs where the true drop is `drop`: root of Tango's quadratic, equation 8."""
    a, c = 2 * images, -gained * drop * (1 - drop)
    b = (2 * images - lost + gained) * drop - lost - gained
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    return -2 * c / (b + root) if b > 0 else (root - b) / (2 * a)  # the same root, without cancellation


def _edge(within: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where `within` ends between `inside` and `outside`, by bisection."""
    if within(outside):
        return outside
    for _ in range(_STEPS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if within(middle) else (inside, middle)
    return inside


def _first(holds: Callable[[int], bool], below: int, above: int) -> int:
    """The least integer in (below, above] for which `holds`, which it does from there on."""
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if holds(middle) else (middle, above)
    return above


def upper_tail(successes: int, trials: int, chance: float) -> float:
    """Probability of at least `successes` in `trials` of that `chance`."""
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
    """Of a drop."""
    low, high = interval
    return f"95 % interval of the drop {low:.2f} to {high:.2f} points"


def _images(count: int) -> str:
    return f"{count:,} {'image' if count == 1 else 'images'}"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Part of a validation. `ran`: what answered, in words; `labels`: where these come from; `max_drop`: in points."""

    measured: PairedAccuracy
    ran: str
    labels: str
    max_drop: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def findings(self) -> tuple[str, ...]:
        """A drop that is larger than allowed, by the estimate."""
        drop = self.measured.drop_points
        if self.max_drop is None or drop <= self.max_drop:
            return ()
        return (
            f"Top-1 accuracy falls by {drop:.2f} points ({interval_in_words(self.measured.interval)}), more than the "
            f"{self.max_drop:g} that --max-drop allows.",
        )

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the figures say, and what they cannot."""
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


# Labels

_FORMS = (".txt", ".csv", ".json")
_WANTED = (
    "Give .txt with lines NAME CLASS, .csv with NAME,CLASS or .json with {NAME: CLASS}; or the folder of class folders "
    "or the npz that --images reads."
)
_NUMBER = re.compile(r"-?[0-9]{1,9}")


@dataclasses.dataclass(frozen=True)
class ImageLabels:
    """Class indices (N) of images, in their order, where they come from, and remarks."""

    classes: Labels
    origin: str
    notes: tuple[str, ...] = ()


class Labelling(Protocol):
    """Labels that were read and checked, before any image was."""

    def of(self, names: Sequence[str], own: Labels | None) -> ImageLabels:
        """Labels of the images `names`; `own` (N) are those that came with the images. UsageError where one lacks."""


def open_labels(path: Path, images: Path, folders: tuple[str, ...], num_classes: int) -> Labelling:
    """Labels at `path`, for the images at `images`, whose class folders are `folders`; a model of `num_classes`.

    Raises UsageError, with the next step, for what is no labels file, names twice, class indices that the model does
    not have, and folders that cannot be its classes.
    """
    if not path.exists():
        raise UsageError(f"There is no {path}.", _WANTED)
    if path.is_dir() or path.suffix.lower() == ".npz":
        _check_same(path, images)
        return _of_folders(path, folders, num_classes) if path.is_dir() else OwnLabels(path, num_classes)
    return NamedLabels(path, _read_entries(path, num_classes))


def _check_same(path: Path, images: Path) -> None:
    if path.resolve() != images.resolve():
        what = "folder" if path.is_dir() else "npz"
        raise UsageError(
            f"--labels {path} is another {what} than --images {images}, and a {what} only labels its own images.",
            f"Give --images {path} too, or a labels file: .txt with lines NAME CLASS.",
        )


@dataclasses.dataclass(frozen=True)
class OwnLabels:
    """Labels that come with the images. `of_folder`: the class of each folder, where it is not the folder's place."""

    path: Path
    num_classes: int
    of_folder: tuple[int, ...] | None = None
    origin: str = "the npz's own"
    notes: tuple[str, ...] = ()

    def of(self, names: Sequence[str], own: Labels | None) -> ImageLabels:
        """See `Labelling`."""
        if own is None:
            raise UsageError(f"{self.path} has no array 'labels'.", "Save one class index per image, or give a file.")
        classes = own if self.of_folder is None else np.array(self.of_folder, np.int64)[own]
        for name, index in zip(names, classes.tolist(), strict=True):
            _check_class(index, f"{self.path} gives {name}", self.num_classes)
        return ImageLabels(classes, self.origin, self.notes)


def _of_folders(path: Path, folders: tuple[str, ...], num_classes: int) -> OwnLabels:
    if not folders:
        raise UsageError(
            f"{path} has pictures outside of class folders, so its folders label nothing.",
            "Put each picture into its class's folder, or give a labels file.",
        )
    origin = f"{_counted(len(folders), 'class folder')} of {path}"
    if len(folders) == num_classes:
        return OwnLabels(path, num_classes, None, origin, _number_note(folders))
    if len(folders) < num_classes and _are_indices(folders, num_classes):
        note = f"{path} has {len(folders)} of the model's {num_classes} classes; its folders' names are their indices."
        return OwnLabels(path, num_classes, tuple(map(int, folders)), origin, (note,))
    raise UsageError(
        f"{path} has {_counted(len(folders), 'class folder')}, the model {num_classes} classes, so a folder's place "
        "is not its class.",
        f"Give all {num_classes} folders (empty ones count), or a labels file with each image's class index.",
    )


def _are_indices(folders: tuple[str, ...], num_classes: int) -> bool:
    """Whether names are class indices however one counts: written so that their order is the numbers' order."""
    width = len(folders[0])
    return width >= len(str(num_classes - 1)) and all(
        _NUMBER.fullmatch(name) and len(name) == width and 0 <= int(name) < num_classes for name in folders
    )


def _number_note(folders: tuple[str, ...]) -> tuple[str, ...]:
    """Numbers without leading zeros sort as text: 0, 1, 10, 2."""
    if not all(_NUMBER.fullmatch(name) for name in folders):
        return ()
    place = next((i for i, name in enumerate(folders) if int(name) != i), None)
    if place is None:
        return ()
    return (
        f"Class folders count in the order of their names, as torchvision does, so folder {folders[place]} is class "
        f"{place}; where the numbers are the classes, give a labels file.",
    )


@dataclasses.dataclass(frozen=True)
class NamedLabels:
    """Class indices by image name, as a labels file has them."""

    path: Path
    entries: Mapping[str, int] = dataclasses.field(repr=False)

    def of(self, names: Sequence[str], own: Labels | None) -> ImageLabels:
        """See `Labelling`. An image is found by its name, or by the end of its path where only one entry has it."""
        found = _found(names, self.entries)
        missing = [name for name in names if name not in found]
        if missing:
            raise self._missing(missing, len(names))
        classes = np.array([self.entries[found[name]] for name in names], np.int64)
        return ImageLabels(classes, str(self.path), tuple(self._notes(found)))

    def _missing(self, missing: list[str], images: int) -> UsageError:
        there = next(iter(self.entries))
        if len(missing) == images:
            return UsageError(
                f"{self.path} labels none of the {_images(images)}: it names {_shown([there])}, they are called "
                f"{_shown(missing)}.",
                "Name images by their path below --images.",
            )
        return UsageError(
            f"{self.path} has no label for {len(missing)} of {_images(images)}: {_shown(missing)}.",
            "Add them, or give --images without these.",
        )

    def _notes(self, found: Mapping[str, str]) -> Iterator[str]:
        by_end = [(image, entry) for image, entry in found.items() if image != entry]
        if by_end:
            image, entry = by_end[0]
            yield f"{_counted(len(by_end), 'label')} found by the end of the path: {image} is {entry} in {self.path}."
        unused = len(self.entries) - len(set(found.values()))
        if unused:
            yield f"{unused:,} of {_counted(len(self.entries), 'label')} in {self.path} name no image that was taken."


def _found(names: Sequence[str], entries: Mapping[str, int]) -> dict[str, str]:
    """The entry of each image that has one."""
    ends = Counter(_file(entry) for entry in entries)
    by_end = {_file(entry): entry for entry in entries if ends[_file(entry)] == 1}
    repeated = {file for file, count in Counter(map(_file, names)).items() if count > 1}
    found = {}
    for name in names:
        entry = name if name in entries else by_end.get(_file(name), "")
        if entry == name or (entry and _file(name) not in repeated and _same_end(name, entry)):
            found[name] = entry
    return found


def _file(name: str) -> str:
    return name.rpartition("/")[2]


def _same_end(name: str, entry: str) -> bool:
    """Whether the shorter path is the end of the longer: train/a.jpg is not val/a.jpg."""
    one, other = PurePosixPath(name).parts, PurePosixPath(entry).parts
    length = min(len(one), len(other))
    return one[-length:] == other[-length:]


# Labels files


class _Row(NamedTuple):
    where: str
    name: str
    number: object


def _read_entries(path: Path, num_classes: int) -> dict[str, int]:
    reader = {".txt": _txt_rows, ".csv": _csv_rows, ".json": _json_rows}.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise UsageError(f"{path} is no labels file: its name does not end in {', '.join(_FORMS)}.", _WANTED)
    entries: dict[str, int] = {}
    for row in reader(path, _text(path)):
        name = printable(PurePosixPath(row.name).as_posix())
        if name in entries:
            raise UsageError(f"{row.where} names {name} a second time.", "Keep one label for each image.")
        entries[name] = _class_of(row, num_classes)
    if not entries:
        raise UsageError(f"{path} has no label.", _WANTED)
    return entries


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text.", _WANTED) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}).", "Check its permissions.") from None


def _txt_rows(path: Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.rsplit(maxsplit=1)
        if len(parts) == 1:
            raise _bad_row(f"{path}, line {number},", line)
        if parts:
            yield _Row(f"{path}, line {number},", parts[0].strip(), parts[1])


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    reader = csv.reader(text.splitlines())
    try:
        for fields in filter(None, reader):
            where = f"{path}, line {reader.line_num},"
            if len(fields) != 2:
                raise _bad_row(where, ",".join(fields))
            name, number = (field.strip() for field in fields)
            is_head = reader.line_num == 1 and not any(character.isdigit() for character in number)
            if not is_head:
                yield _Row(where, name, number)
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}, is not CSV ({error}).", _WANTED) from None


def _bad_row(where: str, text: str) -> UsageError:
    return UsageError(f"{where} is not a name and a class: {_shown([text.strip()])}.", _WANTED)


def _json_rows(path: Path, text: str) -> Iterator[_Row]:
    try:
        content = json.loads(text, object_pairs_hook=tuple)  # pairs: a dict would hide a name that comes twice
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}).", _WANTED) from None
    if not isinstance(content, tuple):
        raise UsageError(f"{path} holds no JSON object of names and classes.", _WANTED)
    return (_Row(str(path), name, number) for name, number in content)


def _class_of(row: _Row, num_classes: int) -> int:
    number = row.number
    if isinstance(number, str) and _NUMBER.fullmatch(number):
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        shown = _shown([str(number)])
        raise UsageError(
            f"{row.where} gives {printable(row.name)} the class {shown}, which is not a class index.",
            f"Give whole numbers from 0 to {num_classes - 1}.",
        )
    _check_class(number, f"{row.where} gives {printable(row.name)}", num_classes)
    return number


def _check_class(index: int, who: str, num_classes: int) -> None:
    if not 0 <= index < num_classes:
        from_one = " Do they count from 1?" if index == num_classes else ""
        raise UsageError(
            f"{who} the class {index}; the model has {num_classes} classes, 0 to {num_classes - 1}.",
            f"Correct the labels, or give those of this model.{from_one}",
        )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(f"'{printable(name[:80])}'" for name in names[:_NAMED]) + more


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"

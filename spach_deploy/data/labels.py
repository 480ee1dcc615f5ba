"""Labels of images, from folders, an npz or a file (text, CSV, JSON); and names of a model's classes."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from spach_deploy.common.errors import UsageError, printable
from spach_deploy.common.files import read_bytes, read_text
from spach_deploy.common.text import counted

Labels = npt.NDArray[np.int64]

_NAMED = 3  # images that a sentence names at most
_FORMS = (".txt", ".csv", ".json")
_MOST_BYTES = 1 << 30
"""Largest file of labels, in bytes. That of ten million images has 400 MB."""

_WANTED = (
    "Give .txt with lines NAME CLASS, .csv with NAME,CLASS or .json with {NAME: CLASS}; or the folder of class folders "
    "or the npz that --images reads."
)
_NUMBER = re.compile(r"-?[0-9]{1,9}")


@dataclasses.dataclass(frozen=True)
class ImageLabels:
    """Class indices, int64 (N), in the images' order. `origin`: where they are from. `notes`: sentences for reports."""

    classes: Labels
    origin: str
    notes: tuple[str, ...] = ()


class Labelling(Protocol):
    """Labels that were read and checked before any image is read."""

    def of(self, names: Sequence[str], own: Labels | None) -> ImageLabels:
        """Labels of the images `names`. `own` (N): labels that the images' source has. UsageError
        for a missing label.
        """


def open_labels(path: Path, images: Path, folders: tuple[str, ...], num_classes: int) -> Labelling:
    """Read the labels at `path` for the images at `images`, whose class folders are `folders`.

    `num_classes`: those of the model. Raises UsageError, with the next step, for a file that has no labels, a name that
    comes twice, a class index that the model does not have, and folders that cannot be its classes.
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
    """Labels that the images' source has. `of_folder`: the class of each folder, if that is not the folder's index."""

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
    origin = f"{counted(len(folders), 'class folder')} of {path}"
    if len(folders) == num_classes:
        return OwnLabels(path, num_classes, None, origin, _number_note(folders))
    if len(folders) < num_classes and _are_indices(folders, num_classes):
        note = f"{path} has {len(folders)} of the model's {num_classes} classes; its folders' names are their indices."
        return OwnLabels(path, num_classes, tuple(map(int, folders)), origin, (note,))
    raise UsageError(
        f"{path} has {counted(len(folders), 'class folder')}, the model {num_classes} classes, so a folder's place "
        "is not its class.",
        f"Give all {num_classes} folders (empty ones count), or a labels file with each image's class index.",
    )


def _are_indices(folders: tuple[str, ...], num_classes: int) -> bool:
    """Whether folder names are class indices of one width, so that they sort as text as they do as numbers."""
    width = len(folders[0])
    return width >= len(str(num_classes - 1)) and all(
        _NUMBER.fullmatch(name) and len(name) == width and 0 <= int(name) < num_classes for name in folders
    )


def _number_note(folders: tuple[str, ...]) -> tuple[str, ...]:
    """A note for folders named by numbers without leading zeros: they sort as text, 0, 1, 10, 2."""
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
    """Labels of a file: class indices by image name."""

    path: Path
    entries: Mapping[str, int] = dataclasses.field(repr=False)

    def of(self, names: Sequence[str], own: Labels | None) -> ImageLabels:
        """See `Labelling`. An image is found by its name, or by the end of its path if only one entry ends so."""
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
                f"{self.path} labels none of the {counted(images, 'image')}: it names {_shown([there])}, they are"
                f" called {_shown(missing)}.",
                "Name images by their path below --images.",
            )
        return UsageError(
            f"{self.path} has no label for {len(missing)} of {counted(images, 'image')}: {_shown(missing)}.",
            "Add them, or give --images without these.",
        )

    def _notes(self, found: Mapping[str, str]) -> Iterator[str]:
        by_end = [(image, entry) for image, entry in found.items() if image != entry]
        if by_end:
            image, entry = by_end[0]
            yield f"{counted(len(by_end), 'label')} found by the end of the path: {image} is {entry} in {self.path}."
        unused = len(self.entries) - len(set(found.values()))
        if unused:
            yield f"{unused:,} of {counted(len(self.entries), 'label')} in {self.path} name no image that was taken."


def _found(names: Sequence[str], entries: Mapping[str, int]) -> dict[str, str]:
    """By image name: the name of its entry, for images that have one."""
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
    """Whether one path is the end of the other: a.jpg of val/a.jpg, but not train/a.jpg of val/a.jpg."""
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
        return read_bytes(path, _MOST_BYTES).decode("utf-8-sig")
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
        content = json.loads(text, object_pairs_hook=tuple)  # a dict would hide a name that comes twice
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


_WANTED_NAMES = "Give a text file with the name of one class a line, in the model's order."


def read_labels(path: Path | None, classes: int) -> tuple[str, ...]:
    """Names of classes: one per line of the file `path`, in the order of the model's classes.

    Without a file: `class 0`, `class 1`, … Raises UsageError for a file that cannot be read, that has another number of
    names than `classes`, or an empty name.
    """
    if path is None:
        return tuple(f"class {index}" for index in range(classes))
    labels = tuple(read_text(path, f"--labels {path}", _WANTED_NAMES).splitlines())
    if has_empty_end(labels, classes):
        problem = f"--labels {path} has an empty last line: {len(labels)} lines for {classes} classes."
        raise UsageError(problem, "Remove it: each line is a class.")
    if len(labels) != classes:
        raise UsageError(f"--labels {path} has {len(labels)} lines; the model has {classes} classes.", _WANTED_NAMES)
    if empty := [number for number, label in enumerate(labels, start=1) if not label.strip()]:
        raise UsageError(f"--labels {path} has no name in line {empty[0]}.", _WANTED_NAMES)
    return labels


def has_empty_end(labels: Sequence[str], classes: int) -> bool:
    """Whether a file has more lines than classes only because its last lines are empty."""
    return len(labels) > classes and not any(label.strip() for label in labels[classes:])


def as_text(labels: tuple[str, ...]) -> str:
    """Names of classes as the content of a file, one per line."""
    return "".join(f"{label}\n" for label in labels)

"""Names of classes: one a line, in the order of the model's classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spach_deploy.errors import UsageError
from spach_deploy.small_files import read_text

_WANTED = "Give a text file with the name of one class a line, in the model's order."


def read_labels(path: Path | None, classes: int) -> tuple[str, ...]:
    """The names in `path`, or `class 0`, `class 1`, … without one.

    UsageError for a file that cannot be read, has another number of names, or a name that is empty.
    """
    if path is None:
        return tuple(f"class {index}" for index in range(classes))
    labels = tuple(read_text(path, f"--labels {path}", _WANTED).splitlines())
    if has_empty_end(labels, classes):
        problem = f"--labels {path} has an empty last line: {len(labels)} lines for {classes} classes."
        raise UsageError(problem, "Remove it: each line is a class.")
    if len(labels) != classes:
        raise UsageError(f"--labels {path} has {len(labels)} lines; the model has {classes} classes.", _WANTED)
    if empty := [number for number, label in enumerate(labels, start=1) if not label.strip()]:
        raise UsageError(f"--labels {path} has no name in line {empty[0]}.", _WANTED)
    return labels


def has_empty_end(labels: Sequence[str], classes: int) -> bool:
    """Whether a file has more lines than classes because its last ones are empty."""
    return len(labels) > classes and not any(label.strip() for label in labels[classes:])


def as_text(labels: tuple[str, ...]) -> str:
    """The file's content."""
    return "".join(f"{label}\n" for label in labels)

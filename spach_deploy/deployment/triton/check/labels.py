"""Rules for labels: the file is there, and has a name for each class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spach_deploy.deployment.labels import has_empty_end
from spach_deploy.deployment.triton.check.findings import Finding
from spach_deploy.deployment.triton.check.model_folder import ModelFolder, Repository
from spach_deploy.small_files import read_bytes
from spach_deploy.validation.reference import LOGITS

BYTE_ORDER_MARK = "\ufeff"

_FIX = "Write one name a line, in the order of the classes."


def check_labels(model: ModelFolder, repository: Repository) -> Iterator[Finding]:
    """label_filename of every output. Logits without one give clients numbers where they asked for classes."""
    for index, output in enumerate(model.config.output):
        where = f"output[{index}].label_filename"
        if output.label_filename:
            yield from label_file(model, where, output.label_filename, _classes(output))
        elif output.name == LOGITS and any(facts.profile is not None for facts in model.facts.values()):
            yield model.finding(
                where, "none", "the file with the names of the classes", 'Write "labels.txt" and add it.'
            )


def label_file(model: ModelFolder, where: str, name: str, classes: int | None) -> Iterator[Finding]:
    """One label file against the number of classes, which is None where the dims leave it free."""
    file = model.path / name
    if not file.is_file():
        yield model.finding(where, f"no file {name}", "a text file beside config.pbtxt", _FIX, file=name)
        return
    try:
        labels = read_bytes(file).decode("utf-8").splitlines()
    except OSError as error:
        yield model.finding("", f"a file that cannot be read ({error.strerror})", "text", _FIX, file=name)
        return
    except UnicodeDecodeError:
        yield model.finding("", "bytes that are not UTF-8", "text", _FIX, file=name)
        return
    if labels and labels[0].startswith(BYTE_ORDER_MARK):
        fix = "Save it as UTF-8 without one: the server takes it for part of the name."
        yield model.finding("line 1", "a byte order mark before the name", "the name alone", fix, file=name)
    if classes is not None and has_empty_end(labels, classes):
        yield model.finding(
            f"line {classes + 1}", "an empty last line", "a class in each line", "Remove it.", file=name
        )
    elif classes is not None and len(labels) != classes:
        yield model.finding("", f"{len(labels)} lines", f"{classes}, one per class", _FIX, file=name)
    elif empty := [number for number, label in enumerate(labels, start=1) if not label.strip()]:
        yield model.finding(f"line {empty[0]}", "no name", "the name of a class", _FIX, file=name)


def _classes(output: Any) -> int | None:
    """The last extent: classes, in a batch or without one."""
    return int(output.dims[-1]) if output.dims and output.dims[-1] > 0 else None

"""Model repositories whose config.pbtxt, files or facts are damaged, for spach-package triton --check."""

from __future__ import annotations

import os
import re
from pathlib import Path
from random import Random

from benchmarks.robustness.box import Box
from benchmarks.robustness.case import Case, Kind
from benchmarks.robustness.damage import damaged, damaged_json_text, hostile_texts
from benchmarks.robustness.seeds import seeds

_VALUES = (
    "-1",
    "0",
    "99999999999999999999",
    "true",
    '""',
    "TYPE_FP32",
    "KIND_GPU",
    "nan",
    "1e400",
    "{ }",
    "[ ]",
    "[ -1, 0 ]",
)


def _repository(box: Box, chance: Random) -> tuple[Path, tuple[str, ...]]:
    folder = box.bring(seeds().path(chance.choice(("repository", "plans"))), "models")
    more = ("--json",) if chance.random() < 0.3 else ()
    return folder, ("spach-package", "triton", "--check", "models", *more)


def _config(box: Box, chance: Random) -> Case:
    """A value, a line or a byte of a configuration."""
    folder, command = _repository(box, chance)
    path = chance.choice(sorted(folder.rglob("config.pbtxt")))
    text = path.read_text()
    values = list(re.finditer(r"(?<=: ).+", text))
    if chance.random() < 0.3 or not values:
        content, what = damaged(path.read_bytes(), chance)
    else:
        found = chance.choice(values)
        hostile = tuple(f'"{t}"' for t in hostile_texts(str(box.outside)) if "\n" not in t and '"' not in t)
        value = chance.choice((*_VALUES, *hostile))
        content = (text[: found.start()] + value + text[found.end() :]).encode("utf-8", "surrogatepass")
        what = f"{text[: found.start()].splitlines()[-1].strip()} {value[:40]}"
    path.write_bytes(content)
    return Case(f"{path.parent.name}/config.pbtxt: {what}", command)


def _file(box: Box, chance: Random) -> Case:
    """Any other file of the repository."""
    folder, command = _repository(box, chance)
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if path.suffix == ".json":
        content, what = damaged_json_text(path.read_text(), chance, str(box.outside))
    else:
        content, what = damaged(path.read_bytes(), chance)
    path.write_bytes(content)
    if chance.random() < 0.25:
        path.unlink()
        what = chance.choice(("gone", "a folder", "a pipe", "a loop", "nested configuration"))
        if what == "a folder":
            path.mkdir()
        elif what == "a pipe":
            os.mkfifo(path)
        elif what == "a loop":
            path.symlink_to(path.name)
        elif what == "nested configuration":
            (folder / "m").mkdir()
            (folder / "m" / "config.pbtxt").write_text("parameters {" * 5000)
    return Case(f"{path.relative_to(folder)}: {what}", command)


KINDS = (
    Kind("repository, config.pbtxt", 35, _config),
    Kind("repository, files", 30, _file),
)

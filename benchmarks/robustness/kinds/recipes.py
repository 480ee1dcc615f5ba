"""Recipes: values of wrong types and ranges, keys that there are not, text that is no TOML."""

from __future__ import annotations

import os
from random import Random
from typing import Any

from benchmarks.robustness.box import Box
from benchmarks.robustness.case import Case, Kind
from benchmarks.robustness.damage import damaged, hostile_texts
from benchmarks.robustness.kinds.commands import OUT, export
from benchmarks.robustness.seeds import CLASSES, NAME, SIZE
from spach_deploy.options.recipe import KEYS

_WHOLE = {
    "model": f'"{NAME}"',
    "image_size": str(SIZE),
    "num_classes": str(CLASSES),
    "precision": '"fp16"',
    "engine": '"none"',
    "output": f'"{OUT}"',
    "batch": '"1:2:3"',
    "softmax": "true",
    "top_k": "3",
}
_VALUES = (
    *("true", "false", "0", "1", "-1", "99999999999999999999", "0x7fffffffffffffff", "1.5", "1e400", "nan", "-inf"),
    *(
        "1979-05-27T07:32:00Z",
        "07:32:00",
        "[]",
        "[1, 2]",
        '["a", 3]',
        '[["a"]]',
        "{}",
        "{ a = 1 }",
        '""',
        '"""\na\n"""',
    ),
    *(
        '"fp16"',
        '"auto"',
        '"1:2"',
        '"3:2:1"',
        '"0:0:0"',
        '"1:1:9999999999999"',
        '"sm00"',
        '"rtx4090,rtx4090"',
        '"cuda"',
    ),
    *(
        '"-1G"',
        '"9999999T"',
        '"ms_hybrid_s"',
        '"../.."',
        '"/dev/null"',
        '"/dev/zero"',
        '"/"',
        '"."',
        '"~/x"',
        '"bundle\\u0000"',
    ),
)


def _text(value: str) -> str:
    escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in value)
    return f'"{escaped}"'


def _recipe(entries: dict[str, str]) -> str:
    return "".join(f"{key} = {value}\n" for key, value in entries.items())


def _values(box: Box, chance: Random) -> Case:
    entries = dict(_WHOLE)
    texts = tuple(map(_text, hostile_texts(str(box.outside))))
    for key in chance.sample(KEYS, chance.choice((1, 1, 2, 3))):
        entries[key] = chance.choice((*_VALUES, *_VALUES, *texts))
    if chance.random() < 0.1:
        entries[chance.choice(("nothing", "modle", '"a b"', "[table]\nx", "model.name", '"\\u001b[31m"'))] = "1"
    name = box.put("recipe.toml", _recipe(entries))
    more: tuple[str, ...] = ("--no-overwrite",) if chance.random() < 0.2 else ()
    return Case(f"recipe: {_difference(entries)}"[:300], ("spach-export", "--recipe", name, *more))


def _difference(entries: dict[str, str]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in entries.items() if _WHOLE.get(key) != value)


def _bytes(box: Box, chance: Random) -> Case:
    content, what = damaged(_recipe(_WHOLE).encode(), chance)
    return Case(f"recipe: {what}", ("spach-export", "--recipe", box.put("recipe.toml", content)))


def _file(box: Box, chance: Random) -> Case:
    """What stands in a recipe's place."""
    places: dict[str, Any] = {
        "a folder": lambda: box.work.joinpath("recipe.toml").mkdir(),
        "a pipe": lambda: os.mkfifo(box.work / "recipe.toml"),
        "a device": lambda: (box.work / "recipe.toml").symlink_to("/dev/zero"),
        "nothing": lambda: None,
        "a loop": lambda: (box.work / "recipe.toml").symlink_to("recipe.toml"),
        "no permission": lambda: (box.work / "recipe.toml").touch(0o000),
        "brackets": lambda: box.put("recipe.toml", "model = " + "[" * 100_000),
        "tables": lambda: box.put("recipe.toml", "a." * 50_000 + "b = 1"),
        "quotes": lambda: box.put("recipe.toml", '"' * 99_999),
        "many keys": lambda: box.put("recipe.toml", "".join(f"k{i} = {i}\n" for i in range(50_000))),
    }
    what = chance.choice(sorted(places))
    places[what]()
    return Case(f"the recipe is {what}", export(box, chance, "--recipe", "recipe.toml"), what != "no permission")


KINDS = (
    Kind("recipe, values", 65, _values),
    Kind("recipe, bytes", 15, _bytes),
    Kind("recipe, other file", 10, _file),
)

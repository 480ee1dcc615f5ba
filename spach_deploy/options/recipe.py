"""Recipes: the options of spach-export in a TOML file. The command line wins over them; unknown keys are errors.

A recipe's keys are the long options with `_` for `-`, at the top level:

    model = "ms_hybrid_s"
    precision = "fp16"
    gpu = ["sm86", "sm89"]
    batch = "1:8:32"

Paths are relative to the recipe's own folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spach_deploy.common.errors import UsageError
from spach_deploy.common.files import read_text
from spach_deploy.options.table import EXPORT, TABLE, Kind, Option, filling

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NAMES: Mapping[type, str] = {str: "text", int: "whole number", float: "number", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where values come from. `start`: begins an error about one; `reference`: its hint; `folder`: base of paths."""

    start: str
    reference: str
    folder: Path = Path()


def _options(table: Sequence[Option]) -> dict[str, Option]:
    return {option.key: option for option in filling(EXPORT, table) if option.in_recipes}


KEYS = sorted(_options(TABLE))


def read_recipe(path: Path, table: Sequence[Option] = TABLE) -> dict[str, Any]:
    """Option values by key. UsageError for an unreadable file, an unknown key or a value of the wrong kind."""
    text = read_text(path, f"Recipe {path}", "Give a TOML file.")
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"Recipe {path} is not TOML ({error}).", "See export/README.md for an example.") from None
    options, origin = _options(table), Origin(f"Recipe {path}: ", "See export/README.md.", path.parent)
    return {key: checked_value(_known(path, key, options), value, origin) for key, value in content.items()}


def _known(path: Path, key: str, options: Mapping[str, Option]) -> Option:
    if key not in options:
        near = difflib.get_close_matches(key, sorted(options), n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(sorted(options))}."
        raise UsageError(f"Recipe {path} has an unknown key {key!r}.", hint)
    return options[key]


def checked_value(option: Option, value: Any, origin: Origin) -> Any:
    """A TOML value converted to what click would give for the option. UsageError for a value of the wrong kind."""
    match option.kind:
        case Kind.PATH:
            return origin.folder / _typed(option, value, str, origin)
        case Kind.LIST | Kind.REPEATED:
            return _list(option, value, origin)
        case Kind.CHOICE | Kind.FLAGS:
            return _choice(option, _typed(option, value, str, origin), origin)
        case Kind.WHOLE:
            return _number(option, value, origin, int)
        case Kind.REAL:
            return _number(option, float(value) if type(value) is int else value, origin, float)
        case Kind.SWITCH | Kind.FLAG:
            return _typed(option, value, bool, origin)
        case Kind.SIZE:
            return _size(option, value, origin)
        case Kind.BATCHES | Kind.NUMBERS if not isinstance(value, str):
            return _numbers(option, value, origin)
    return _typed(option, value, str, origin)


def _typed(option: Option, value: Any, kind: type, origin: Origin) -> Any:
    if type(value) is not kind:  # not isinstance: True is an int in Python
        raise UsageError(f"{origin.start}{option.key} = {value!r} is not a {_NAMES[kind]}.", origin.reference)
    if isinstance(value, str) and "\0" in value:
        raise UsageError(f"{origin.start}{option.key} has a NUL character.", "No path and no name can have one.")
    return value


def _number(option: Option, value: Any, origin: Origin, kind: type[int] | type[float]) -> Any:
    number = _typed(option, value, kind, origin)
    least, most = option.least, option.most
    if (least is not None and number < least) or (most is not None and number > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise UsageError(f"{origin.start}{option.key} = {number} is out of range.", f"Give {bounds}.")
    return number


def _size(option: Option, value: Any, origin: Origin) -> str:
    """`192x256` of [192, 256], `224` of 224."""
    if isinstance(value, list) and len(value) != 2:
        raise UsageError(
            f"{origin.start}{option.key} = {value!r} is no height and width.", "Give a whole number, or a list of two."
        )
    return "x".join(str(_number(option, side, origin, int)) for side in (value if isinstance(value, list) else [value]))


def _numbers(option: Option, value: Any, origin: Origin) -> str:
    """`1:8:32` of [1, 8, 32] for batches, `0.5,0.5,0.5` of [0.5, 0.5, 0.5] for others; a number alone as text."""
    kinds = (int,) if option.kind is Kind.BATCHES else (int, float)
    items = value if isinstance(value, list) else [value]
    if not items or any(type(item) not in kinds for item in items):
        raise UsageError(f"{origin.start}{option.key} = {value!r} is not a list of numbers.", origin.reference)
    return (":" if option.kind is Kind.BATCHES else ",").join(map(str, items))


def _choice(option: Option, value: str, origin: Origin) -> str:
    if value not in option.choices:
        known = ", ".join(option.choices)
        raise UsageError(f"{origin.start}{option.key} = {value!r} is unknown.", f"One of {known}.")
    return value


def _list(option: Option, value: Any, origin: Origin) -> Any:
    items = value if isinstance(value, list) else [value]
    texts = tuple(_typed(option, item, str, origin) for item in items)
    return ",".join(texts) if option.kind is Kind.LIST else texts

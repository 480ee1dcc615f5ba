"""Option values and `ExportOptions`, from the command line and from recipes.

A recipe has the options of spach-export in a TOML file. The command line wins over them; unknown keys are errors.

A recipe's keys are the long options with `_` for `-`, at the top level:

    model = "ms_hybrid_s"
    precision = "fp16"
    gpu = ["sm86", "sm89"]
    batch = "1:8:32"

Paths are relative to the recipe's own folder.

Values are dictionaries by the options' keys in the table, as click gives them; None and () mean "not given".
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spach_deploy.common.errors import UsageError
from spach_deploy.common.files import read_text
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, Precision
from spach_deploy.options.table import CALIBRATE, EXPORT, TABLE, Kind, Option, filling

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


Options = TypeVar("Options", bound=ExportOptions)
Values = Mapping[str, Any]


def export_options(given: Values, recipe: Path | None = None) -> ExportOptions:
    """Options from click's values and, where these leave gaps, a recipe. UsageError for bad or contradicting values."""
    return filled(ExportOptions(), given, recipe)


def calibrate_options(given: Values) -> ExportOptions:
    """Options of an export that would use the calibration that spach-calibrate makes for these values."""
    base = ExportOptions(precision=Precision.INT8, engine=EngineTarget(Flavour.NONE))
    return _filled(base, given_values(given), filling(CALIBRATE))


def filled(base: Options, given: Values, recipe: Path | None = None, table: Sequence[Option] = TABLE) -> Options:
    """`base` with values filled in: the command line wins over the recipe, and the recipe over `base`."""
    chosen = given_values(given)
    values = {**_of_recipe(recipe, chosen, table), **chosen} if recipe is not None else chosen
    options = filling(EXPORT, table)
    _check_no_engine(values, options)
    return _filled(base, values, options)


def given_values(given: Values) -> dict[str, Any]:
    """The values that were given, with the precision as one word. UsageError for two precisions."""
    chosen = {key: value for key, value in given.items() if value not in (None, ())}
    if "precision" in chosen:
        chosen["precision"] = one_precision(chosen["precision"])
    return chosen


def one_precision(given: str | Sequence[str]) -> str | None:
    """The precision that was given, or None. UsageError for two different ones."""
    chosen = [given] if isinstance(given, str) else list(dict.fromkeys(given))
    if len(chosen) > 1:
        flags = " and ".join(f"--{name}" for name in chosen)
        raise UsageError(f"{flags} exclude each other: an engine has one precision.", "Give one of them.")
    return chosen[0] if chosen else None


def _filled(base: Options, values: Values, options: Sequence[Option]) -> Options:
    for option in options:
        if option.key in values:
            base = with_value(base, option.field, _parsed(option, values[option.key]))
    return base


def _parsed(option: Option, value: Any) -> Any:
    """The value of the option's field, parsed where the option has a parser."""
    if option.kind is Kind.REPEATED:
        return tuple(value)
    return value if option.parse is None else option.parse(value)


def _of_recipe(recipe: Path, chosen: Values, table: Sequence[Option]) -> dict[str, Any]:
    """The recipe's values, without those that mean nothing with what the command line chose.

    With `--engine none` there, options of the engine are dropped; with fp32, fp16 or bf16, options of quantization.
    """
    values, dropped = read_recipe(recipe, table), set[str]()
    if chosen.get("engine") == Flavour.NONE.value and values.get("engine") != Flavour.NONE.value:
        dropped |= {option.key for option in table if option.needs_engine}
    if "precision" in chosen and not Precision(chosen["precision"]).is_quantized:
        dropped |= keys_of_quantization(table)
    return {key: value for key, value in values.items() if key not in dropped}


def keys_of_quantization(table: Sequence[Option] = TABLE) -> set[str]:
    """Keys of the options that only int8 and fp8 use."""
    return {option.key for option in table if option.field.startswith("quantization.")}


def _check_no_engine(values: Values, options: Sequence[Option]) -> None:
    """UsageError for engine options together with --engine none, where they would be ignored silently."""
    if values.get("engine") != Flavour.NONE.value:
        return
    given = {key for key, value in values.items() if value is not False}
    idle = [option.flag for option in options if option.needs_engine and option.key in given]
    if idle:
        raise UsageError(f"--engine none builds no engine, so {', '.join(idle)} can do nothing.", "Leave that out.")


def value_of(options: ExportOptions, field: str) -> Any:
    """The value of a dotted field, such as `quantization.rest`."""
    return functools.reduce(getattr, field.split("."), options)


def with_value(options: Options, field: str, value: Any) -> Options:
    """A copy of the options with another value in a dotted field."""

    def replaced(spec: Any, names: Sequence[str]) -> Any:
        name, *rest = names
        return dataclasses.replace(spec, **{name: replaced(getattr(spec, name), rest) if rest else value})

    changed: Options = replaced(options, field.split("."))
    return changed


def default_of(field: str) -> Any:
    """The default value of a dotted field."""
    return value_of(ExportOptions(), field)

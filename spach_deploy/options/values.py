"""Conversion between option values and `ExportOptions`.

Values are dictionaries by the options' keys in the table, as click gives them; None and () mean "not given".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spach_deploy.common.errors import UsageError
from spach_deploy.options.recipe import read_recipe
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, Precision
from spach_deploy.options.table import CALIBRATE, EXPORT, TABLE, Kind, Option, filling

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

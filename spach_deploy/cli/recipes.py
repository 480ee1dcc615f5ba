"""Recipes: the options of spach-export in a TOML file. The command line wins over them; unknown keys are errors.

A recipe's keys are the long options with `_` for `-`, at the top level:

    model = "ms_hybrid_s"
    precision = "fp16"
    gpu = ["sm86", "sm89"]
    batch = "1:8:32"

Paths are relative to the recipe's own folder.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spach_deploy.cli.options import METHODS, RESTS
from spach_deploy.common.errors import UsageError
from spach_deploy.common.files import read_text
from spach_deploy.options.specs import ACTIVATIONS, Flavour, IODtype, Precision, WeightSource

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_CHOICES = {
    "precision": [p.value for p in Precision],
    "io_dtype": [d.value for d in IODtype],
    "engine": [f.value for f in Flavour],
    "weights": [w.value for w in WeightSource],
    "activation": list(ACTIVATIONS),
    "method": list(METHODS),
    "rest": list(RESTS),
}
_PATHS = ("checkpoint", "images", "answers", "output", "timing_cache", "calibration", "calibration_cache", "labels")
_LISTS = ("gpu", "ignore", "no_rewrite", "keep_float", "quantize", "per_tensor")
_NUMBERS = ("image_size", "num_classes", "heads", "top_k", "opt_level", "opset")
_REALS = ("max_rel_l2", "max_drop", "qk_scale", "norm_eps")
_SWITCHES = (
    *("softmax", "tf32", "version_compatible", "hardware_compatible", "overwrite", "equalize", "allow_overlap"),
    "vnni",
)
_TEXTS = ("model", "batch", "workspace", "mean", "std")
KEYS = sorted((*_CHOICES, *_PATHS, *_LISTS, *_NUMBERS, *_REALS, *_SWITCHES, *_TEXTS))


def read_recipe(path: Path) -> dict[str, Any]:
    """Option values by name; UsageError for an unreadable file, an unknown key or a value of the wrong kind."""
    text = read_text(path, f"Recipe {path}", "Give a TOML file.")
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"Recipe {path} is not TOML ({error}).", "See export/README.md for an example.") from None
    return {key: _value(path, key, value) for key, value in content.items()}


def _value(path: Path, key: str, value: Any) -> Any:
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(KEYS)}."
        raise UsageError(f"Recipe {path} has an unknown key {key!r}.", hint)
    if key in _PATHS:
        return path.parent / _typed(path, key, value, str)
    if key in _LISTS:
        return _list(path, key, value)
    if key in _CHOICES:
        return _choice(path, key, _typed(path, key, value, str))
    if key == "batch" and type(value) is int:
        return str(value)
    if key in _REALS:
        return float(value if type(value) is int else _typed(path, key, value, float))
    if key in _NUMBERS:
        return _number(path, key, value)
    return _typed(path, key, value, bool if key in _SWITCHES else str)


def _typed(path: Path, key: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:  # not isinstance: true is no whole number here
        raise UsageError(f"Recipe {path}: {key} = {value!r} is not a {_NAMES[kind]}.", "See export/README.md.")
    if isinstance(value, str) and "\0" in value:
        raise UsageError(f"Recipe {path}: {key} has a NUL character.", "No path and no name can have one.")
    return value


def _number(path: Path, key: str, value: Any) -> int:
    smallest, largest = (0, 5) if key == "opt_level" else (1, None)
    number: int = _typed(path, key, value, int)
    if number < smallest or (largest is not None and number > largest):
        bounds = f"{smallest} or more" if largest is None else f"{smallest} to {largest}"
        raise UsageError(f"Recipe {path}: {key} = {number} is out of range.", f"Give {bounds}.")
    return number


_NAMES: Mapping[type, str] = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def _choice(path: Path, key: str, value: str) -> str:
    if value not in _CHOICES[key]:
        raise UsageError(f"Recipe {path}: {key} = {value!r} is unknown.", f"One of {', '.join(_CHOICES[key])}.")
    return value


def _list(path: Path, key: str, value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    texts = tuple(_typed(path, key, item, str) for item in items)
    return ",".join(texts) if key == "gpu" else texts

"""Keyword arguments of the public functions, made from the table of options.

The keywords are the keys of the table. The TypedDicts below repeat them for type checkers; a test keeps them equal to
the table.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

from spach_deploy.options.recipe import Origin, checked_value
from spach_deploy.options.table import CALIBRATE, EXPORT, VALIDATE, Kind, Option, filling, options_of

F = TypeVar("F", bound=Callable[..., Any])

FilePath = str | os.PathLike[str]
Texts = str | Sequence[str]
Channels = str | float | Sequence[float]
Batches = str | int | tuple[int, int, int]

_ORIGIN = Origin("", "See docs/python.md.")


class ModelKeywords(TypedDict, total=False):
    """Keywords that `export` and `calibrate` share, except `model`."""

    arch: FilePath
    module: str
    checkpoint: FilePath
    weights: Literal["model", "ema"]
    ignore: Texts
    image_size: int | tuple[int, int]
    num_classes: int
    heads: int
    qk_scale: float
    activation: Literal["gelu", "gelu-tanh", "relu", "silu"]
    norm_eps: float
    divisions: int
    mean: Channels
    std: Channels
    crop: float
    interpolation: Literal["bicubic", "bilinear", "nearest"]
    calibration: FilePath
    method: Literal["max", "percentile", "entropy", "mse"]
    rest: Literal["fp16", "bf16", "fp32"]
    keep_float: Texts
    quantize: Texts
    per_tensor: Texts
    equalize: bool
    allow_overlap: bool
    no_rewrite: Texts
    overwrite: bool


class ExportKeywords(ModelKeywords, total=False):
    """Keywords of `spach_deploy.export`, except `model`."""

    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"]
    images: FilePath
    answers: FilePath
    calibration_cache: FilePath
    eight_bit_layers: Literal["auto", "paying", "all"]
    vnni: bool
    max_rel_l2: float
    max_drop: float
    labels: FilePath
    io_dtype: Literal["fp32", "fp16", "uint8"]
    top_k: int
    softmax: bool
    outputs: Texts
    feature_layout: Literal["nchw", "tokens"]
    output_name: Texts
    engine: Literal["auto", "tensorrt", "tensorrt-rtx", "none"]
    gpu: Texts
    batch: Batches
    opt_level: int
    workspace: str | int
    timing_cache: FilePath
    tf32: bool
    version_compatible: bool
    hardware_compatible: bool
    opset: int
    output: FilePath


class CalibrateKeywords(ModelKeywords, total=False):
    """Keywords of `spach_deploy.calibrate`, except `model` and `output`."""

    precision: Literal["int8", "fp8"]


class ValidateKeywords(TypedDict, total=False):
    """Keywords of `spach_deploy.validate`, except `target`."""

    images: FilePath
    max_images: int
    labels: FilePath
    max_drop: float
    module: str
    checkpoint: FilePath
    weights: Literal["model", "ema"]
    answers: FilePath
    against: FilePath
    ignore: Texts
    bisect: bool
    accept: Literal["graph"]


def keywords(command: str) -> dict[str, Option]:
    """The options of a command that a Python caller may give, by key: without clusters and options of the terminal."""
    available = filling(command) if command in (EXPORT, CALIBRATE) else options_of(command)
    hidden = {"bundle"} if command == VALIDATE else set()  # for servers, which take other options
    taken = [option for option in available if option.kind is not Kind.ADDRESS and option.key not in hidden]
    return {option.key: option for option in taken if option.is_recorded}


def values_of_keywords(function: str, command: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values as click would give them. TypeError for an unknown keyword, UsageError for a value of the wrong kind."""
    known = keywords(command)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {key!r}{hint}")
    given = {key: value for key, value in given.items() if value is not None}
    return {key: checked_value(known[key], _plain(known[key], value), _ORIGIN) for key, value in given.items()}


def _plain(option: Option, value: Any) -> Any:
    """A Python value as a TOML recipe would hold it: text for paths, lists for tuples."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if option.kind is Kind.TEXT and type(value) in (int, float):
        return str(value)
    if option.kind is Kind.TEXT and isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return list(value) if isinstance(value, tuple) else value


def with_keywords(command: str) -> Callable[[F], F]:
    """Decorator: add a command's options to the function's signature and docstring, as `help()` shows them."""

    def decorate(function: F) -> F:
        options = keywords(command)
        signature = inspect.signature(function)
        own = {name: entry for name, entry in signature.parameters.items() if entry.kind is not entry.VAR_KEYWORD}
        more = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None) for key in options if key not in own
        ]
        function.__signature__ = signature.replace(parameters=[*own.values(), *more])  # type: ignore[attr-defined]
        lines = [f"    {key}: {_help(option)}" for key, option in options.items()]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", f"As {command} has them:", *lines])
        return function

    return decorate


def _help(option: Option) -> str:
    if option.kind is Kind.FLAGS:
        return " ".join(f"{choice}: {text}" for choice, text in zip(option.choices, option.each, strict=True))
    choices = f" One of {', '.join(option.choices)}." if option.choices else ""
    return f"{option.help}{choices}"

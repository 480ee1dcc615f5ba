"""Options as the command line that asks for them, so that a report can say how to do it again."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from spach_deploy.options.specs import EngineTarget, ExportOptions, ModelSpec, QuantizationSpec, WeightSource

Arguments = Iterator[str]


def quoted(word: object) -> str:
    """A word as a shell takes it. What cannot be printed stands as octal bytes in the $'...' of bash, zsh and ksh."""
    text = str(word)
    return shlex.quote(text) if text.isprintable() else f"$'{''.join(map(_in_dollar_quotes, text))}'"


def _in_dollar_quotes(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    try:
        content = os.fsencode(character)
    except UnicodeEncodeError:  # of a file's text, no name that this system could have
        content = character.encode("utf-8", "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in content)


def joined(words: Iterable[object]) -> str:
    """Words as a shell takes them."""
    return " ".join(map(quoted, words))


def export_command(options: ExportOptions) -> str:
    """The call of spach-export that gives `options`; what is as by default is left out."""
    return joined(["spach-export", *export_arguments(options)])


def export_arguments(options: ExportOptions) -> list[str]:
    """Its words, without the program."""
    words = [*_model(options.model), f"--{options.precision.value}"]
    words += _optional("--images", options.images)
    words += _optional("--answers", options.answers)
    if options.precision.is_quantized:
        words += _quantization(options.quantization)
    default = ExportOptions().outputs
    if options.outputs.io_dtype is not default.io_dtype:
        words += ["--io-dtype", options.outputs.io_dtype.value]
    words += _optional("--top-k", options.outputs.top_k)
    words += _flag("--softmax", options.outputs.softmax)
    words += _engine(options.engine)
    words += _optional("--opset", options.opset)
    words += _repeated("--no-rewrite", options.disabled_rewrites)
    words += _optional("--output", options.output)
    return [*words, *_flag("--overwrite", options.overwrite)]


def _model(spec: ModelSpec) -> Arguments:
    yield from _optional("--model", spec.name)
    yield from _optional("--checkpoint", spec.checkpoint)
    if spec.weights is not WeightSource.MODEL:
        yield from ("--weights", spec.weights.value)
    yield from _repeated("--ignore", spec.ignore)
    yield from _optional("--image-size", spec.image_size)
    yield from _optional("--num-classes", spec.num_classes)
    for name, value in spec.hyperparameters.given().items():
        text = ",".join(map(repr, value)) if isinstance(value, tuple) else str(value)
        yield from _optional(f"--{name.replace('_', '-')}", text)


def _quantization(spec: QuantizationSpec) -> Arguments:
    default = QuantizationSpec()
    yield from _optional("--calibration", spec.calibration)
    yield from _optional("--calibration-cache", spec.cache and spec.cache.path)
    if spec.method != default.method:
        yield from ("--method", spec.method)
    if spec.rest is not default.rest:
        yield from ("--rest", spec.rest.value)
    for option, patterns in (
        ("--keep-float", spec.keep_float),
        ("--quantize", spec.quantize),
        ("--per-tensor", spec.per_tensor),
    ):
        yield from _repeated(option, patterns)
    yield from _flag("--no-equalize", not spec.equalize)
    yield from _flag("--vnni", spec.vnni)
    yield from _flag("--allow-overlap", spec.allow_overlap)
    yield from _optional("--max-rel-l2", spec.max_rel_l2)
    yield from _optional("--max-drop", spec.max_drop)
    yield from _optional("--labels", spec.labels)


def _engine(target: EngineTarget) -> Arguments:
    default = EngineTarget()
    if target.flavour is not default.flavour:
        yield from ("--engine", target.flavour.value)
    if target.gpus:
        yield from ("--gpu", ",".join(map(str, target.gpus)))
    if target.batch != default.batch:
        yield from ("--batch", str(target.batch))
    yield from _optional("--opt-level", target.opt_level)
    yield from _optional("--workspace", target.workspace_bytes)
    yield from _optional("--timing-cache", target.timing_cache)
    yield from _flag("--no-tf32", not target.tf32)
    yield from _flag("--version-compatible", target.version_compatible)
    yield from _flag("--hardware-compatible", target.hardware_compatible)


@dataclasses.dataclass(frozen=True)
class ValidateCommand:
    """A call of spach-validate, option by option; None, False and defaults are left out."""

    target: str
    other: Path | None = None
    bundle: Path | None = None
    images: Path | None = None
    max_images: int = 256
    labels: Path | None = None
    max_drop: float | None = None
    checkpoint: Path | None = None
    weights: str | None = None
    ignore: tuple[str, ...] = ()
    answers: Path | None = None
    bisect: bool = False
    against: Path | None = None
    accept_graph: bool = False


def validate_command(given: ValidateCommand) -> str:
    """The call of spach-validate."""
    words = ["spach-validate", given.target, *([] if given.other is None else [str(given.other)])]
    for option, value in (
        ("--bundle", given.bundle),
        ("--images", given.images),
        ("--max-images", given.max_images if given.images else None),
        ("--labels", given.labels),
        ("--max-drop", given.max_drop),
        ("--checkpoint", given.checkpoint),
        ("--weights", given.weights),
        ("--answers", given.answers),
        ("--against", given.against),
    ):
        words += _optional(option, value)
    words += _repeated("--ignore", given.ignore)
    words += _flag("--bisect", given.bisect)
    return joined([*words, *(("--accept", "graph") if given.accept_graph else ())])


def _optional(option: str, value: object) -> Arguments:
    if value is not None:
        yield from (option, f"{value:g}" if isinstance(value, float) else str(value))


def _flag(option: str, is_given: bool) -> Arguments:
    if is_given:
        yield option


def _repeated(option: str, values: Sequence[str]) -> Arguments:
    for value in values:
        yield from (option, value)

"""From command-line values and a recipe to `ExportOptions`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spach_deploy.cli.recipes import read_recipe
from spach_deploy.common.errors import UsageError
from spach_deploy.common.files import Destination
from spach_deploy.options.specs import (
    BatchProfile,
    Channels,
    EngineTarget,
    ExportOptions,
    Flavour,
    Hyperparameters,
    IODtype,
    ModelSpec,
    OutputSpec,
    Precision,
    QuantizationSpec,
    WeightSource,
)

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LARGEST_WORKSPACE = 1 << 50
_OF_ENGINES = ("gpu", "opt_level", "workspace", "timing_cache", "version_compatible", "hardware_compatible")
"""Options that mean nothing without an engine."""

_OF_EIGHT_BITS = (
    *("calibration", "calibration_cache", "method", "rest", "keep_float", "quantize", "per_tensor", "equalize"),
    *("allow_overlap", "max_rel_l2", "max_drop", "labels", "vnni"),
)
"""Options that mean nothing in other precisions."""


def export_options(given: Mapping[str, Any], recipe: Path | None) -> ExportOptions:
    """Options from click's values, `precisions` being the precision flags that were given; a recipe fills the gaps.

    Raises UsageError for contradictions and for what cannot be parsed.
    """
    chosen = {name: value for name, value in given.items() if value not in (None, ())}
    precision = one_precision(chosen.pop("precisions", ()))
    if precision is not None:
        chosen["precision"] = precision
    values = {**(_recipe_values(recipe, chosen) if recipe is not None else {}), **chosen}
    _check_no_engine(values)
    return ExportOptions(
        model=_model(values),
        precision=Precision(values.get("precision") or "fp32"),
        outputs=_outputs(values),
        engine=_engine(values),
        images=values.get("images"),
        answers=values.get("answers"),
        output=values.get("output"),
        overwrite=bool(values.get("overwrite")),
        disabled_rewrites=tuple(values.get("no_rewrite") or ()),
        quantization=quantization_spec(values),
        opset=values.get("opset"),
    )


def is_zoo(given: Mapping[str, Any]) -> bool:
    """Whether many exports are asked for. UsageError for an option that means something only then."""
    if given.get("zoo") is not None:
        return True
    for name, option in (("precision_list", "--precision"), ("jobs", "--jobs")):
        if given.get(name) is not None:
            hint = "Give --zoo PATTERNS, or one precision as --fp16." if name == "precision_list" else "Leave it out."
            raise UsageError(f"{option} is for --zoo.", hint)
    return False


def zoo_options(given: Mapping[str, Any], recipe: Path | None, *, is_mixed: bool) -> ExportOptions:
    """Options of one of many exports; `is_mixed`: others are quantized, so what is said of that is not for this one."""
    precision = Precision(given["precisions"][0])
    if is_mixed and not precision.is_quantized:
        given = {name: value for name, value in given.items() if name not in _OF_EIGHT_BITS}
    return export_options(given, recipe)


def auto_options(given: Mapping[str, Any], recipe: Path | None) -> ExportOptions:
    """Options that every candidate of --auto shares. UsageError beside a precision, which --auto is to find."""
    precision = one_precision(given.get("precisions", ()))
    if precision is not None:
        raise UsageError(f"--auto chooses the precision, and --{precision} does too.", "Give one of them.")
    options = export_options({**given, "precisions": ("int8",)}, recipe)
    from spach_deploy.cli.early_checks import refuse_early
    from spach_deploy.pipeline.auto import check_auto, options_for

    check_auto(options)
    refuse_early(options_for(options, Precision.FP16))
    return options


def cpu_options(given: Mapping[str, Any], recipe: Path | None) -> tuple[ExportOptions, Precision | None]:
    """Options that the candidates of --target cpu share, and the only precision that was asked for."""
    from spach_deploy.pipeline.cpu_target import check_cpu

    precision = one_precision(given.get("precisions", ()))
    shared = precision or ("int8" if given.get("calibration") is not None else "fp32")
    options = export_options({**given, "precisions": (shared,)}, recipe)
    asked = None if precision is None else Precision(precision)
    check_cpu(options, asked)
    return options, asked


def calibrate_options(given: Mapping[str, Any]) -> ExportOptions:
    """Options of an export that would need the calibration which spach-calibrate was asked for."""
    chosen = {name: value for name, value in given.items() if value not in (None, ())}
    return ExportOptions(
        model=_model(chosen),
        precision=Precision(one_precision(chosen.pop("precisions", ())) or "int8"),
        engine=EngineTarget(Flavour.NONE),
        overwrite=bool(chosen.get("overwrite")),
        disabled_rewrites=tuple(chosen.get("no_rewrite") or ()),
        quantization=quantization_spec(chosen),
    )


def quantization_spec(values: Mapping[str, Any]) -> QuantizationSpec:
    """What was said about calibration and quantized layers."""
    default = QuantizationSpec()
    equalize = values.get("equalize")
    return QuantizationSpec(
        calibration=values.get("calibration"),
        cache=Destination.of(values["calibration_cache"]) if values.get("calibration_cache") else None,
        method=values.get("method") or default.method,
        rest=Precision(values.get("rest") or default.rest.value),
        keep_float=tuple(values.get("keep_float") or ()),
        quantize=tuple(values.get("quantize") or ()),
        per_tensor=tuple(values.get("per_tensor") or ()),
        equalize=default.equalize if equalize is None else equalize,
        allow_overlap=bool(values.get("allow_overlap")),
        max_rel_l2=values.get("max_rel_l2"),
        max_drop=values.get("max_drop"),
        labels=values.get("labels"),
        vnni=bool(values.get("vnni")),
        cluster=values.get("cluster"),
    )


def _recipe_values(recipe: Path, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's values; with --engine none on the command line, less those that an engine alone would need.

    With another precision there, also less those of eight bits.
    """
    values = read_recipe(recipe)
    if chosen.get("engine") == Flavour.NONE.value and values.get("engine") != Flavour.NONE.value:
        values = {name: value for name, value in values.items() if name not in _OF_ENGINES}
    precision = chosen.get("precision")
    if precision is not None and not Precision(precision).is_quantized:
        values = {name: value for name, value in values.items() if name not in _OF_EIGHT_BITS}
    return values


def _check_no_engine(values: Mapping[str, Any]) -> None:
    """Refuse what would be silently left undone."""
    if values.get("engine") != Flavour.NONE.value:
        return
    given = [name for name in _OF_ENGINES if not (values.get(name) is None or values[name] is False)]
    idle = [f"--{name.replace('_', '-')}" for name in given]
    if idle:
        raise UsageError(f"--engine none builds no engine, so {', '.join(idle)} can do nothing.", "Leave that out.")


def one_precision(given: tuple[str, ...]) -> str | None:
    """The one precision flag, or None; UsageError for two different ones."""
    chosen = list(dict.fromkeys(given))
    if len(chosen) > 1:
        flags = " and ".join(f"--{name}" for name in chosen)
        raise UsageError(f"{flags} exclude each other: an engine has one precision.", "Give one of them.")
    return chosen[0] if chosen else None


def _model(values: Mapping[str, Any]) -> ModelSpec:
    return ModelSpec(
        name=values.get("model"),
        checkpoint=values.get("checkpoint"),
        weights=WeightSource(values.get("weights") or "model"),
        image_size=values.get("image_size"),
        num_classes=values.get("num_classes"),
        ignore=tuple(values.get("ignore") or ()),
        hyperparameters=Hyperparameters(
            heads=values.get("heads"),
            qk_scale=values.get("qk_scale"),
            activation=values.get("activation"),
            norm_eps=values.get("norm_eps"),
            mean=_channels("--mean", values.get("mean")),
            std=_channels("--std", values.get("std")),
        ),
    )


def _channels(option: str, text: str | None) -> Channels | None:
    """`0.5,0.5,0.5`, or one number for all three."""
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
        red, green, blue = values * 3 if len(values) == 1 else values
    except ValueError:
        raise UsageError(f"{option} {text!r} is not three numbers.", f"Give {option} 0.485,0.456,0.406.") from None
    return red, green, blue


def _outputs(values: Mapping[str, Any]) -> OutputSpec:
    return OutputSpec(IODtype(values.get("io_dtype") or "fp32"), values.get("top_k"), bool(values.get("softmax")))


def _engine(values: Mapping[str, Any]) -> EngineTarget:
    from spach_deploy.engine.gpus import parse_gpus

    batch, gpus, workspace = values.get("batch"), values.get("gpu"), values.get("workspace")
    tf32 = values.get("tf32")
    return EngineTarget(
        flavour=Flavour(values.get("engine") or "auto"),
        gpus=parse_gpus(gpus) if gpus is not None else (),
        batch=BatchProfile.parse(batch) if batch is not None else BatchProfile(),
        opt_level=values.get("opt_level"),
        workspace_bytes=parse_size(workspace) if workspace is not None else None,
        timing_cache=values.get("timing_cache"),
        tf32=True if tf32 is None else tf32,
        version_compatible=bool(values.get("version_compatible")),
        hardware_compatible=bool(values.get("hardware_compatible")),
    )


def parse_size(text: str) -> int:
    """Bytes of `512M`, `2G` or a plain number (powers of 1024)."""
    match = re.fullmatch(r"(\d{1,15})\s*([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    size = int(match[1]) * _UNITS[match[2].upper()] if match else 0
    if not 0 < size <= _LARGEST_WORKSPACE:
        raise UsageError(f"--workspace {text!r} is not a size.", "Give 512M, 2G or a number of bytes.")
    return size

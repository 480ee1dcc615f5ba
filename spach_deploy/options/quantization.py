"""Checks of quantization options that need neither the model nor any image."""

from __future__ import annotations

import math
from pathlib import Path

from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.common.files import Destination, try_to_write
from spach_deploy.common.machine import has_vnni
from spach_deploy.options.command_line import flag_for
from spach_deploy.options.recipe import default_of, value_of
from spach_deploy.options.specs import ExportOptions, Flavour, Precision, QuantizationSpec
from spach_deploy.options.table import filling

CALIBRATION_SUFFIX = ".json"
"""Suffix of calibration files; --calibration takes anything else as images."""


def check_quantization(options: ExportOptions) -> None:
    """UsageError for options that contradict each other, ImageError for missing images; before any work."""
    spec = options.quantization
    if not options.precision.is_quantized:
        _check_idle(options)
        return
    flag = f"--{options.precision.value}"
    if spec.calibration is None:
        raise UsageError(
            f"{flag} needs images to calibrate on, and none are ever made up.",
            "Give --calibration DIR with 64 or more images like those that the model is for.",
        )
    if not spec.calibration.exists():
        raise ImageError(f"{spec.calibration} does not exist.", "Give --calibration a folder, a tar, an npz or a file.")
    if spec.cache is not None:
        _check_cache(spec.cache)
    _check_bounds(spec, options)
    if spec.cluster is not None and spec.calibration.suffix == CALIBRATION_SUFFIX and not spec.is_bounded:
        raise UsageError("--ray has nothing to spread: the calibration is made, and no bound is set.", "Leave it out.")
    if spec.vnni:
        _check_vnni(options)
    if spec.rest.is_quantized:
        raise UsageError("--rest is for what is not quantized.", "Give --rest fp16, bf16 or fp32.")


def _check_vnni(options: ExportOptions) -> None:
    for_cpu = options.precision is Precision.INT8 and options.rest is Precision.FP32
    if not for_cpu or options.engine.flavour is not Flavour.NONE:
        raise UsageError(
            "--vnni is for eight bits on a CPU.", "Give --int8 --rest fp32 --engine none, or leave it out."
        )
    if not has_vnni():
        raise UsageError(
            "--vnni needs a CPU with VNNI (avx512_vnni, avx_vnni, amx_int8) to prove the graph on; this one has none.",
            "Leave it out, or export where the model will run.",
        )


def _check_bounds(spec: QuantizationSpec, options: ExportOptions) -> None:
    if spec.max_rel_l2 is not None and spec.max_drop is not None:
        raise UsageError("--max-rel-l2 and --max-drop are two bounds; one of them decides.", "Give one of them.")
    for option, value in (("--max-rel-l2", spec.max_rel_l2), ("--max-drop", spec.max_drop)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{option} {value:g} is no bound.", "Give a number of 0 or more.")
    if spec.max_drop is not None and (options.images is None or spec.labels is None):
        raise UsageError("--max-drop needs labelled images.", "Give --images PATH and --labels FILE or folder.")
    if spec.labels is not None and spec.max_drop is None:
        raise UsageError("--labels is for --max-drop here.", "Give --max-drop POINTS, or leave --labels out.")


def _check_idle(options: ExportOptions) -> None:
    for field in (option.field for option in filling() if option.field.startswith("quantization.")):
        if (value := value_of(options, field)) != default_of(field):
            flag = flag_for(field, value)
            raise UsageError(f"{flag} is for quantized exports.", "Add --int8 or --fp8, or leave it out.")


def check_calibration_file(file: Path) -> Destination:
    """The destination of a calibration file. UsageError where it could not be written."""
    if file.suffix != CALIBRATION_SUFFIX:
        raise UsageError(f"{file} does not end with {CALIBRATION_SUFFIX}.", "Calibrations are JSON: give -o FILE.json.")
    destination = Destination.of(file)
    _check_cache(destination)
    return destination


def _check_cache(destination: Destination) -> None:
    """UsageError for a calibration file that could not be written, before the first image is read."""
    folder, file = destination.path.parent, destination.path
    if not folder.is_dir():
        what = "is not a directory" if folder.exists() else "does not exist"
        raise UsageError(f"{folder} {what}, so {file} cannot be written there.", "Choose another FILE.json.")
    try:
        try_to_write(file)
    except OSError as error:
        raise UsageError(
            f"{file} cannot be written ({error.strerror or error}).", "Choose another FILE.json."
        ) from None

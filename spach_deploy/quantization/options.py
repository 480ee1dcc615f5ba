"""What can be said about quantization options before anything is loaded."""

from __future__ import annotations

import dataclasses

from spach_deploy.errors import ImageError, UsageError
from spach_deploy.specs import ExportOptions, QuantizationSpec


def check_quantization(options: ExportOptions) -> None:
    """Refuse what can be refused before any work."""
    spec = options.quantization
    if not options.precision.is_quantized:
        _check_idle(spec)
        return
    flag = f"--{options.precision.value}"
    if spec.calibration is None:
        raise UsageError(
            f"{flag} needs images to calibrate on, and none are ever made up.",
            "Give --calibration DIR with 64 or more images like those that the model is for.",
        )
    if not spec.calibration.exists():
        raise ImageError(f"{spec.calibration} does not exist.", "Give --calibration a folder, a tar, an npz or a file.")
    if spec.rest.is_quantized:
        raise UsageError("--rest is for what is not quantized.", "Give --rest fp16, bf16 or fp32.")


def _check_idle(spec: QuantizationSpec) -> None:
    default = QuantizationSpec()
    for field in dataclasses.fields(spec):
        if getattr(spec, field.name) != getattr(default, field.name):
            option = f"--{field.name.replace('_', '-')}"
            raise UsageError(f"{option} is for quantized exports.", "Add --int8 or --fp8, or leave it out.")

"""The graphs that runtimes are given: small models of each family, in every precision and both forms, really exported.

`--engine none` gives the form for CPUs, `--engine tensorrt-rtx` that for TensorRT, which is served too where no plan of
the serving machine is at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.photographs import calibration_photographs
from spach_deploy.bundle.store import MANIFEST, Bundle
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.specs import (
    EngineTarget,
    ExportOptions,
    Flavour,
    ModelSpec,
    Precision,
    QuantizationSpec,
)
from spach_deploy.pipeline.export import export
from tests.static_models import architecture

SIZE, CLASSES = 64, 10
_COMMON: dict[str, Any] = {"image_size": (SIZE, SIZE), "classes": CLASSES}
STACKS = {
    "conv": architecture(64, 16, 2, "3 conv", **_COMMON),
    "trans": architecture(64, 16, 3, "3 trans", heads=2, **_COMMON),
    "mlp": architecture(32, 16, 3, "3 mlp", **_COMMON),
    "hybrid": architecture(32, 4, 3, "1 conv | 1 conv, 1 trans | 2 trans | 1 conv, 1 trans", heads=2, **_COMMON),
    "smlpnet": Architecture(
        family="smlpnet",
        patch_size=4,
        width=32,
        stages=((("smlp", 1),), (("smlp", 2),)),
        channel_ratio=3,
        norm_eps=1e-5,
        **_COMMON,
    ),
    "shiftvit": Architecture(
        family="shiftvit",
        patch_size=4,
        width=32,
        stages=((("shift", 1),), (("shift", 2),)),
        channel_ratio=2,
        norm_eps=1e-5,
        divisions=8,
        **_COMMON,
    ),
}
"""By family; hybrid is multi-stage, and has a convolutional stage in front as all published multi-stage models have."""

PRECISIONS = {
    "fp32": (Precision.FP32, Precision.FP32),
    "fp16": (Precision.FP16, Precision.FP16),
    "bf16": (Precision.BF16, Precision.BF16),
    "int8": (Precision.INT8, Precision.FP16),
    "int8 in fp32": (Precision.INT8, Precision.FP32),
    "fp8": (Precision.FP8, Precision.FP16),
}
"""What is asked for, and the rest."""

FORMS = {"cpu": Flavour.NONE, "tensorrt": Flavour.TENSORRT_RTX}


@dataclasses.dataclass(frozen=True)
class Case:
    """One graph."""

    stack: str
    form: str
    precision: str

    @property
    def folder(self) -> str:
        """Name of its bundle."""
        return f"{self.stack}-{self.form}-{self.precision.replace(' ', '-')}"


def cases() -> Iterator[Case]:
    """All of them."""
    for precision in PRECISIONS:
        for form in FORMS:
            for stack in STACKS:
                yield Case(stack, form, precision)


def bundle(case: Case, cache: Path) -> Bundle:
    """Its bundle below `cache`, exported unless it is there."""
    target = cache / case.folder
    if not (target / MANIFEST).exists():
        export(_options(case, target, cache))
    return Bundle.open(target)


def _options(case: Case, target: Path, cache: Path) -> ExportOptions:
    asked, rest = PRECISIONS[case.precision]
    flavour = FORMS[case.form]
    photographs = cache / "calibration.npz"
    if asked.is_quantized and not photographs.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(photographs, images=calibration_photographs(16))
    return ExportOptions(
        ModelSpec(architecture=STACKS[case.stack]),
        asked,
        engine=EngineTarget(flavour),
        output=target,
        quantization=QuantizationSpec(calibration=photographs, rest=rest) if asked.is_quantized else QuantizationSpec(),
    )

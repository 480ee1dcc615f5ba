"""Small quantized bundles, exported for real once per run of the tests; tests that spoil one take a copy.

Calibrated on crops of the built-in photographs, which are other images than the golden ones. The INT8 bundle quantizes
one attention beside what the rules choose, so that faults can be planted there too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spach_deploy.data.images import probe_source
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, ModelSpec, Precision, QuantizationSpec
from spach_deploy.pipeline.export import export
from tests import small_bundles
from tests.shared import once

ATTENTION = "layer3.3.spatial_func"
"""The attention that the INT8 bundle quantizes."""

CROP = 160


def _crops(corner: int) -> Iterator[NDArray[np.uint8]]:
    """One crop of every built-in photograph, mirrored where the corner is odd."""
    for item in probe_source():
        pixels = np.asarray(item.image)
        height, width = (extent - CROP for extent in pixels.shape[:2])
        top, left = (corner * 37) % height, (corner * 53) % width
        crop = pixels[top : top + CROP, left : left + CROP]
        yield crop[:, ::-1] if corner % 2 else crop


def pictures(count: int, first: int = 0) -> NDArray[np.uint8]:
    """`count` different pictures, uint8 (count, CROP, CROP, 3); those of other `first` (of tens) are others."""
    rounds = range(first, first + -(-count // 8))
    return np.stack([crop for corner in rounds for crop in _crops(corner)])[:count]


def calibration_images(count: int = 16, first: int = 1) -> Path:
    """An npz of pictures to calibrate on."""
    return once(f"images-{count}-{first}.npz", lambda path: np.savez(path, images=pictures(count, first)))


def options(precision: Precision, target: Path, spec: QuantizationSpec | None = None) -> ExportOptions:
    """Options of an export of the small model without an engine."""
    model = ModelSpec(small_bundles.NAME, image_size=small_bundles.SIZE, num_classes=small_bundles.CLASSES)
    spec = spec or QuantizationSpec(calibration=calibration_images())
    return ExportOptions(model, precision, engine=EngineTarget(Flavour.NONE), output=target, quantization=spec)


def bundle(precision: Precision) -> Path:
    """A bundle that tests share and do not change."""

    def make(target: Path) -> None:
        chosen = (ATTENTION,) if precision is Precision.INT8 else ()
        spec = QuantizationSpec(calibration=calibration_images(), quantize=chosen)
        with small_bundles.registered():
            export(options(precision, target, spec))

    return once(f"small-quantized/{precision.value}", make)


def for_tensorrt() -> Path:
    """An INT8 bundle with a graph in TensorRT's form and the rest in FP16."""

    def make(target: Path) -> None:
        spec = QuantizationSpec(calibration=calibration_images(), quantize=(ATTENTION,))
        with small_bundles.registered(), small_bundles.form_for_tensorrt():
            export(options(Precision.INT8, target, spec))

    return once("small-quantized/for-tensorrt", make)

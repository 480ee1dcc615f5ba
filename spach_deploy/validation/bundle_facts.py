"""A bundle's manifest as the specs and tolerances that a validation works with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from spach_deploy.bundle.schema import QuantizationSection, reading
from spach_deploy.bundle.store import MANIFEST, Bundle
from spach_deploy.models.hyperparameters import read_section
from spach_deploy.options.specs import BatchProfile, Flavour, OutputSpec, Precision, Preprocessing
from spach_deploy.validation.tolerance import ToleranceSet

if TYPE_CHECKING:
    from spach_deploy.quantization.plan import QuantizationPlan


@dataclasses.dataclass(frozen=True)
class QuantizationFacts:
    """What a quantized bundle was made with.

    `record`: the file of its quantization plan. `weights_sha256`: of the calibrated weights. `disabled`, `quantize`:
    the options --no-rewrite and --quantize.
    """

    record: Path
    weights_sha256: str
    disabled: tuple[str, ...]
    quantize: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BundleFacts:
    """A manifest's specs. `rest`: precision of layers that are not quantized. `tf32`: whether the engine may use
    TF32.
    """

    precision: Precision
    rest: Precision
    preprocessing: Preprocessing
    outputs: OutputSpec
    batch: BatchProfile
    flavour: Flavour
    tolerances: ToleranceSet
    tf32: bool
    quantization: QuantizationFacts | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> BundleFacts:
        """Read the manifest. BundleError where an entry is of the wrong kind."""
        manifest, where = bundle.manifest, str(bundle.path / MANIFEST)
        with reading(where, "model"):
            read_section(manifest.model.hyperparameters)
        with reading(where, "validation"):
            tolerances = ToleranceSet.of(manifest.validation.tolerances)
        return cls(
            manifest.precision.asked,
            manifest.precision.rest or manifest.precision.asked,
            manifest.preprocessing,
            manifest.output_options,
            manifest.batch,
            manifest.engine.flavour,
            tolerances,
            manifest.engine.tf32,
            None if manifest.quantization is None else _quantization(bundle, manifest.quantization),
        )


def read_record(facts: BundleFacts) -> QuantizationPlan | None:
    """The quantization plan of a quantized bundle; None for others."""
    if facts.quantization is None:
        return None
    from spach_deploy.quantization.plan import read_plan

    return read_plan(facts.quantization.record)


def _quantization(bundle: Bundle, section: QuantizationSection) -> QuantizationFacts:
    record, rewrites = bundle.path / section.scales, section.rewrites
    return QuantizationFacts(record, section.calibration.weights_sha256, rewrites.disabled, rewrites.quantize)

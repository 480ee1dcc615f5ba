"""What a manifest says, as the objects that a validation works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.bundle.store import MANIFEST, Bundle, reading
from spach_deploy.models.hyperparameters import read_section
from spach_deploy.options.specs import BatchProfile, Flavour, IODtype, OutputSpec, Precision, Preprocessing
from spach_deploy.validation.tolerance import ToleranceSet

if TYPE_CHECKING:
    from spach_deploy.quantization.plan import QuantizationPlan

_MODEL_ENTRIES = (
    "name",
    "image_size",
    "num_classes",
    "origin",
    "checkpoint",
    "checkpoint_sha256",
    "weights",
    "weights_sha256",
)


def _check_model(section: Mapping[str, Any]) -> None:
    """KeyError and ValueError for what `BundleFacts.of` explains."""
    _ = [section[name] for name in _MODEL_ENTRIES]
    ignored = section.get("ignored", [])
    if not (isinstance(ignored, list) and all(isinstance(pattern, str) for pattern in ignored)):
        raise ValueError(f"ignored is {ignored!r}")
    read_section(section.get("hyperparameters"))


def _check_top_k(top_k: Any, classes: int) -> None:
    if top_k is not None and not (type(top_k) is int and 1 <= top_k <= classes):
        raise ValueError(f"top_k is {str(top_k)[:40]}, not 1 to {classes}")


@dataclasses.dataclass(frozen=True)
class QuantizationFacts:
    """Where a bundle's record of quantization lies, and what its model's rewrites were told.

    `weights_sha256`: of the weights that were calibrated.
    """

    record: Path
    weights_sha256: str
    disabled: tuple[str, ...]
    quantize: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BundleFacts:
    """A manifest, read. `rest`: precision of what is not quantized. `tf32`: the engine may use TF32."""

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
        """BundleError when the manifest has an entry of the wrong kind."""
        content, where = bundle.manifest.content, str(bundle.path / MANIFEST)
        with reading(where, "model"):
            _check_model(bundle.manifest.model)
        with reading(where, "precision"):
            precision = Precision(bundle.manifest.precision)
            rest = Precision(content["precision"].get("rest", precision.value))
        with reading(where, "preprocessing"):
            preprocessing = _preprocessing(content["preprocessing"])
        with reading(where, "output_options"):
            options = content["output_options"]
            _check_top_k(options["top_k"], bundle.manifest.model["num_classes"])
            outputs = OutputSpec(IODtype(options["io_dtype"]), options["top_k"], bool(options["softmax"]))
        with reading(where, "batch"):
            batch = BatchProfile(**content["batch"])
        with reading(where, "engine"):
            flavour, tf32 = Flavour(bundle.manifest.engine["flavour"]), bool(bundle.manifest.engine.get("tf32", False))
        with reading(where, "validation"):
            tolerances = ToleranceSet.from_dict(content["validation"]["tolerances"], where)
        with reading(where, "quantization"):
            quantization = _quantization(bundle, content.get("quantization"))
        return cls(precision, rest, preprocessing, outputs, batch, flavour, tolerances, tf32, quantization)


def read_record(facts: BundleFacts) -> QuantizationPlan | None:
    """A quantized bundle's record of quantization; None for other precisions."""
    if facts.quantization is None:
        return None
    from spach_deploy.quantization.plan import read_plan

    return read_plan(facts.quantization.record)


def _quantization(bundle: Bundle, section: Mapping[str, Any] | None) -> QuantizationFacts | None:
    if section is None:
        return None
    rewrites = section["rewrites"]
    record = bundle.path / str(section["scales"])
    calibrated = str(section["calibration"]["weights_sha256"])
    disabled, quantize = (tuple(map(str, rewrites[name])) for name in ("disabled", "quantize"))
    return QuantizationFacts(record, calibrated, disabled, quantize)


def _preprocessing(entry: Mapping[str, Any]) -> Preprocessing:
    mean, std = ((float(r), float(g), float(b)) for r, g, b in (entry["mean"], entry["std"]))
    size, resize = int(entry["image_size"]), int(entry["resize_size"])
    return Preprocessing(size, resize, str(entry["interpolation"]), mean, std)

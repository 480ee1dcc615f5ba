"""Step "calibrate": which layers can compute in 8 bits and with which scales, from images or a calibration file."""

from __future__ import annotations

import dataclasses
import fnmatch
import time
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from torch import nn

from spach_deploy.blocks.token_mlp import TokenLinear
from spach_deploy.bundle.inputs import ModelInputs
from spach_deploy.common.errors import UsageError
from spach_deploy.common.progress import Phases
from spach_deploy.data.calibration_set_checks import check_overlap
from spach_deploy.data.images import probe_source
from spach_deploy.data.preprocess import Pixels
from spach_deploy.data.readers import open_images
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.models.hyperparameters import published
from spach_deploy.models.own_module import OwnForward
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.options.quantization import CALIBRATION_SUFFIX
from spach_deploy.options.specs import ExportOptions, Preprocessing, QuantizationSpec
from spach_deploy.quantization.calibration import (
    Calibration,
    CalibrationKey,
    CalibrationSettings,
    CollectedStatistics,
    check_activations,
    collect,
    read_calibration,
    write_calibration,
)
from spach_deploy.quantization.formats import eight_bits
from spach_deploy.quantization.plan import QuantizationPlan, Scaling
from spach_deploy.quantization.quantize import QuantizableSites, candidates, plan_from_statistics
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.shards import collect_on_cluster
from spach_deploy.quantization.sites import LayerKind, Selection
from spach_deploy.quantization.statistics import TensorStatistics

_USUAL_IMAGES = 4


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """The calibration, and notes on it."""

    calibration: Calibration
    notes: tuple[str, ...] = ()

    @property
    def plan(self) -> QuantizationPlan:
        """The quantized layers with their scales, and the reasons for the others."""
        return self.calibration.plan


def scaling_of(options: ExportOptions) -> Scaling:
    """How scales are set for these options, without `per_tensor`, which needs the names of the layers."""
    form = eight_bits(options.precision)
    assert form is not None
    return Scaling(form, Method(options.quantization.method), half=options.rest.is_half)


def calibrate(
    model: ir.Model,
    static: nn.Module,
    loaded: LoadedModel,
    preprocessing: Preprocessing,
    options: ExportOptions,
    phases: Phases,
) -> CalibrationResult:
    """Scales for the FP32 graph `model`, input (B, C, H, W) float32, from the user's images or a calibration file.

    Raises UsageError for a file that does not fit, ImageError for images that are unfit.
    """
    spec = options.quantization
    assert spec.calibration is not None
    scaling = scaling_of(options)
    layers = _layers(static) if isinstance(loaded.model, OwnForward) else None
    chosen = candidates(model, Selection(spec.keep_float, spec.quantize), scaling, layers)
    scaling = dataclasses.replace(scaling, per_tensor=_per_tensor(chosen, spec.per_tensor))
    key = key_of(chosen, loaded, preprocessing, scaling, spec, options.disabled_rewrites)
    if spec.calibration.suffix == CALIBRATION_SUFFIX:
        calibration = read_calibration(spec.calibration, key)
        phases.note(f"Scales from {spec.calibration}, made on {calibration.images} images.")
    else:
        calibration = _from_images(
            model, chosen, scaling, key, preprocessing, spec, phases, overwrite=options.overwrite, takes=loaded.takes
        )
    return CalibrationResult(calibration)


def _layers(static: nn.Module) -> frozenset[str]:
    """Paths of the modules that compute with weights of their own, not with what others make of theirs."""
    kinds = (nn.Linear, nn.Conv2d, TokenLinear)
    return frozenset(
        path
        for path, module in static.named_modules(remove_duplicate=False)
        if isinstance(module, kinds) and "weight" in dict(module.named_parameters(recurse=False))
    )


def key_of(
    chosen: QuantizableSites,
    loaded: LoadedModel,
    preprocessing: Preprocessing,
    scaling: Scaling,
    spec: QuantizationSpec,
    disabled: Sequence[str] = (),
) -> CalibrationKey:
    """Everything that a calibration with these options depends on, except the images."""
    layers = [f"{site.node} {site.module in scaling.per_tensor}" for site in chosen.quantized]
    return CalibrationKey.of(
        [
            *layers,
            f"equalize {spec.equalize}",
            *(f"without {name}" for name in sorted(disabled)),
            *_unusual(loaded),
            *([] if loaded.takes.is_single else [f"inputs {loaded.takes.digest}"]),
        ],
        preprocessing,
        weights_sha256=loaded.weights_sha256,
        model=loaded.name,
        image_size=loaded.image_size,
        format=scaling.form.name,
        method=scaling.method.value,
        half=scaling.half,
    )


def _unusual(loaded: LoadedModel) -> list[str]:
    """Settings that are not the published model's; of an architecture outside the table, all of it."""
    if loaded.name not in ARCHITECTURES:
        return [loaded.architecture.to_toml() if loaded.architecture is not None else "a module of the user's own"]
    usual = published(ARCHITECTURES[loaded.name])
    return [str(setting) for setting in loaded.settings if setting.value != usual[setting.name]]


def _per_tensor(chosen: QuantizableSites, patterns: Sequence[str]) -> frozenset[str]:
    modules = [site.module for site in chosen.quantized if site.kind is not LayerKind.ATTENTION]
    chosen_modules: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(modules, pattern)
        if not matching:
            raise UsageError(
                f"--per-tensor {pattern!r} matches no quantized layer.",
                f"Layers are named like {', '.join(modules[:3])}.",
            )
        chosen_modules.update(matching)
    return frozenset(chosen_modules)


def _from_images(
    model: ir.Model,
    chosen: QuantizableSites,
    scaling: Scaling,
    key: CalibrationKey,
    preprocessing: Preprocessing,
    spec: QuantizationSpec,
    phases: Phases,
    *,
    overwrite: bool,
    takes: ModelInputs,
) -> Calibration:
    assert spec.calibration is not None
    if spec.cache is not None and spec.cache.path.exists() and not overwrite:
        return _reused(spec.cache.path, key, spec.calibration, preprocessing, phases)
    collected = measure(model, chosen, scaling, key, preprocessing, spec, phases, takes)
    start = time.monotonic()
    plan = plan_from_statistics(model, chosen, collected.statistics, scaling, equalize=spec.equalize)
    summary = collected.summary
    calibration = Calibration(
        key=key,
        source=summary.description,
        images=summary.images,
        images_sha256=summary.content_sha256,
        survey=summary.to_dict(),
        plan=plan,
        seconds=collected.seconds + time.monotonic() - start,
        digests=frozenset(digest[:8] for digest in summary.digests),
    )
    if spec.cache is not None:
        write_calibration(calibration, spec.cache)
    return calibration


def measure(
    model: ir.Model,
    chosen: QuantizableSites,
    scaling: Scaling,
    key: CalibrationKey,
    preprocessing: Preprocessing,
    spec: QuantizationSpec,
    phases: Phases,
    takes: ModelInputs,
) -> CollectedStatistics:
    """Activation statistics over the calibration images. Notes name skipped images and doubts about the set."""
    assert spec.calibration is not None
    source = open_images(spec.calibration)
    state = None if spec.cache is None else spec.cache.path.with_name(f"{spec.cache.path.name}.unfinished")
    progress = phases.observer.calibrating
    run = CalibrationSettings(scaling.method.needs_histograms, state, key, on_progress=progress, takes=takes)
    if spec.cluster is not None:
        collected = collect_on_cluster(spec.cluster, model, chosen.wanted, source, preprocessing, run)
    else:
        collected = collect(model, chosen.wanted, source, preprocessing, run)
    if collected.resumed:
        phases.note(f"The calibration went on after {collected.resumed} images that were done already.")
    for skipped in collected.summary.skipped:
        phases.note(f"Skipped {skipped}")
    for warning in collected.summary.warnings():
        phases.note(warning)
    usual = _probe_statistics(model, chosen, preprocessing, takes)
    check_activations(collected.statistics, usual, calibration_set_description(collected))
    return collected


def calibration_set_description(collected: CollectedStatistics) -> str:
    """The calibration set as a noun phrase for messages."""
    return f"the {collected.summary.images} images from {collected.summary.description}"


def _probe_statistics(
    model: ir.Model, chosen: QuantizableSites, preprocessing: Preprocessing, takes: ModelInputs
) -> dict[str, TensorStatistics]:
    """Activation statistics on a few built-in photographs, to compare with."""
    source = probe_source(preprocessing.channels).limit(_USUAL_IMAGES)
    run = CalibrationSettings(histograms=False, takes=takes)
    return collect(model, chosen.wanted, source, preprocessing, run).statistics


_ANOTHER_CACHE = "Delete {}, or give another file for the calibration."


def _reused(
    cache: Path, key: CalibrationKey, images: Path, preprocessing: Preprocessing, phases: Phases
) -> Calibration:
    """The calibration in `cache`. UsageError where it is of other weights, layers, options or images."""
    from spach_deploy.data.images import content_hash
    from spach_deploy.data.readers import batches

    try:
        calibration = read_calibration(cache, key)
    except UsageError as error:
        raise UsageError(error.message, _ANOTHER_CACHE.format(cache)) from None
    digest = content_hash(batch.pixels for batch in batches(open_images(images), preprocessing, 8))
    if digest != calibration.images_sha256:
        raise UsageError(
            f"The calibration cache {cache} was made on other images than {images} holds"
            f" ({calibration.images} images, {calibration.images_sha256[:16]}; now {digest[:16]}).",
            _ANOTHER_CACHE.format(cache),
        )
    phases.note(f"Scales from {cache}: same weights, layers, method and images.")
    return calibration


def refuse_overlap(
    quantized: CalibrationResult,
    pixels: Sequence[Pixels],
    names: Sequence[str],
    options: ExportOptions,
    phases: Phases,
) -> None:
    """UsageError where validation images are in the calibration set; with --allow-overlap only a note."""
    allow = options.quantization.allow_overlap
    notes = check_overlap(
        quantized.calibration.digests,
        pixels,
        names,
        allow=allow,
        what="validation images",
    )
    for note in notes:
        phases.note(note)

"""Step "quantize": calibrate, and choose the layers that keep a requested bound in 8 bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from spach_deploy.bundle import store as bundles
from spach_deploy.common.progress import Phases
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.specs import ExportOptions
from spach_deploy.pipeline.steps.calibration import CalibrationResult, calibrate, refuse_overlap
from spach_deploy.pipeline.steps.graph import Fp32Graph
from spach_deploy.pipeline.steps.images import GoldenImages
from spach_deploy.pipeline.steps.reference import ReferenceOutputs
from spach_deploy.pipeline.steps.sensitivity import HeldOut, choose_layers, draw_sensitivity, labelled_images
from spach_deploy.quantization.paying import REASON, paying
from spach_deploy.quantization.plan import QuantizationPlan, without, write_plan
from spach_deploy.quantization.sensitivity import LayerSelection
from spach_deploy.quantization.sites import Selection, find_sites


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Calibration, choice of layers (where a bound was requested) and plan of an int8 or fp8 export; empty for other
    precisions.
    """

    calibration: CalibrationResult | None = None
    selection: LayerSelection | None = None
    plan: QuantizationPlan | None = None

    def write(self, staging: Path, phases: Phases) -> None:
        """Write quantization.json and, where layers were chosen by a bound, sensitivity.svg."""
        if self.plan is not None:
            write_plan(self.plan, staging / bundles.QUANTIZATION)
        if self.selection is not None and not draw_sensitivity(self.selection, staging / bundles.SENSITIVITY):
            phases.note("The plot of the layers' costs needs matplotlib: pip install 'spach-deploy[report]'.")


def quantize(
    graph: Fp32Graph,
    static: nn.Module,
    loaded: LoadedModel,
    images: GoldenImages,
    reference: ReferenceOutputs,
    options: ExportOptions,
    phases: Phases,
) -> Quantized:
    """The plan with all layers that the rules allow, or with those that keep the requested bound."""
    calibration, selection = calibrated(graph, static, loaded, images, options, phases), None
    if options.quantizes_paying:
        calibration = _paying(calibration, graph, options, phases)
    if options.quantization.is_bounded:
        with phases.phase("choose the layers"):
            held_out = _held_out(loaded, images, reference, options, phases)
            calibration, selection = choose_layers(calibration, static, held_out, options, phases)
    plan = dataclasses.replace(calibration.plan, vnni=options.quantization.vnni)
    return Quantized(calibration, selection, plan)


def _paying(
    calibration: CalibrationResult, graph: Fp32Graph, options: ExportOptions, phases: Phases
) -> CalibrationResult:
    """Only with the layers that pay on TensorRT for RTX, and those of --quantize; all, with a note, where none does."""
    plan, spec = calibration.plan, options.quantization
    found = paying(graph.model, find_sites(graph.model), options.engine.gpus)
    asked = Selection(quantize=spec.quantize).names
    left = frozenset(site.module for site in plan.sites if site.module not in found and not asked(site.module))
    if plan.sites and len(left) == len({site.module for site in plan.sites}):
        phases.note("No layer of this model pays in eight bits on TensorRT for RTX, so all are quantized.")
        return calibration
    changed = dataclasses.replace(calibration.calibration, plan=without(plan, left, REASON))
    return dataclasses.replace(calibration, calibration=changed)


def calibrated(
    graph: Fp32Graph,
    static: nn.Module,
    loaded: LoadedModel,
    images: GoldenImages,
    options: ExportOptions,
    phases: Phases,
) -> CalibrationResult:
    """Calibrate. UsageError where a golden image is in the calibration set, unless --allow-overlap."""
    with phases.phase("calibrate"):
        result = calibrate(graph.model, static, loaded, images.preprocessing, options, phases)
        refuse_overlap(result, [images.pixels], images.names, options, phases)
    return result


def _held_out(
    loaded: LoadedModel, images: GoldenImages, reference: ReferenceOutputs, options: ExportOptions, phases: Phases
) -> HeldOut:
    """Images to judge layers on: labelled ones for --max-drop, else the golden images."""
    if options.quantization.max_drop is not None:
        return labelled_images(loaded, images.preprocessing, options, phases.note)
    return HeldOut(images.inputs, reference.first, output=next(iter(reference.outputs)))

"""Quantize: which layers go into eight bits, with which scales, by calibration and by the bound that was asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spach_deploy.bundle import store as bundles
from spach_deploy.common.progress import Phases
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.specs import ExportOptions
from spach_deploy.pipeline.steps.calibration import CalibrationStep, calibrate, refuse_overlap
from spach_deploy.pipeline.steps.graph import Fp32Graph
from spach_deploy.pipeline.steps.images import GoldenImages
from spach_deploy.pipeline.steps.reference import ReferenceOutputs
from spach_deploy.pipeline.steps.sensitivity import HeldOut, choose_layers, draw_sensitivity, labelled_images
from spach_deploy.quantization.plan import QuantizationPlan, write_plan
from spach_deploy.quantization.sensitivity import LayerSelection
from spach_deploy.rewrites.static_modules import StaticSpach


@dataclasses.dataclass(frozen=True)
class Quantized:
    """How it was calibrated, which layers were chosen where a bound was asked for, and the plan; nothing for other
    precisions.
    """

    calibration: CalibrationStep | None = None
    selection: LayerSelection | None = None
    plan: QuantizationPlan | None = None

    def write(self, staging: Path, phases: Phases) -> None:
        """The plan and the picture of the selection, where there are such."""
        if self.plan is not None:
            write_plan(self.plan, staging / bundles.QUANTIZATION)
        if self.selection is not None and not draw_sensitivity(self.selection, staging / bundles.SENSITIVITY):
            phases.note("The plot of the layers' costs needs matplotlib: pip install 'spach-deploy[report]'.")


def quantize(
    graph: Fp32Graph,
    static: StaticSpach,
    loaded: LoadedModel,
    images: GoldenImages,
    reference: ReferenceOutputs,
    options: ExportOptions,
    phases: Phases,
) -> Quantized:
    """Layers for eight bits: all that the rules choose, or those that keep the bound that was asked for."""
    calibration, selection = calibrated(graph, loaded, images, options, phases), None
    if options.quantization.is_bounded:
        with phases.phase("choose the layers"):
            held_out = _held_out(loaded, images, reference, options, phases)
            calibration, selection = choose_layers(calibration, static, held_out, options, phases)
    plan = dataclasses.replace(calibration.plan, vnni=options.quantization.vnni)
    return Quantized(calibration, selection, plan)


def calibrated(
    graph: Fp32Graph, loaded: LoadedModel, images: GoldenImages, options: ExportOptions, phases: Phases
) -> CalibrationStep:
    """Scales from the calibration images, which the golden ones must not be among."""
    with phases.phase("calibrate"):
        found = calibrate(graph.model, loaded, images.preprocessing, options, phases)
        refuse_overlap(found, [images.pixels], images.names, options, phases)
    return found


def _held_out(
    loaded: LoadedModel, images: GoldenImages, reference: ReferenceOutputs, options: ExportOptions, phases: Phases
) -> HeldOut:
    """Images to judge layers on: labelled ones for --max-drop, else those that the export is judged on."""
    if options.quantization.max_drop is not None:
        return labelled_images(loaded, images.preprocessing, options, phases.note)
    return HeldOut(images.images, reference.logits)

"""What PyTorch alone answers: logits of the reference and the static model, and the tolerances that follow from them.

None of it needs a graph, so it can be computed beside the tracing of the model (`pipeline.scheduler`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spach_deploy.common.errors import UsageError
from spach_deploy.options.specs import ExportOptions, Flavour
from spach_deploy.quantization.fake_quantization import fake_quantized
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.rewrites.static_modules import StaticSpach
from spach_deploy.validation.error_trace import ExpectedActivations
from spach_deploy.validation.rounding_error import ActivationTrace, evaluate, evaluate_fp64
from spach_deploy.validation.tolerance import (
    QUANTIZED_ROUNDING_IMAGES,
    ROUNDING_IMAGES,
    MeasuredError,
    ReferenceLogits,
    ToleranceSet,
    measured_fp32_error,
    prove_equal,
    rounding_limit,
)
from spach_deploy.validation.tolerance import derive_tolerances as derived

if TYPE_CHECKING:
    from torch import nn

EXACT_BATCHES = (1, 2)
"""Batches in which a form of the model is held to the reference."""


@dataclasses.dataclass(frozen=True)
class ReferenceOutputs:
    """Logits (N, classes) of the reference in FP32, their noise against FP64, and how far the static model is from them
    at each batch size.
    """

    logits: NDArray[np.float32]
    noise: MeasuredError
    static_errors: dict[int, float]

    @property
    def reference(self) -> ReferenceLogits:
        """The logits, with what rounding explains."""
        return ReferenceLogits(self.logits, rounding_limit(self.noise.rel_l2))


@dataclasses.dataclass(frozen=True)
class DerivedTolerances:
    """The bounds, and what is expected of the reference's parts, seen on the way."""

    tolerances: ToleranceSet
    parts: ExpectedActivations


def reference_outputs(
    model: nn.Module, static: nn.Module, images: NDArray[np.float32], options: ExportOptions
) -> ReferenceOutputs:
    """Both models on `images` (N, 3, S, S). UsageError for a reference that says nothing, MismatchError where they
    differ.
    """
    logits = reference_logits(model, images)
    outputs = ReferenceOutputs(logits, measured_fp32_error(model, images, logits, options.rest), {})
    errors = prove_equal("static model", lambda x: evaluate(static, x), images, outputs.reference, EXACT_BATCHES)
    return dataclasses.replace(outputs, static_errors=errors)


def reference_logits(model: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits (N, classes) of the reference model in FP32. UsageError for logits that nothing can be compared with."""
    logits = evaluate(model, images)
    if not np.isfinite(logits).all():
        raise UsageError("The reference model answers NaN or infinity in FP32.", "Check the checkpoint's weights.")
    if not logits.any():
        raise UsageError(
            "The reference model answers exactly zero for every image, as a freshly initialised SPACH does, so nothing"
            " could be compared.",
            "Give a trained checkpoint, or none to use demo weights.",
        )
    return logits


def derive_tolerances(
    model: nn.Module,
    static: StaticSpach,
    images: NDArray[np.float32],
    outputs: ReferenceOutputs,
    plan: QuantizationPlan | None,
    options: ExportOptions,
) -> DerivedTolerances:
    """Bounds from FP32's noise and from what PyTorch loses in the asked precision, with the plan's layers in eight
    bits, on `images` (N, 3, S, S). PrecisionError for logits that are not finite in that precision.
    """
    trace = ActivationTrace()
    evaluate(model, images[:1], parts=trace.exact)
    evaluate_fp64(model, images[:1], parts=trace.double)
    tolerances = derived(
        model,
        images,
        outputs.logits,
        options.rest,
        options.outputs,
        tf32=options.engine.tf32 and options.engine.flavour is not Flavour.NONE,
        rounding_images=ROUNDING_IMAGES if plan is None else QUANTIZED_ROUNDING_IMAGES,
        fake_quantized=None if plan is None else fake_quantized(static, plan),
        activations=trace,
        noise=outputs.noise,
    )
    return DerivedTolerances(tolerances, ExpectedActivations.of(trace))

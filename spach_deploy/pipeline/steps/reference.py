"""Steps that run PyTorch only: outputs of the reference and of the static model, and the tolerances.

They need no graph, so a scheduler can run them while the graph is exported (`pipeline.scheduler`).
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
"""Batch sizes at which a rewritten model or graph is compared with the reference."""


@dataclasses.dataclass(frozen=True)
class ReferenceOutputs:
    """Logits (N, classes) of the reference in FP32, their error against FP64, and the static model's relative L2 by
    batch size.
    """

    logits: NDArray[np.float32]
    fp32_error: MeasuredError
    static_errors: dict[int, float]

    @property
    def reference(self) -> ReferenceLogits:
        """The logits, with the largest relative L2 that rounding explains."""
        return ReferenceLogits(self.logits, rounding_limit(self.fp32_error.rel_l2))


@dataclasses.dataclass(frozen=True)
class DerivedTolerances:
    """The tolerances, and the expected activations of the reference's modules, recorded in the same runs."""

    tolerances: ToleranceSet
    parts: ExpectedActivations


def reference_outputs(
    model: nn.Module, static: nn.Module, images: NDArray[np.float32], options: ExportOptions
) -> ReferenceOutputs:
    """Run both models on `images` (N, 3, S, S). UsageError for reference logits that are all zero or not finite,
    MismatchError where the models differ.
    """
    logits = reference_logits(model, images)
    outputs = ReferenceOutputs(logits, measured_fp32_error(model, images, logits, options.rest), {})
    errors = prove_equal("static model", lambda x: evaluate(static, x), images, outputs.reference, EXACT_BATCHES)
    return dataclasses.replace(outputs, static_errors=errors)


def reference_logits(model: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits (N, classes) of the reference in FP32. UsageError for logits that are all zero, or not finite."""
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
    static: nn.Module,
    images: NDArray[np.float32],
    outputs: ReferenceOutputs,
    plan: QuantizationPlan | None,
    options: ExportOptions,
) -> DerivedTolerances:
    """Tolerances from the FP32 error and from PyTorch's rounding error in the requested precision, with the layers of
    `plan` in 8 bits, on `images` (N, 3, S, S). PrecisionError for logits that are not finite in that precision.
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
        noise=outputs.fp32_error,
    )
    return DerivedTolerances(tolerances, ExpectedActivations.of(trace))

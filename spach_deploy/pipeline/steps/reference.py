"""Steps that run PyTorch only: outputs of the reference and of the static model, and the tolerances.

They need no graph, so a scheduler can run them while the graph is exported (`pipeline.scheduler`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spach_deploy.bundle.inputs import Batch
from spach_deploy.bundle.outputs import graph_outputs
from spach_deploy.common.errors import UsageError
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.models.own_module import OwnForward
from spach_deploy.options.specs import ExportOptions, Flavour
from spach_deploy.quantization.fake_quantization import fake_quantized
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.validation.error_trace import ExpectedActivations
from spach_deploy.validation.rounding_error import ActivationTrace, Outputs, evaluate_outputs
from spach_deploy.validation.tolerance import (
    QUANTIZED_ROUNDING_IMAGES,
    ROUNDING_IMAGES,
    Fp32Reference,
    MeasuredError,
    ToleranceSet,
    measured_fp32_errors,
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
    """What the reference computes in FP32, (N, ...) by name, its error against FP64, the relative L2 of the static
    model's first output by batch size, and the outputs of the reference's parts.
    """

    outputs: dict[str, NDArray[np.float32]]
    fp32_errors: dict[str, MeasuredError]
    static_errors: dict[int, float]
    activations: ExpectedActivations

    @property
    def reference(self) -> Fp32Reference:
        """The outputs, with the largest relative L2 of each that rounding explains."""
        limits = {name: rounding_limit(error.rel_l2) for name, error in self.fp32_errors.items()}
        return Fp32Reference(self.outputs, limits)

    @property
    def first(self) -> NDArray[np.float32]:
        """The first output: of a classifier its logits (N, classes)."""
        return next(iter(self.outputs.values()))


@dataclasses.dataclass(frozen=True)
class DerivedTolerances:
    """The tolerances, and the rounding error of each of the reference's parts, recorded in the same runs."""

    tolerances: ToleranceSet
    rounding_errors: Mapping[str, float]


def reference_outputs(
    model: SelectableOutputs, static: nn.Module, images: Batch, options: ExportOptions
) -> ReferenceOutputs:
    """Run both models on `images` (N, 3, S, S), or on inputs with these. UsageError for reference outputs that are all
    zero or not finite, MismatchError where the models differ.
    """
    trace = ActivationTrace()
    found = checked_outputs(model, images, trace.exact)
    noise = measured_fp32_errors(model, images, found, options.rest, trace.double)
    outputs = ReferenceOutputs(found, noise, {}, ExpectedActivations.of(trace))
    errors = prove_equal(
        "static model", lambda x: evaluate_outputs(static, x), images, outputs.reference, EXACT_BATCHES
    )
    return dataclasses.replace(outputs, static_errors=errors)


def checked_outputs(model: nn.Module, images: Batch, parts: Outputs | None = None) -> dict[str, NDArray[np.float32]]:
    """Outputs (N, ...) of the reference in FP32 by name. UsageError for one that is all zero, or not finite.

    `parts`: receives the outputs of the model's parts for the first image.
    """
    outputs = evaluate_outputs(model, images, parts=parts)
    for name, values in outputs.items():
        where = "" if len(outputs) == 1 else f" in {name}"
        if not np.isfinite(values).all():
            raise UsageError(
                f"The reference model answers NaN or infinity in FP32{where}.", "Check the checkpoint's weights."
            )
        if not values.any():
            raise _all_zero(model, where)
    return outputs


def _all_zero(model: nn.Module, where: str) -> UsageError:
    if isinstance(model, OwnForward):
        return UsageError(
            f"Your module answers exactly zero for every image{where}, so nothing could be compared.",
            "Load trained weights into it; a layer that is initialised with zeros hides what is before it.",
        )
    return UsageError(
        f"The reference model answers exactly zero for every image{where}, as a freshly initialised SPACH does, so"
        " nothing could be compared.",
        "Give a trained checkpoint, or none to use demo weights.",
    )


def derive_tolerances(
    model: SelectableOutputs,
    static: nn.Module,
    images: Batch,
    outputs: ReferenceOutputs,
    plan: QuantizationPlan | None,
    options: ExportOptions,
) -> DerivedTolerances:
    """Tolerances from the FP32 error and from PyTorch's rounding error in the requested precision, with the layers of
    `plan` in 8 bits, on `images` (N, 3, S, S). PrecisionError for outputs that are not finite in that precision.
    """
    trace = ActivationTrace(outputs.activations.exact)
    tolerances = derived(
        model,
        images,
        outputs.outputs,
        options.rest,
        graph_outputs(model.outputs, options.outputs),
        tf32=options.engine.tf32 and options.engine.flavour is not Flavour.NONE,
        rounding_images=ROUNDING_IMAGES if plan is None else QUANTIZED_ROUNDING_IMAGES,
        fake_quantized=None if plan is None else fake_quantized(static, plan),
        activations=trace,
        noise=outputs.fp32_errors,
    )
    return DerivedTolerances(tolerances, ExpectedActivations.of(trace).rounding_errors)

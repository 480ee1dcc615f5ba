"""What PyTorch alone answers: logits of the reference and the static model, and the tolerances that follow from them.

None of it needs a graph, so it is computed in a copy of this process, beside the tracing of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spach_deploy.common.errors import SpachError, UsageError
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.specs import ExportOptions, Flavour
from spach_deploy.pipeline.steps.graph import EXACT_BATCHES, Photographs
from spach_deploy.runtime.beside import Beside
from spach_deploy.validation.activations import ActivationTrace
from spach_deploy.validation.error_trace import ExpectedActivations
from spach_deploy.validation.exact import ReferenceLogits, prove_equal, rounding_limit
from spach_deploy.validation.rounding_error import evaluate
from spach_deploy.validation.tolerance import (
    QUANTIZED_ROUNDING_IMAGES,
    ROUNDING_IMAGES,
    MeasuredError,
    ToleranceSet,
    derive_tolerances,
    measured_fp32_error,
)

if TYPE_CHECKING:
    from torch import nn


@dataclasses.dataclass(frozen=True)
class DerivedTolerances:
    """The bounds, and what is expected of the reference's parts, seen on the way."""

    tolerances: ToleranceSet
    parts: ExpectedActivations


@dataclasses.dataclass(frozen=True)
class ReferenceOutputs:
    """Logits (N, classes) of the reference in FP32, their noise against FP64, and how far the static model is from them
    at each batch size.

    `derived`: the tolerances, or why there are none; None where they have to wait for a plan of eight bits.
    """

    logits: NDArray[np.float32]
    noise: MeasuredError
    static_errors: dict[int, float]
    derived: DerivedTolerances | SpachError | None = None

    @property
    def reference(self) -> ReferenceLogits:
        """The logits, with what rounding explains."""
        return ReferenceLogits(self.logits, rounding_limit(self.noise.rel_l2))

    def bounds(self) -> DerivedTolerances:
        """The tolerances. Raises the SpachError for which there are none: measured ranges tell more, and go first."""
        if isinstance(self.derived, SpachError):
            raise self.derived
        assert self.derived is not None
        return self.derived


def answering(
    loaded: LoadedModel, static: nn.Module, photographs: Photographs, options: ExportOptions
) -> Beside[ReferenceOutputs]:
    """Both models on the images. UsageError for a reference that says nothing, MismatchError where they differ."""

    def work() -> ReferenceOutputs:
        depth = ActivationTrace()
        logits = reference_logits(loaded, photographs, depth)
        noise = measured_fp32_error(loaded.model, photographs.images, logits, options.rest, depth.double)
        answers = ReferenceOutputs(logits, noise, {})
        errors = prove_equal(
            *("static model", lambda images: evaluate(static, images), photographs.images),
            *(answers.reference, EXACT_BATCHES),
        )
        answers = dataclasses.replace(answers, static_errors=errors)
        return (
            answers if options.precision.is_quantized else with_tolerances(answers, loaded, photographs, options, depth)
        )

    return Beside(work)


def deriving(
    loaded: LoadedModel,
    photographs: Photographs,
    answers: ReferenceOutputs,
    options: ExportOptions,
    twin: Callable[[], nn.Module],
) -> Beside[ReferenceOutputs]:
    """The answers with a quantized export's tolerances.

    `twin` makes the reference with its quantized layers rounded as planned.
    """

    def work() -> ReferenceOutputs:
        depth = ActivationTrace()
        evaluate(loaded.model, photographs.images[:1], parts=depth.exact)
        return with_tolerances(answers, loaded, photographs, options, depth, twin())

    return Beside(work)


def reference_logits(
    loaded: LoadedModel, photographs: Photographs, depth: ActivationTrace | None = None
) -> NDArray[np.float32]:
    """Logits (N, classes) of the reference model in FP32; `depth` takes what its parts answer to the first image."""
    images = photographs.images
    parts = [evaluate(loaded.model, images[:1], parts=None if depth is None else depth.exact)]
    if len(images) > 1:
        parts.append(evaluate(loaded.model, images[1:]))
    logits = np.concatenate(parts)
    if not np.isfinite(logits).all():
        raise UsageError("The reference model answers NaN or infinity in FP32.", "Check the checkpoint's weights.")
    if not logits.any():
        raise UsageError(
            "The reference model answers exactly zero for every image, as a freshly initialised SPACH does, so nothing"
            " could be compared.",
            "Give a trained checkpoint, or none to use demo weights.",
        )
    return logits


def with_tolerances(
    answers: ReferenceOutputs,
    loaded: LoadedModel,
    photographs: Photographs,
    options: ExportOptions,
    depth: ActivationTrace,
    twin: nn.Module | None = None,
) -> ReferenceOutputs:
    """Bounds from FP32's noise and from what PyTorch loses in the asked precision on these images.

    `depth` holds the reference's parts in FP32 already, and takes the others.
    """
    derived: DerivedTolerances | SpachError
    try:
        tolerances = derive_tolerances(
            loaded.model,
            photographs.images,
            answers.logits,
            options.rest,
            options.outputs,
            tf32=options.engine.tf32 and options.engine.flavour is not Flavour.NONE,
            loss_images=ROUNDING_IMAGES if twin is None else QUANTIZED_ROUNDING_IMAGES,
            twin=twin,
            depth=depth,
            noise=answers.noise if depth.double else None,
        )
        derived = DerivedTolerances(tolerances, ExpectedActivations.of(depth))
    except SpachError as error:
        derived = error
    return dataclasses.replace(answers, derived=derived)

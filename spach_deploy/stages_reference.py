"""What PyTorch alone answers: logits of the reference and the static model, and the tolerances that follow from them.

None of it needs a graph, so it is computed in a copy of this process, beside the tracing of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spach_deploy.errors import SpachError, UsageError
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.runtime.beside import Beside
from spach_deploy.specs import ExportOptions, Flavour
from spach_deploy.stages import EXACT_BATCHES, Photographs
from spach_deploy.validation.depth import Depth
from spach_deploy.validation.exact import ReferenceLogits, prove_equal, rounding_limit
from spach_deploy.validation.precision_loss import evaluate
from spach_deploy.validation.tolerance import (
    LOSS_IMAGES,
    QUANTIZED_LOSS_IMAGES,
    Measured,
    ToleranceSet,
    derive_tolerances,
    measured_noise,
)
from spach_deploy.validation.trace import Expected

if TYPE_CHECKING:
    from torch import nn


@dataclasses.dataclass(frozen=True)
class Derived:
    """The bounds, and what is expected of the reference's parts, seen on the way."""

    tolerances: ToleranceSet
    parts: Expected


@dataclasses.dataclass(frozen=True)
class Answers:
    """Logits (N, classes) of the reference in FP32, their noise against FP64, and how far the static model is from them
    at each batch size.

    `derived`: the tolerances, or why there are none; None where they have to wait for a plan of eight bits.
    """

    logits: NDArray[np.float32]
    noise: Measured
    static_errors: dict[int, float]
    derived: Derived | SpachError | None = None

    @property
    def reference(self) -> ReferenceLogits:
        """The logits, with what rounding explains."""
        return ReferenceLogits(self.logits, rounding_limit(self.noise.rel_l2))

    def bounds(self) -> Derived:
        """The tolerances. Raises the SpachError for which there are none: measured ranges tell more, and go first."""
        if isinstance(self.derived, SpachError):
            raise self.derived
        assert self.derived is not None
        return self.derived


def answering(
    loaded: LoadedModel, static: nn.Module, photographs: Photographs, options: ExportOptions
) -> Beside[Answers]:
    """Both models on the images. UsageError for a reference that says nothing, MismatchError where they differ."""

    def work() -> Answers:
        depth = Depth()
        logits = reference_logits(loaded, photographs, depth)
        noise = measured_noise(loaded.model, photographs.images, logits, options.rest, depth.double)
        answers = Answers(logits, noise, {})
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
    answers: Answers,
    options: ExportOptions,
    twin: Callable[[], nn.Module],
) -> Beside[Answers]:
    """The answers with a quantized export's tolerances.

    `twin` makes the reference with its quantized layers rounded as planned.
    """

    def work() -> Answers:
        depth = Depth()
        evaluate(loaded.model, photographs.images[:1], parts=depth.exact)
        return with_tolerances(answers, loaded, photographs, options, depth, twin())

    return Beside(work)


def reference_logits(loaded: LoadedModel, photographs: Photographs, depth: Depth | None = None) -> NDArray[np.float32]:
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
    answers: Answers,
    loaded: LoadedModel,
    photographs: Photographs,
    options: ExportOptions,
    depth: Depth,
    twin: nn.Module | None = None,
) -> Answers:
    """Bounds from FP32's noise and from what PyTorch loses in the asked precision on these images.

    `depth` holds the reference's parts in FP32 already, and takes the others.
    """
    derived: Derived | SpachError
    try:
        tolerances = derive_tolerances(
            loaded.model,
            photographs.images,
            answers.logits,
            options.rest,
            options.outputs,
            tf32=options.engine.tf32 and options.engine.flavour is not Flavour.NONE,
            loss_images=LOSS_IMAGES if twin is None else QUANTIZED_LOSS_IMAGES,
            twin=twin,
            depth=depth,
            noise=answers.noise if depth.double else None,
        )
        derived = Derived(tolerances, Expected.of(depth))
    except SpachError as error:
        derived = error
    return dataclasses.replace(answers, derived=derived)

"""The stage that derives tolerances: it needs the reference alone, so it runs beside the tracing of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.runtime.beside import Beside
from spach_deploy.specs import ExportOptions, Flavour
from spach_deploy.stages import Photographs
from spach_deploy.validation.depth import Depth
from spach_deploy.validation.precision_loss import evaluate
from spach_deploy.validation.tolerance import LOSS_IMAGES, QUANTIZED_LOSS_IMAGES, ToleranceSet, derive_tolerances

if TYPE_CHECKING:
    from torch import nn


@dataclasses.dataclass(frozen=True)
class Derived:
    """The bounds, and what the parts of the reference answered to the first image on the way."""

    tolerances: ToleranceSet
    depth: Depth


def deriving(
    loaded: LoadedModel,
    photographs: Photographs,
    reference: NDArray[np.float32],
    options: ExportOptions,
    twin: Callable[[], nn.Module] | None = None,
) -> Beside[Derived]:
    """Bounds from FP32's noise and from what PyTorch loses in the asked precision on these images.

    `twin` makes the reference with its quantized layers rounded as planned, for quantized exports.
    """

    def work() -> Derived:
        depth = Depth()
        evaluate(loaded.model, photographs.images[:1], parts=depth.exact)
        tolerances = derive_tolerances(
            loaded.model,
            photographs.images,
            reference,
            options.rest,
            options.outputs,
            tf32=options.engine.tf32 and options.engine.flavour is not Flavour.NONE,
            loss_images=LOSS_IMAGES if twin is None else QUANTIZED_LOSS_IMAGES,
            twin=None if twin is None else twin(),
            depth=depth,
        )
        return Derived(tolerances, depth)

    return Beside(work)

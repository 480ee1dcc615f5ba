"""Two FP32 evaluations of one function: equal but for the order of summation.

Every step from the reference model to the FP32 graph is held to this; only precision may cost more. How much that order
costs depends on the model and grows with the image, so it is measured: the reference in FP32 against itself in FP64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from spach_deploy.common.errors import MismatchError
from spach_deploy.common.metrics import relative_l2
from spach_deploy.validation.tolerance import FP32_FACTOR

_LEAST_NOISE = 2.0**-23
"""No FP32 answer is nearer than a rounding of it."""

Logits = NDArray[np.float32]


def rounding_limit(noise: float) -> float:
    """The relative L2 that rounding explains, where FP32's own `noise` (relative L2 against FP64) was measured."""
    return FP32_FACTOR * max(noise, _LEAST_NOISE)


@dataclasses.dataclass(frozen=True)
class ReferenceLogits:
    """The reference's `logits` (N, classes) in FP32, and the relative L2 from them that rounding explains."""

    logits: Logits = dataclasses.field(repr=False)
    limit: float

    def of(self, chosen: slice | list[int]) -> ReferenceLogits:
        """Those of some of the images."""
        return ReferenceLogits(self.logits[chosen], self.limit)


def prove_equal(
    what: str,
    run: Callable[[NDArray[np.float32]], Logits],
    images: NDArray[np.float32],
    reference: ReferenceLogits,
    batches: Sequence[int],
) -> dict[int, float]:
    """Relative L2 of `run` per batch size, each batch of other images; MismatchError when one is more than rounding.

    `images` float32 (N, 3, S, S) and what the reference answers to them; `run` gives logits of a batch.
    """
    errors: dict[int, float] = {}
    start = 0
    for batch in batches:
        chosen = [index % len(images) for index in range(start, start + batch)]
        start += batch
        errors[batch] = check_equal(what, run(np.ascontiguousarray(images[chosen])), reference.of(chosen))
    return errors


def check_equal(what: str, logits: Logits, reference: ReferenceLogits) -> float:
    """Relative L2 of `logits`; MismatchError when it is more than rounding, or not a number."""
    expected = reference.logits.astype(np.float64)
    error = relative_l2(logits, expected)
    if not error <= reference.limit:
        raise MismatchError(
            f"The {what} differs from the reference model at batch {len(expected)}: relative L2 {error:.1e}, at most"
            f" {reference.limit:.1e} is rounding ({FP32_FACTOR:g} x FP32's noise against FP64).",
            "Turn rewrites off one by one with --no-rewrite NAME to find the one to blame, and report it.",
        )
    return error

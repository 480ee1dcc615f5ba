"""Two FP32 evaluations of one function: equal but for the order of summation.

Every step from the reference model to the FP32 graph is held to this; only precision may cost more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from spach_deploy.errors import MismatchError

FP32_LIMIT = 1e-5
"""Relative L2. Rounding alone gives some 5e-7 here."""

Logits = NDArray[np.float32]


def prove_equal(
    what: str,
    run: Callable[[NDArray[np.float32]], Logits],
    images: NDArray[np.float32],
    reference: Logits,
    batches: Sequence[int],
) -> dict[int, float]:
    """Relative L2 of `run` per batch size, each batch of other images; MismatchError when one is more than rounding.

    `images` float32 (N, 3, S, S) and their logits `reference` (N, classes); `run` gives logits of a batch.
    """
    errors: dict[int, float] = {}
    start = 0
    for batch in batches:
        chosen = [index % len(images) for index in range(start, start + batch)]
        start += batch
        errors[batch] = check_equal(what, run(np.ascontiguousarray(images[chosen])), reference[chosen])
    return errors


def check_equal(what: str, logits: Logits, reference: Logits) -> float:
    """Relative L2 of `logits`; MismatchError when it is more than rounding, or not a number."""
    expected = reference.astype(np.float64)
    error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
    if not error <= FP32_LIMIT:
        raise MismatchError(
            f"The {what} differs from the reference model at batch {len(expected)}: relative L2 {error:.1e}, at most"
            f" {FP32_LIMIT:.0e} is rounding.",
            "Turn rewrites off one by one with --no-rewrite NAME to find the one to blame, and report it.",
        )
    return error

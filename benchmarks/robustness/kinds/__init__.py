"""Every kind of bad input, and how many of a thousand cases are of it."""

from __future__ import annotations

from benchmarks.robustness.case import Kind
from benchmarks.robustness.kinds import (
    calibrations,
    checkpoints,
    golden,
    graphs,
    images,
    labels,
    manifests,
    options,
    pickles,
    plans,
    recipes,
    repositories,
)

KINDS: tuple[Kind, ...] = (
    *checkpoints.KINDS,
    *pickles.KINDS,
    *graphs.KINDS,
    *plans.KINDS,
    *manifests.KINDS,
    *golden.KINDS,
    *images.KINDS,
    *calibrations.KINDS,
    *recipes.KINDS,
    *options.KINDS,
    *labels.KINDS,
    *repositories.KINDS,
)

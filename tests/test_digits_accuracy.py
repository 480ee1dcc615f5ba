"""Eight bits and half keep the accuracy of trained models, clean and made hard: one mixing type, all five folds.

The bounds are those of benchmarks/digits_accuracy.py, which runs every type and writes RESULTS.md.
"""

from __future__ import annotations

import pytest

from benchmarks.digits_accuracy import CASES, Case, measure, misses
from spach_deploy.specs import Precision
from tests import digits

pytest.importorskip("sklearn")

BOUNDED = [case for case in CASES if case.precision is not Precision.FP8 and case.bounds != type(case.bounds)()]


HARDEST = ("int8", "LayerNorm x300")
"""Where a naive conversion fails most; the others, which cost as much time, are slow."""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if (case.precision.value, case.name) == HARDEST else pytest.mark.slow)
        for case in BOUNDED
    ],
    ids=lambda case: f"{case.precision.value}-{case.name}".replace(" ", "-"),
)
def test_trained_attention_keeps_its_accuracy(case: Case) -> None:
    results = measure("trans", case, ("naive", "ours"), digits.FOLDS)
    assert [*misses(case, "naive", results), *misses(case, "ours", results)] == []

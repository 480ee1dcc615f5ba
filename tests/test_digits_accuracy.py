"""Eight bits and half keep the accuracy of trained models, clean and made hard.

The bounds are those of benchmarks/digits_accuracy.py, which runs every type and writes RESULTS.md.
"""

from __future__ import annotations

import pytest

from benchmarks.digits_accuracy import CASES, Case, measure, misses
from spach_deploy.options.specs import Precision
from tests import digits

pytest.importorskip("sklearn")

BOUNDED = [case for case in CASES if case.precision is not Precision.FP8 and case.bounds != type(case.bounds)()]

HARDEST = next(case for case in BOUNDED if (case.precision.value, case.name) == ("int8", "LayerNorm x300"))
"""Where a naive conversion fails most."""


def test_a_trained_model_keeps_its_accuracy_where_a_naive_conversion_loses_it() -> None:
    """Of the model that tests/test_digits.py trains too, on the pictures of one fold."""
    results = measure("hybrid", HARDEST, ("naive", "ours"), folds=1)
    assert [*misses(HARDEST, "naive", results), *misses(HARDEST, "ours", results)] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", BOUNDED, ids=lambda case: f"{case.precision.value}-{case.name}".replace(" ", "-"))
def test_trained_attention_keeps_its_accuracy_on_all_pictures(case: Case) -> None:
    results = measure("trans", case, ("naive", "ours"), digits.FOLDS)
    assert [*misses(case, "naive", results), *misses(case, "ours", results)] == []

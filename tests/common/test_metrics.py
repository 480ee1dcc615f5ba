"""Relative L2, the error that everything is judged by."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spach_deploy.common.metrics import best_indices, relative_l2, relative_l2_by_image, worst_relative_l2

EXACT = np.array([[3.0, 4.0, *[0.0] * 6], [6.0, 8.0, *[0.0] * 6]], np.float32)


def test_it_is_the_norm_of_the_difference_over_that_of_the_reference() -> None:
    value = EXACT.copy()
    value[0, 1] += 0.5
    assert relative_l2(value, EXACT) == pytest.approx(0.5 / math.sqrt(125))
    assert relative_l2_by_image(value, EXACT).tolist() == [pytest.approx(0.1), 0.0]
    assert worst_relative_l2(value, EXACT) == pytest.approx(0.1)


def test_the_error_of_few_numbers_is_relative_to_what_they_usually_are() -> None:
    """An angle of 0.001 among angles of 1 is close to zero by chance."""
    angles = np.array([[1.0], [0.001], [-1.0]], np.float32)
    found = relative_l2_by_image(angles + np.float32(0.01), angles)
    assert found == pytest.approx([0.01, 0.01 / math.sqrt(2 / 3), 0.01], rel=1e-3)


def test_sums_are_in_float64() -> None:
    large = np.full((1, 1000), 1e30, np.float32)  # its square is beyond float32
    assert relative_l2(large * np.float32(1.5), large) == pytest.approx(0.5)
    half = np.full((1, 4), 300.0, np.float16)  # its square is beyond float16
    assert relative_l2(half + np.float16(1), half) == pytest.approx(1 / 300, rel=1e-3)


def test_zeros_and_what_is_not_finite() -> None:
    zeros, wrong = np.zeros((1, 8)), EXACT[:1].copy()
    assert relative_l2(zeros, zeros) == 0
    assert relative_l2(EXACT[:1], zeros) == math.inf
    for value in (math.nan, math.inf):
        wrong[0, 0] = value
        assert not relative_l2(wrong, EXACT[:1]) < math.inf


@pytest.mark.parametrize("classes", [3, 5000, 20_000])
def test_the_best_are_the_start_of_a_stable_sort(classes: int) -> None:
    random = np.random.default_rng(0)
    ties = random.integers(0, 50, (6, classes)).astype(np.float32)
    undefined = ties.copy()
    undefined[2, 1] = np.nan
    for scores in (ties, random.normal(size=(6, classes)), -np.ones((2, classes)), undefined):
        wanted = np.argsort(-scores, axis=1, kind="stable")[:, :3]
        assert np.array_equal(best_indices(scores, 3), wanted)

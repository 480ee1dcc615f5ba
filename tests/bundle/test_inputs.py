"""Inputs as data: pictures go to images, and rows of the example to what is no image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spach_deploy.bundle.inputs import Inputs, ModelInputs, feeds_of, image_of, joined, rows_of
from spach_deploy.bundle.schema import TensorInfo

ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)
PIXELS = np.random.default_rng(0).random((4, 3, 5, 6), np.float32)
TAKES = ModelInputs(("left", "vector", "right"), ("left", "right"), {"vector": ROWS}, (3, 5, 6))


def test_a_single_input_is_an_array() -> None:
    assert ModelInputs().of(PIXELS) is PIXELS
    assert list(feeds_of(PIXELS)) == ["input"]


def test_picture_i_gets_row_i_and_after_the_last_row_the_first() -> None:
    batch = TAKES.of(PIXELS, start=1)
    assert isinstance(batch, Inputs)
    assert np.array_equal(batch.arrays["vector"], ROWS[[1, 2, 0, 1]])
    assert np.array_equal(image_of(batch), PIXELS)
    assert list(feeds_of(batch)) == ["left", "vector", "right"]


def test_a_second_image_is_the_picture_mirrored_in_every_layout() -> None:
    pixels = (PIXELS.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    floats, levels = TAKES.of(PIXELS), TAKES.of(pixels)
    assert isinstance(floats, Inputs)
    assert isinstance(levels, Inputs)
    assert np.array_equal(floats.arrays["right"], PIXELS[..., ::-1])
    assert np.array_equal(levels.arrays["right"], pixels[:, :, ::-1])


def test_halves_are_halves_in_every_input() -> None:
    batch = TAKES.of(PIXELS.astype(np.float16))
    assert {str(array.dtype) for array in feeds_of(batch).values()} == {"float16"}


def test_rows_of_a_batch_are_chosen_and_joined_together() -> None:
    batch = TAKES.of(PIXELS)
    chosen = joined([batch[0:1], batch[[3, 1]]])
    assert isinstance(chosen, Inputs)
    assert np.array_equal(chosen.arrays["vector"], ROWS[[0, 0, 1]])
    assert np.array_equal(image_of(chosen), PIXELS[[0, 3, 1]])


@pytest.mark.parametrize(
    ("example", "kind"),
    [
        (np.array([[1, 5, 7, 0]]), "rotated"),
        (np.array([[True, True, False]]), "rotated"),
        (np.array([[0.5, 0.25]], np.float32), "rotated"),
        (np.zeros((1, 4), np.float32), "random"),
        (np.full((2, 4), 3, np.float32), "random"),
        (np.zeros((1, 4), np.int64), "same"),
    ],
)
def test_rows_that_differ_are_made_of_one_row(example: np.ndarray[Any, Any], kind: str) -> None:
    rows = rows_of(example)
    assert (rows.dtype, rows.shape) == (example.dtype, (8, *example.shape[1:]))
    if kind == "rotated":
        assert set(rows.flat) == set(example.flat)
        assert not np.array_equal(rows[0], rows[1])
    if kind == "random":
        low, high = (0, 1) if not example.any() else (1.5, 3)
        assert len(np.unique(rows)) == rows.size
        assert low <= rows.min() < rows.max() <= high
    if kind == "same":
        assert np.array_equal(rows, np.zeros_like(rows))


def test_rows_that_were_given_are_taken_as_they_are() -> None:
    assert rows_of(ROWS) is ROWS


def test_a_bundles_inputs_are_its_golden_packs() -> None:
    batch = TAKES.of(PIXELS.astype(np.float16))
    tensors = [
        TensorInfo(name="left", dtype="float16", shape=(None, 3, 5, 6), layout="NCHW"),
        TensorInfo(name="vector", dtype="float16", shape=(None, 2)),
        TensorInfo(name="right", dtype="float16", shape=(None, 3, 5, 6), layout="NCHW"),
    ]
    found = ModelInputs.of_batch(batch, tensors)
    assert (found.names, found.images, found.shape) == (TAKES.names, TAKES.images, TAKES.shape)
    assert np.array_equal(found.rows["vector"], ROWS[[0, 1, 2, 0]])
    assert found.digest != TAKES.digest != ModelInputs().digest == ""

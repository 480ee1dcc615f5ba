from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spach_deploy.common.errors import MismatchError
from spach_deploy.runtime import TensorSpec
from spach_deploy.runtime.batching import Arrays, BatchLimits, check_feeds, run_in_batches

SPECS = {"x": TensorSpec("float32", (None, 3))}


def test_pieces_fit_the_limits_and_outputs_are_those_of_the_samples() -> None:
    sizes = []

    def double(feeds: Arrays) -> Arrays:
        sizes.append(len(feeds["x"]))
        return {"y": 2 * feeds["x"]}

    x = np.arange(33, dtype=np.float32).reshape(11, 3)
    outputs = run_in_batches(double, {"x": x}, BatchLimits(2, 5))
    assert sizes == [5, 5, 2]  # the last sample alone is filled up to the smallest batch
    np.testing.assert_array_equal(outputs["y"], 2 * x)


def test_limits_of_a_fixed_and_a_symbolic_batch() -> None:
    assert BatchLimits.of_shape(None, 32) == BatchLimits(1, 32)
    assert BatchLimits.of_shape(8, 32) == BatchLimits(8, 8)


@pytest.mark.parametrize(
    ("feeds", "says"),
    [
        ({}, "takes inputs"),
        ({"z": np.zeros((1, 3), np.float32)}, "takes inputs"),
        ({"x": np.zeros((1, 3), np.float16)}, "float16"),
        ({"x": np.zeros((1, 4), np.float32)}, r"x as float32 \(batch, 3\), not float32 \(1, 4\)"),
        ({"x": np.zeros(3, np.float32)}, "x as float32"),
        ({"x": np.zeros((0, 3), np.float32)}, "batch size of at least 1"),
    ],
)
def test_feeds_that_are_not_the_inputs_are_refused(feeds: dict[str, Any], says: str) -> None:
    check_feeds("It", SPECS, {"x": np.zeros((7, 3), np.float32)})
    with pytest.raises(MismatchError, match=says):
        check_feeds("It", SPECS, feeds)


def test_inputs_of_different_batch_sizes_are_refused() -> None:
    specs = {**SPECS, "z": SPECS["x"]}
    with pytest.raises(MismatchError, match="one batch size"):
        check_feeds("It", specs, {"x": np.zeros((1, 3), np.float32), "z": np.zeros((2, 3), np.float32)})

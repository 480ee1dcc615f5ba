"""ONNX Runtimes that truncate FP16 where INT8 is made of it: how the one here is asked, and what is known of others."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from spach_deploy.common.versions import ROUNDS_FP16
from spach_deploy.graph.runtimes import runtimes, version_numbers
from spach_deploy.runtime.onnxruntime_runner import NUMBERS, Quantize, truncates, truncating_runtime


def stored(rounding: np.ufunc) -> Quantize:
    def quantize(numbers: NDArray[np.float16]) -> NDArray[np.int8]:
        integers: NDArray[np.int8] = rounding(numbers.astype(np.float32)).astype(np.int8)
        return integers

    return quantize


def halves_up(numbers: NDArray[np.float16]) -> NDArray[np.int8]:
    integers: NDArray[np.int8] = np.floor(numbers.astype(np.float32) + 0.5).astype(np.int8)
    return integers


def test_nine_numbers_tell_rounding_to_even_from_every_other() -> None:
    assert len(NUMBERS) == 9
    assert not truncates(stored(np.rint))
    for other in (stored(np.trunc), stored(np.floor), stored(np.ceil), halves_up):
        assert truncates(other)


def test_the_onnx_runtime_here_does_what_the_table_says_of_it() -> None:
    version = onnxruntime.__version__
    assert truncating_runtime() == (version if runtimes().truncates_fp16(version) else None)


@pytest.mark.parametrize("version", [runtime.version for runtime in runtimes().onnxruntimes])
def test_the_table_knows_each_version_from_having_asked_it(version: str) -> None:
    known = runtimes().onnxruntime(version)
    assert known is not None
    assert "quantized" in known.seen
    assert runtimes().truncates_fp16(version) == (version_numbers(version) < version_numbers(ROUNDS_FP16))

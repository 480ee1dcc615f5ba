"""Rounding to 16 bits is what the hardware does."""

from __future__ import annotations

import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from spach_deploy.graph.precision.formats import BF16, FP16, HalfFormat, decode, half_format
from spach_deploy.options.specs import Precision

FORMATS = [(FP16, torch.float16), (BF16, torch.bfloat16)]


def every_kind_of_number() -> NDArray[np.float32]:
    """Random bit patterns (all exponents, NaN), exact halves between neighbours, limits, zeros."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    ties = (np.arange(0x3F800000, 0x3F900000, 0x800, dtype=np.uint32)).view(np.float32)
    edges = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, -65520, 2.0**-24, 2.0**-25, 2.0**-25 * 1.01,
         3.3895314e38, 3.4e38, 6.1e-5, 1e-40], np.float32
    )  # fmt: skip
    return np.concatenate([bits, ties, edges])


@pytest.mark.parametrize(("form", "dtype"), FORMATS, ids=["fp16", "bf16"])
@pytest.mark.parametrize("is_loaded", [False, True], ids=["numpy", "torch"])
def test_rounds_as_torch_does(
    form: HalfFormat, dtype: torch.dtype, is_loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = every_kind_of_number()
    expected = torch.from_numpy(values).to(dtype).float().numpy()
    if not is_loaded:
        monkeypatch.delitem(sys.modules, "torch")
    np.testing.assert_array_equal(form.round(values), expected)


def test_what_nobody_may_write_is_rounded_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    values = np.frombuffer(np.array([1.0, 0.1], np.float32).tobytes(), np.float32)
    assert FP16.encode(values).tolist() == FP16.encode(values.copy()).tolist() == [0x3C00, 0x2E66]
    assert not recwarn.list


@pytest.mark.parametrize(("form", "dtype"), FORMATS, ids=["fp16", "bf16"])
def test_limits_are_the_formats(form: HalfFormat, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    assert (form.limit, form.smallest_normal, form.roundoff) == (info.max, info.tiny, info.eps / 2)


@pytest.mark.parametrize("form", [FP16, BF16], ids=["fp16", "bf16"])
def test_tensors_are_stored_and_read_back(form: HalfFormat) -> None:
    values = np.array([[1.0, -2.5], [1e-6, 3e4]], np.float32)
    tensor = form.tensor("weight", form.encode(values))
    np.testing.assert_array_equal(decode(tensor), form.round(values))
    np.testing.assert_array_equal(numpy_helper.to_array(ir.to_proto(tensor)).astype(np.float32), form.round(values))


def test_each_precision_has_its_format() -> None:
    assert [half_format(precision) for precision in Precision] == [None, FP16, BF16, None, None]

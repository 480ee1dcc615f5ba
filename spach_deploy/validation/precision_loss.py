"""What PyTorch itself loses when a model's numbers are stored in another format.

The model is evaluated in FP32 with its input, every weight and every module's output rounded to the format. Sums inside
a module stay FP32, which is what a GPU's tensor cores do: they multiply 16-bit numbers and accumulate in FP32. So this
is the loss that no engine of that precision can avoid, and it costs about as much as one FP32 evaluation.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from spach_deploy.specs import Precision
from spach_deploy.validation.depth import Outputs, kept

if TYPE_CHECKING:
    from torch import Tensor, nn

Float32Array = npt.NDArray[np.float32]
Rounding = Callable[["Tensor"], "Tensor"]

_FP16_LIMIT = 65_504.0
_TF32_DROPPED_BITS = 13  # of FP32's 23: TF32 keeps 10


class Arithmetic(str, enum.Enum):
    """Format in which tensors are stored or, for TF32, enter a matrix product."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def is_lossy(self) -> bool:
        """Whether it stores less than FP32."""
        return self is not Arithmetic.FP32

    @classmethod
    def of(cls, precision: Precision, *, tf32: bool = False) -> Arithmetic:
        """That of an engine of `precision`; TF32 only concerns FP32 engines on a GPU."""
        return cls.TF32 if tf32 and precision is Precision.FP32 else cls(precision.value)


def evaluate(
    model: nn.Module,
    images: Float32Array,
    arithmetic: Arithmetic = Arithmetic.FP32,
    parts: Outputs | None = None,
) -> Float32Array:
    """Answer of `model` (float32, evaluation mode) to `images` (N, 3, S, S), as `arithmetic` stores its tensors.

    What its parts answer to the first image is put into `parts`.
    """
    import torch

    if arithmetic is Arithmetic.FP32:
        with torch.inference_mode(), kept(model, parts):
            exact: Float32Array = model(torch.from_numpy(images)).numpy()
        return exact
    rounding = _ROUNDINGS[arithmetic]
    with torch.inference_mode():
        rounded = converted(model, rounding)
        for module in rounded.modules():
            module.register_forward_hook(lambda _module, _inputs, output: rounding(output))
        with kept(rounded, parts):
            answer: Float32Array = rounded(rounding(torch.from_numpy(images))).numpy()
    return answer


def evaluate_fp64(model: nn.Module, images: Float32Array, parts: Outputs | None = None) -> npt.NDArray[np.float64]:
    """The same with every weight and every operation in FP64; `model` itself stays as it is."""
    import torch

    with torch.inference_mode():
        exact = converted(model, lambda tensor: tensor.double())
        with kept(exact, parts):
            answer: npt.NDArray[np.float64] = exact(torch.from_numpy(images).double()).numpy()
    return answer


def converted(model: nn.Module, convert: Rounding) -> nn.Module:
    """A copy of `model` with each floating tensor converted; modules and tensors that are shared stay shared."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    return copy.deepcopy(model, {id(tensor): convert(tensor) for tensor in tensors})


def _to_fp16(tensor: Tensor) -> Tensor:
    """Rounded to FP16; what FP16 cannot hold stays, since the precision policy keeps such tensors in FP32."""
    rounded = tensor.half().float()
    return rounded if bool(rounded.abs().amax() <= _FP16_LIMIT) else tensor.where(rounded.isinf(), rounded)


def _to_bf16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


def _to_tf32(tensor: Tensor) -> Tensor:
    """Round the significand to TF32's 10 bits, ties to even."""
    import torch

    bits = tensor.contiguous().view(torch.int32)
    half = (1 << (_TF32_DROPPED_BITS - 1)) - 1
    nearest = bits + half + ((bits >> _TF32_DROPPED_BITS) & 1)
    return (nearest & ~((1 << _TF32_DROPPED_BITS) - 1)).view(torch.float32)


def rounding_of(arithmetic: Arithmetic) -> Rounding:
    """What rounds a float32 tensor to `arithmetic`; for FP32 it stays as it is."""
    return _ROUNDINGS.get(arithmetic, lambda tensor: tensor)


_ROUNDINGS: dict[Arithmetic, Rounding] = {
    Arithmetic.FP16: _to_fp16,
    Arithmetic.BF16: _to_bf16,
    Arithmetic.TF32: _to_tf32,
}

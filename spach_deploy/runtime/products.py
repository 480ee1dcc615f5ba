"""Products that PyTorch computes slowly on a CPU, computed another way: the same sums, in another order.

Linear layers in FP32 go to oneDNN where there is AVX-512: PyTorch gives them to MKL, which takes AVX2 on processors of
other makers than Intel. oneDNN, which PyTorch has too and compiled models use, takes what there is.

Depthwise convolutions in FP64 are nine multiply-adds of shifted images: PyTorch has a kernel for FP32 alone, and in
FP64 makes a matrix product of every channel.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_Linear = Callable[["Tensor", "Tensor", "Tensor | None"], "Tensor"]


def fast_products() -> contextlib.AbstractContextManager[Any]:
    """What `torch.nn.functional.linear` and `conv2d` compute is computed fast within the block."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    product = _onednn()

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if kwargs:
                return func(*args, **kwargs)
            if func is functional.linear and product is not None and len(args) == 3 and args[0].dtype is torch.float32:
                return product(*args)
            if func is functional.conv2d and _is_depthwise_fp64(*args):
                return depthwise(*args[:3])
            return func(*args)

    return Products()


def _is_depthwise_fp64(x: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any) -> bool:
    import torch

    plain = ((1, 1), (1, 1), (1, 1), x.shape[1])  # stride, padding, dilation, groups
    return x.dtype is torch.float64 and settings == plain and weight.shape == (x.shape[1], 1, 3, 3)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise 3x3 convolution, padded by one: (B, C, H, W) and (C, 1, 3, 3) -> (B, C, H, W)."""
    import torch
    from torch.nn.functional import pad

    _, channels, height, width = x.shape
    padded = pad(x.contiguous(), (1, 1, 1, 1))
    result = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for row in range(3):
        for column in range(3):
            tap = weight[:, 0, row, column].reshape(channels, 1, 1)
            result.addcmul_(padded[:, :, row : row + height, column : column + width], tap)
    return result if bias is None else result.add_(bias.reshape(channels, 1, 1))


@functools.cache
def _onednn() -> _Linear | None:
    """oneDNN's product; None where this PyTorch has none, or none that is faster."""
    import torch

    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is None or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    with contextlib.suppress(Exception):  # it is PyTorch's own affair, and may become another
        x, weight, bias = torch.eye(3), torch.ones(2, 3), torch.zeros(2)
        linear: _Linear = functools.partial(_linear, operator)
        if linear(x, weight, bias).tolist() == [[1.0, 1.0]] * 3:
            return linear
    return None


def _linear(operator: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return operator(x, weight, bias, "none", [], "")

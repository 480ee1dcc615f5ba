"""Linear layers in FP32 by oneDNN, where PyTorch would leave half of the processor unused.

PyTorch gives them to MKL, which takes AVX2 on processors of other makers than Intel, even where there is AVX-512;
oneDNN, which PyTorch has too and compiled models use, takes what there is. Both sum in FP32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_Linear = Callable[["Tensor", "Tensor", "Tensor | None"], "Tensor"]


@contextlib.contextmanager
def products_by_onednn() -> Iterator[None]:
    """`torch.nn.functional.linear` of float32 tensors by oneDNN within the block, where that is faster."""
    product = _onednn()
    with contextlib.nullcontext() if product is None else _products_by(product):
        yield


def _products_by(product: _Linear) -> contextlib.AbstractContextManager[Any]:
    import torch
    from torch.nn.functional import linear
    from torch.overrides import TorchFunctionMode

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is linear and not kwargs and len(args) == 3 and args[0].dtype is torch.float32:
                return product(*args)
            return func(*args, **(kwargs or {}))

    return Products()


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

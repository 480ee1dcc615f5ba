"""What every part of a network answers, kept while the whole is evaluated.

A part is the stem, a norm, a block, a downsampling or the head.

What PyTorch itself loses when a model's numbers are stored in another format.

The model is evaluated in FP32 with its input, every weight and every module's output rounded to the format. Sums inside
a module stay FP32, which is what a GPU's tensor cores do: they multiply 16-bit numbers and accumulate in FP32. So this
is the loss that no engine of that precision can avoid, and it costs about as much as one FP32 evaluation.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from spach_deploy.options.specs import Precision

if TYPE_CHECKING:
    from torch import Tensor, nn


Outputs = dict[str, npt.NDArray[np.floating]]
"""By the part's name, in the order in which they are computed."""


@dataclasses.dataclass(frozen=True)
class ActivationTrace:
    """Outputs for one image: in FP32, in FP64, and with every module's output rounded (empty where nothing is rounded).

    The latter two are filled by `tolerance.derive_tolerances`, which evaluates both anyway.
    """

    exact: Outputs = dataclasses.field(default_factory=dict)
    double: Outputs = dataclasses.field(default_factory=dict)
    rounded: Outputs = dataclasses.field(default_factory=dict)


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's children, stages taken apart into blocks."""
    from torch import nn

    for name, part in model.named_children():
        if isinstance(part, nn.Sequential):
            yield from ((f"{name}.{index}", layer) for index, layer in part.named_children())
        else:
            yield name, part


@contextlib.contextmanager
def recording_activations(model: nn.Module, outputs: Outputs | None) -> Iterator[None]:
    """What the parts of `model` answer to the first image within the block, put into `outputs`, if any."""

    def keeper(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            assert outputs is not None
            outputs[path] = output[:1].numpy().copy()

        return hook

    wanted = () if outputs is None else parts_of(model)
    with contextlib.ExitStack() as hooks:
        for path, part in wanted:
            hooks.enter_context(part.register_forward_hook(keeper(path)))
        yield


Float32Array = npt.NDArray[np.float32]
Rounding = Callable[["Tensor"], "Tensor"]
Tensors = Mapping[str, "Tensor | None"]

_FP16_LIMIT = 65_504.0
_TF32_DROPPED_BITS = 13  # of FP32's 23: TF32 keeps 10


class StorageFormat(str, enum.Enum):
    """Format in which tensors are stored or, for TF32, enter a matrix product."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"

    @classmethod
    def of(cls, precision: Precision, *, tf32: bool = False) -> StorageFormat:
        """That of an engine of `precision`; TF32 only concerns FP32 engines on a GPU."""
        return cls.TF32 if tf32 and precision is Precision.FP32 else cls(precision.value)


def evaluate(
    model: nn.Module,
    images: Float32Array,
    arithmetic: StorageFormat = StorageFormat.FP32,
    parts: Outputs | None = None,
) -> Float32Array:
    """Answer of `model` (float32, evaluation mode) to `images` (N, 3, S, S), as `arithmetic` stores its tensors.

    What its parts answer to the first image is put into `parts`.
    """
    import torch

    if arithmetic is StorageFormat.FP32:
        with torch.inference_mode(), recording_activations(model, parts):
            exact: Float32Array = model(torch.from_numpy(images)).numpy()
        return exact
    rounding = _ROUNDINGS[arithmetic]
    with (
        torch.inference_mode(),
        converting(model, rounding),
        rounding_outputs(model, rounding),
        recording_activations(model, parts),
    ):
        answer: Float32Array = model(rounding(torch.from_numpy(images))).numpy()
    return answer


def evaluate_fp64(model: nn.Module, images: Float32Array, parts: Outputs | None = None) -> npt.NDArray[np.float64]:
    """The same with every weight and every operation in FP64; `model` itself stays as it is."""
    import torch

    with (
        torch.inference_mode(),
        converting(model, lambda tensor: tensor.double()),
        recording_activations(model, parts),
    ):
        answer: npt.NDArray[np.float64] = model(torch.from_numpy(images).double()).numpy()
    return answer


@contextlib.contextmanager
def converting(model: nn.Module, convert: Rounding) -> Iterator[None]:
    """While a module of `model` computes, its own floating tensors are converted; then they are as they were.

    So the weights of one layer are there twice, not those of all.
    """
    before: dict[nn.Module, tuple[Tensors, Tensors]] = {}

    def enter(module: nn.Module, _inputs: object) -> None:
        before[module] = own = module._parameters, module._buffers
        module._parameters, module._buffers = (_converted(tensors, convert) for tensors in own)  # type: ignore[assignment]

    def leave(module: nn.Module, _inputs: object = None, _output: object = None) -> None:
        module._parameters, module._buffers = before.pop(module)  # type: ignore[assignment]

    try:
        with contextlib.ExitStack() as hooks:
            for module in model.modules():
                hooks.enter_context(module.register_forward_pre_hook(enter))
                hooks.enter_context(module.register_forward_hook(leave))
            yield
    finally:
        for module in list(before):  # where a module raised
            leave(module)


def _converted(tensors: Tensors, convert: Rounding) -> Tensors:
    return {
        name: convert(tensor) if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


@contextlib.contextmanager
def rounding_outputs(model: nn.Module, rounding: Rounding) -> Iterator[None]:
    """Every module's output is rounded."""
    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_hook(lambda _module, _inputs, output: rounding(output)))
        yield


def converted(module: nn.Module, convert: Rounding) -> nn.Module:
    """A copy of `module` with each floating tensor converted; modules and tensors that are shared stay shared."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    return copy.deepcopy(module, {id(tensor): convert(tensor) for tensor in tensors})


def _to_fp16(tensor: Tensor) -> Tensor:
    """Rounded to FP16; what FP16 cannot hold stays, since the precision policy keeps such tensors in FP32."""
    rounded = tensor.half().float()
    lowest, highest = rounded.aminmax()
    fits = bool(lowest >= -_FP16_LIMIT) and bool(highest <= _FP16_LIMIT)
    return rounded if fits else tensor.where(rounded.isinf(), rounded)


def _to_bf16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


def _to_tf32(tensor: Tensor) -> Tensor:
    """Round the significand to TF32's 10 bits, ties to even."""
    import torch

    bits = tensor.contiguous().view(torch.int32)
    half = (1 << (_TF32_DROPPED_BITS - 1)) - 1
    nearest = bits + half + ((bits >> _TF32_DROPPED_BITS) & 1)
    return (nearest & ~((1 << _TF32_DROPPED_BITS) - 1)).view(torch.float32)


def rounding_of(arithmetic: StorageFormat) -> Rounding:
    """What rounds a float32 tensor to `arithmetic`; for FP32 it stays as it is."""
    return _ROUNDINGS.get(arithmetic, lambda tensor: tensor)


_ROUNDINGS: dict[StorageFormat, Rounding] = {
    StorageFormat.FP16: _to_fp16,
    StorageFormat.BF16: _to_bf16,
    StorageFormat.TF32: _to_tf32,
}

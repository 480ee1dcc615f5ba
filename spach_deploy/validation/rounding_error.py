"""Evaluate a model with its tensors rounded to another format: the rounding error of a precision, in PyTorch itself.

The model runs in FP32 with its input, every weight and every module's output rounded to the format. Sums inside a
module stay in FP32, as on a GPU's tensor cores, which multiply 16-bit numbers and accumulate in FP32. So no engine of
that precision can avoid this error. It costs about as much time as one FP32 evaluation.

`recording_activations` keeps the output of every part of the model (stem, norm, block, downsampling or head) during an
evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.inputs import Batch, arrays_of
from spach_deploy.options.specs import Precision

if TYPE_CHECKING:
    from torch import Tensor, nn


Outputs = dict[str, npt.NDArray[np.floating]]
"""Outputs by the part's name, in the order of computation."""


@dataclasses.dataclass(frozen=True)
class ActivationTrace:
    """Outputs of all parts for one image: in FP32, in FP64, and with rounded tensors (empty where nothing is rounded).

    `tolerance.derive_tolerances` fills the latter two, because it runs both anyway.
    """

    exact: Outputs = dataclasses.field(default_factory=dict)
    double: Outputs = dataclasses.field(default_factory=dict)
    rounded: Outputs = dataclasses.field(default_factory=dict)


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's children, with network stages split into blocks."""
    from torch import nn

    for name, part in model.named_children():
        if isinstance(part, nn.Sequential | nn.ModuleList):
            yield from ((f"{name}.{index}", layer) for index, layer in part.named_children())
        else:
            yield name, part


@contextlib.contextmanager
def recording_activations(model: nn.Module, outputs: Outputs | None) -> Iterator[None]:
    """Within the block, put the outputs of the model's parts for the first image into `outputs`, if given."""

    import torch

    def keeper(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            assert outputs is not None
            if isinstance(output, torch.Tensor):  # a user's part may give several
                kept = output[:1]
                outputs[path] = (kept.float() if kept.dtype == torch.bfloat16 else kept).numpy().copy()

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
    """The format in which tensors are stored or, for TF32, enter a matrix product."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"

    @classmethod
    def of(cls, precision: Precision, *, tf32: bool = False) -> StorageFormat:
        """The format of an engine of this precision. `tf32` concerns FP32 engines on a GPU only."""
        return cls.TF32 if tf32 and precision is Precision.FP32 else cls(precision.value)


def _tensors(images: Batch, convert: Rounding = lambda tensor: tensor) -> tuple[Tensor, ...]:
    """A batch as the arguments of a model, with its floats converted."""
    import torch

    tensors = map(torch.from_numpy, arrays_of(images))
    return tuple(convert(tensor) if tensor.is_floating_point() else tensor for tensor in tensors)


def evaluate_outputs(
    model: nn.Module,
    images: Batch,
    arithmetic: StorageFormat = StorageFormat.FP32,
    parts: Outputs | None = None,
) -> dict[str, Float32Array]:
    """Outputs by name of `model` (float32, evaluation mode) for `images` (N, 3, S, S), or inputs with these, with
    tensors rounded to `arithmetic`.

    `parts`: receives the outputs of the model's parts for the first image.
    """
    import torch

    if arithmetic is StorageFormat.FP32:
        with torch.inference_mode(), recording_activations(model, parts):
            return named_outputs(model, model(*_tensors(images)))
    rounding = _ROUNDINGS[arithmetic]
    with (
        torch.inference_mode(),
        converting(model, rounding),
        rounding_outputs(model, rounding),
        recording_activations(model, parts),
    ):
        return named_outputs(model, model(*_tensors(images, rounding)))


def evaluate(
    model: nn.Module,
    images: Batch,
    arithmetic: StorageFormat = StorageFormat.FP32,
    parts: Outputs | None = None,
) -> Float32Array:
    """The first of `evaluate_outputs`: logits, of a classifier."""
    return next(iter(evaluate_outputs(model, images, arithmetic, parts).values()))


def evaluate_outputs_fp64(
    model: nn.Module, images: Batch, parts: Outputs | None = None
) -> dict[str, npt.NDArray[np.float64]]:
    """Outputs with all weights and operations in FP64; `model` itself is left unchanged."""
    import torch

    from spach_deploy.models.own_module import OwnForward

    if isinstance(model, OwnForward):
        return _outputs_of_a_copy(model, images, parts)
    with (
        torch.inference_mode(),
        converting(model, lambda tensor: tensor.double()),
        recording_activations(model, parts),
    ):
        return named_outputs(model, model(*_tensors(images, lambda tensor: tensor.double())))


def _outputs_of_a_copy(model: nn.Module, images: Batch, parts: Outputs | None) -> dict[str, npt.NDArray[np.float64]]:
    """Of a user's own module, which may read tensors of modules that it does not call, and make tensors by itself."""
    import torch

    usual = torch.get_default_dtype()
    double = converted(model, lambda tensor: tensor.double())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), recording_activations(double, parts):
            return named_outputs(double, double(*_tensors(images, lambda tensor: tensor.double())))
    finally:
        torch.set_default_dtype(usual)


def evaluate_fp64(model: nn.Module, images: Batch, parts: Outputs | None = None) -> npt.NDArray[np.float64]:
    """The first of `evaluate_outputs_fp64`."""
    return next(iter(evaluate_outputs_fp64(model, images, parts).values()))


def named_outputs(model: nn.Module, made: Any) -> dict[str, Any]:
    """What `model` returned, a tensor, several or a dictionary of them, as arrays by name: the names of its `outputs`
    (`models.outputs`) where it has any, else those of a user's own module.
    """
    from spach_deploy.models.own_module import flattened, output_names

    names = [tensor.name for tensor in getattr(model, "outputs", ())] or output_names(made)
    return {name: tensor.numpy() for name, tensor in zip(names, flattened(made), strict=True)}


@contextlib.contextmanager
def converting(model: nn.Module, convert: Rounding) -> Iterator[None]:
    """Within the block, a module's floating tensors are converted while the module computes, and restored afterwards.

    So only one layer's weights are in memory twice.
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
    """Within the block, every module's output is rounded."""
    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_hook(lambda _module, _inputs, output: _each(rounding, output)))
        yield


def _each(convert: Rounding, made: Any) -> Any:
    """A module's output, a tensor, several or a dictionary of them, with every tensor of floats converted."""
    if isinstance(made, Mapping):
        return {name: _each(convert, value) for name, value in made.items()}
    if isinstance(made, (tuple, list)):
        return tuple(_each(convert, value) for value in made)
    return convert(made) if hasattr(made, "is_floating_point") and made.is_floating_point() else made


def converted(module: nn.Module, convert: Rounding) -> nn.Module:
    """A copy of `module` with every floating tensor converted; shared modules and tensors stay shared."""
    from spach_deploy.models.deep_copy import deep_copied

    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    return deep_copied(module, {id(tensor): convert(tensor) for tensor in tensors})


def _to_fp16(tensor: Tensor) -> Tensor:
    """Round to FP16. Numbers beyond FP16's range stay, because the precision policy keeps such tensors in FP32."""
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
    """The function that rounds a float32 tensor to `arithmetic`; the identity for FP32."""
    return _ROUNDINGS.get(arithmetic, lambda tensor: tensor)


_ROUNDINGS: dict[StorageFormat, Rounding] = {
    StorageFormat.FP16: _to_fp16,
    StorageFormat.BF16: _to_bf16,
    StorageFormat.TF32: _to_tf32,
}

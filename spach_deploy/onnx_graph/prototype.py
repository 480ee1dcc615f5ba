"""The part of a model whose graph has to be traced: one block of each kind.

The exporter's time grows with the number of blocks, and blocks of one shape differ in nothing but their weights. Which
kinds there are follows from the architecture, so the prototype can be had, and traced, before the model is rewritten.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from spach_deploy.models.layers import MixingBlock
from spach_deploy.models.spach import Spach
from spach_deploy.rewrites import restructure
from spach_deploy.rewrites.base import own
from spach_deploy.rewrites.static_modules import StaticBlock, StaticSpach

_PLAIN = (bool, int, float, str, tuple, list, type(None))


@dataclasses.dataclass(frozen=True)
class Prototype:
    """A model with one block of each kind, and for each the blocks it stands for (itself first)."""

    model: StaticSpach
    repeats: dict[str, tuple[str, ...]]


def make_prototype(model: StaticSpach) -> Prototype:
    """Keep the first of every run of blocks that differ in weights alone; it shares the model's tensors."""
    result = StaticSpach(model.stem, model.norm1, model.norm2, model.head)
    repeats: dict[str, tuple[str, ...]] = {}
    for stage in model.stage_names:
        runs = _runs(getattr(model, stage), block_kind)
        layers = getattr(model, stage)._modules
        result.add_stage(stage, nn.Sequential(OrderedDict((indices[0], layers[indices[0]]) for indices in runs)))
        for first, *others in runs:
            if isinstance(layers[first], StaticBlock):
                repeats[f"{stage}.{first}"] = tuple(f"{stage}.{index}" for index in (first, *others))
    return Prototype(result.eval(), repeats)


def prototype_of(model: Spach, disabled: Collection[str] = (), quantized: Collection[str] | None = None) -> Prototype:
    """The prototype that rewriting the whole model leads to (`rewrites.rewrite`), from the first of its blocks alone.

    It stands for no others. Where patterns in `quantized` tell blocks of one kind apart, it is another one, as
    `structure` shows.
    """
    few = own(model)
    for stage in model.stage_names:
        layers = getattr(model, stage)._modules
        firsts = [indices[0] for indices in _runs(getattr(model, stage), _reference_kind)]
        setattr(few, stage, nn.Sequential(OrderedDict((index, layers[index]) for index in firsts)))
    return make_prototype(restructure(few, disabled, quantized))


def without_weights(prototype: Prototype) -> Prototype:
    """The prototype, its blocks' tensors without values: they are most of it, and its graph does not depend on them."""
    return _with_tensors(prototype, lambda tensor: tensor.to("meta"))


def with_ordinary_weights(prototype: Prototype) -> Prototype:
    """The prototype, its blocks' tensors with values of which nothing special is true.

    Real weights may be zeros, ones or equal to each other, and optimizers act on that: what is true of one block's
    weights would be stamped on all.
    """
    generator = torch.Generator().manual_seed(0)
    return _with_tensors(prototype, lambda tensor: torch.rand(tensor.shape, generator=generator) + 0.5)


def _with_tensors(prototype: Prototype, change: Callable[[Tensor], Tensor]) -> Prototype:
    model = own(prototype.model)
    for path in prototype.repeats:
        for module in model.get_submodule(path).modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(change(parameter.detach()), requires_grad=False)
    return dataclasses.replace(prototype, model=model)


def structure(prototype: Prototype) -> str:
    """What the prototype's graph depends on: modules, their settings, names and shapes of their tensors."""
    return "\n".join(
        f"{path} {type(module).__qualname__} {_settings(module)} {_shapes(module)}"
        for path, module in prototype.model.named_modules(remove_duplicate=False)
    )


def block_kind(layer: nn.Module) -> str:
    """What a static block's graph depends on beside its weights; "" for a layer that is no block."""
    if not isinstance(layer, StaticBlock):
        return ""
    mixer = "conv" if layer.spatial_func is None else type(layer.spatial_func).__name__
    scale = getattr(layer.spatial_func, "scale", 1.0)
    parts = (mixer, layer.gamma_1 is None, scale, layer.cpe_net.includes_residual, layer.cpe_net.grid_stream)
    return "/".join(str(part) for part in parts)


def _reference_kind(layer: nn.Module) -> str:
    """The same for a layer of the reference model."""
    return type(getattr(layer, "spatial_func", None)).__name__ if isinstance(layer, MixingBlock) else ""


def _runs(stage: nn.Sequential, kind_of: Callable[[nn.Module], str]) -> list[list[str]]:
    """Indices of layers in a row that are blocks of one kind; a layer that is no block stands alone."""
    runs: list[list[str]] = []
    previous = ""
    for index, layer in stage._modules.items():
        assert layer is not None
        kind = kind_of(layer)
        if kind and kind == previous:
            runs[-1].append(index)
        else:
            runs.append([index])
        previous = kind
    return runs


def _settings(module: nn.Module) -> dict[str, object]:
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and isinstance(value, _PLAIN)
    }


def _shapes(module: nn.Module) -> dict[str, object]:
    tensors = {**module._parameters, **module._buffers}
    return {name: None if tensor is None else (tensor.dtype, *tensor.shape) for name, tensor in tensors.items()}

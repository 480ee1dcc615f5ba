"""Places of a model: where the reference's intermediate tensors are taken, and which module makes each.

A place is the output of a leaf module (a convolution, a linear layer, a norm, an activation), of an attention's core,
of LayerScale, of a block's two sums, or of the mean over tokens. A packed qkv is one place and three: graphs may make
query, key and value each by itself, and `only_made` leaves those that a graph has. Values are (B, N, C): tokens by
channels, whatever layout a module works in, so that they can be found in graphs of any layout.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spach_deploy.graph.passes.tokens_first import PARTS
from spach_deploy.models.spach import Attention, MixingBlock, Spach, SpatialMLP
from spach_deploy.rewrites.static_modules import StaticAttention, StaticBlock, StaticSpach, TokenLinear

Float32Array = NDArray[np.float32]
Model = Spach | StaticSpach
Rounding = Callable[[Tensor], Tensor]

CORE, SCALE, MIDDLE, MEAN = "/core", "/gamma_1", "/middle", "mean"
"""Ends of the names of places that are no leaf module's output; a block's own path names its second sum."""

QKV_PARTS = tuple(f"/{part}" for part in PARTS)
"""Ends of the names of query, key and value, as places of their own."""

_LEAVES = (nn.Conv2d, nn.Linear, TokenLinear, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.GELU, nn.ReLU, nn.SiLU)


class ProbeKind(enum.Enum):
    """What is computed at a place."""

    LEAF = "module"
    CORE = "attention between qkv and proj"
    SCALE = "LayerScale"
    SUM = "residual sum"
    MEAN = "mean over tokens"


@dataclasses.dataclass(frozen=True)
class ProbePoint:
    """One place. `module`: the PyTorch path to blame; `parents`: the places that it is computed from."""

    name: str
    module: str
    kind: ProbeKind
    parents: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ChannelLayout:
    """Between a module's layout and (B, N, C). `channels`: "last", "first" of (B, C, H, W), "transposed" (B, C, N)."""

    batch: int
    channels: str = "last"

    def of(self, tensor: Tensor) -> Tensor:
        """As (B, N, C)."""
        if self.channels == "first":
            tensor = tensor.permute(0, 2, 3, 1)
        elif self.channels == "transposed":
            tensor = tensor.transpose(1, 2)
        return tensor.reshape(self.batch, -1, tensor.shape[-1])

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        """(B, N, C) in the layout and shape of `like`."""
        if self.channels != "last":
            rows = rows.transpose(1, 2)
        return rows.reshape(like.shape)


@dataclasses.dataclass(frozen=True)
class Computation:
    """How a place's value came about: a module (None for sums), its inputs in the layout they had, and the rest."""

    module: nn.Module | None
    inputs: tuple[Tensor, ...]
    apply: Callable[[nn.Module | None, tuple[Tensor, ...], Rounding], Tensor]
    rows: ChannelLayout


@dataclasses.dataclass(frozen=True)
class ProbeRecord:
    """A model's value at a place: float32 (B, N, C), and how to compute it again."""

    place: ProbePoint
    value: Float32Array
    computation: Computation


SAME = 1e-4
"""Relative L2 up to which two forms of the model have one value at a place: rounding, inherited from all before it."""


def record(model: Model, images: Float32Array, like: Mapping[str, ProbeRecord] | None = None) -> dict[str, ProbeRecord]:
    """Run `model` on `images` (B, 3, S, S); its values at every place, in the order in which they are computed.

    `like`: another form of the same model. Where it has the same value but for rounding, its value is taken and goes
    on through `model`, so that no rounding of earlier places stands between the two.
    """
    recorder = _Recorder(model, len(images), like or {})
    with torch.inference_mode():
        recorder.watch()
        try:
            model(torch.from_numpy(images))
        finally:
            recorder.leave()
        return recorder.recorded


class _Recorder:
    """Hooks on all leaves and blocks of a model; a shared leaf is known by the block that it is called from."""

    def __init__(self, model: Model, batch: int, like: Mapping[str, ProbeRecord]) -> None:
        self.recorded: dict[str, ProbeRecord] = {}
        self._like = like
        self._model = model
        self._batch = batch
        self._block: tuple[str, MixingBlock | StaticBlock] | None = None
        self._calls: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
        self._stream = ""
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch(self) -> None:
        paths: dict[nn.Module, list[str]] = {}
        for path, module in self._model.named_modules(remove_duplicate=False):
            paths.setdefault(module, []).append(path)
        for module, names in paths.items():
            if isinstance(module, (MixingBlock, StaticBlock)):
                self._handles.append(module.register_forward_pre_hook(self._enters(names[0])))
                self._handles.append(module.register_forward_hook(self._left))
            elif isinstance(module, _LEAVES):
                self._handles.append(module.register_forward_hook(self._called(names)))

    def leave(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enters(self, path: str) -> Callable[..., None]:
        def hook(block: MixingBlock | StaticBlock, _inputs: object) -> None:
            self._block, self._calls = (path, block), {}

        return hook

    def _called(self, paths: list[str]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if self._block is not None:
                inside = self._block[0] + "."
                path = next(path for path in paths if path.startswith(inside))
                transposed = isinstance(self._block[1].spatial_func, SpatialMLP) if ".spatial_func." in path else False
                output = self._settled(path, output, self._rows_of(module, transposed=transposed))
                self._calls[path.removeprefix(inside)] = (module, inputs[0], output)
                return output
            if paths[0] == "head":
                self._mean(inputs[0])
            folded = self._stream if isinstance(module, nn.BatchNorm2d) else paths[0]
            output = self._settled(paths[0] if paths[0] in self._like else folded, output, self._rows_of(module))
            self._add_leaf(paths[0], (self._stream,), module, inputs[0], output, transposed=False)
            self._stream = paths[0]
            return output

        return hook

    def _settled(self, name: str, output: Tensor, rows: ChannelLayout) -> Tensor:
        """The other form's value where it is the same, in this one's layout."""
        other = self._like.get(name)
        if other is None:
            return output
        value, theirs = rows.of(output), torch.from_numpy(other.value)
        if value.shape != theirs.shape or not (value - theirs).norm() <= SAME * theirs.norm():
            return output
        return rows.back(theirs, output)

    def _mean(self, pooled: Tensor) -> None:
        tokens = torch.from_numpy(self.recorded[self._stream].value)
        place = ProbePoint(MEAN, "", ProbeKind.MEAN, (self._stream,))
        self._add(place, pooled, Computation(None, (tokens,), _mean, ChannelLayout(self._batch)))
        self._stream = MEAN

    def _left(self, block: MixingBlock | StaticBlock, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Places of a whole block, from the calls of its leaves."""
        assert self._block is not None
        path = self._block[0]
        self._block = None
        x, x_rows = self._stream, ChannelLayout(self._batch).of(inputs[0])
        branches = [self._leaf_of(path, "cpe_net.net.1", x)]
        if "norm1" in self._calls:
            branches.append(self._spatial(path, block, x))
        includes = isinstance(block, StaticBlock) and block.cpe_net.includes_residual
        parts = () if includes else (x_rows,)
        middle = branches[0]
        if not includes or len(branches) > 1:
            middle = path + MIDDLE
            values = (*parts, *(torch.from_numpy(self.recorded[name].value) for name in branches))
            self._add_sum(ProbePoint(middle, path, ProbeKind.SUM, (*branches, x)), self._calls["norm2"][1], values)
        last = middle
        for name in ("norm2", "channel_func.fc1", "channel_func.act", "channel_func.fc2"):
            last = self._leaf_of(path, name, last)
        values = (torch.from_numpy(self.recorded[middle].value), torch.from_numpy(self.recorded[last].value))
        output = self._settled(path, output, ChannelLayout(self._batch))
        self._add_sum(ProbePoint(path, path, ProbeKind.SUM, (last, middle)), output, values)
        self._stream = path
        return output

    def _spatial(self, path: str, block: MixingBlock | StaticBlock, x: str) -> str:
        """Places of norm1, the spatial function and LayerScale; the last one's name."""
        last = self._leaf_of(path, "norm1", x)
        mixer = block.spatial_func
        if isinstance(mixer, (Attention, StaticAttention)):
            last = self._core(path, mixer, self._leaf_of(path, "spatial_func.qkv", last))
            last = self._leaf_of(path, "spatial_func.proj", last)
        else:
            transposed = isinstance(mixer, SpatialMLP)
            for name in ("fc1", "act", "fc2"):
                last = self._leaf_of(path, f"spatial_func.{name}", last, transposed=transposed)
        gamma = block.gamma_1
        if gamma is None:
            return last
        branch = torch.from_numpy(self.recorded[last].value)
        scaled = gamma.reshape(1, 1, -1) * branch
        place = ProbePoint(path + SCALE, path, ProbeKind.SCALE, (last,))
        self._add(place, scaled, Computation(_Scale(gamma), (branch,), _call, ChannelLayout(self._batch)))
        return place.name

    def _core(self, path: str, mixer: Attention | StaticAttention, qkv: str) -> str:
        packed = torch.from_numpy(self.recorded[qkv].value)
        self._add_parts(qkv, packed)
        core = AttentionCore(mixer.num_heads, mixer.scale)
        place = ProbePoint(f"{path}.spatial_func{CORE}", f"{path}.spatial_func", ProbeKind.CORE, (qkv,))
        self._add(
            place, self._calls["spatial_func.proj"][1], Computation(core, (packed,), _core, ChannelLayout(self._batch))
        )
        return place.name

    def _add_parts(self, qkv: str, packed: Tensor) -> None:
        """Query, key and value, each as the output of its rows of the packed layer."""
        whole = self.recorded[qkv]
        linear, inputs = whole.computation.module, whole.computation.inputs
        assert isinstance(linear, nn.Linear)
        for end, rows, value in zip(QKV_PARTS, _thirds(linear), packed.chunk(3, dim=-1), strict=True):
            place = ProbePoint(qkv + end, qkv, ProbeKind.LEAF, whole.place.parents)
            self._add(place, value, Computation(rows, inputs, _call, ChannelLayout(self._batch)))

    def _leaf_of(self, path: str, name: str, parent: str, *, transposed: bool = False) -> str:
        module, x, y = self._calls[name]
        self._add_leaf(f"{path}.{name}", (parent,), module, x, y, transposed=transposed)
        return f"{path}.{name}"

    def _add_leaf(
        self, path: str, parents: tuple[str, ...], module: nn.Module, x: Tensor, y: Tensor, *, transposed: bool
    ) -> None:
        rows = self._rows_of(module, transposed=transposed)
        place = ProbePoint(path, path, ProbeKind.LEAF, tuple(parent for parent in parents if parent))
        self._add(place, y, Computation(module, (x,), _call, rows))

    def _add_sum(self, place: ProbePoint, value: Tensor, parts: tuple[Tensor, ...]) -> None:
        self._add(place, value, Computation(None, parts, _sum, ChannelLayout(self._batch)))

    def _add(self, place: ProbePoint, value: Tensor, computation: Computation) -> None:
        """Where the value is another form's, the array is that form's too."""
        array = computation.rows.of(value).contiguous().numpy()
        other = self._like.get(place.name)
        if other is not None and other.value.shape == array.shape and np.array_equal(other.value, array):
            array = other.value
        self.recorded[place.name] = ProbeRecord(place, array, computation)

    def _rows_of(self, module: nn.Module, *, transposed: bool = False) -> ChannelLayout:
        first = isinstance(module, (nn.Conv2d, nn.GroupNorm, nn.BatchNorm2d, nn.ReLU))
        return ChannelLayout(self._batch, "first" if first else "transposed" if transposed else "last")


def only_made(places: Mapping[str, ProbePoint], tensors: Collection[str]) -> dict[str, ProbePoint]:
    """Of a packed qkv and its parts those that a graph of these `tensors` makes: the parts, where it names them."""
    parts = {name: tuple(name + end for end in QKV_PARTS) for name in places if name + QKV_PARTS[0] in places}
    parted = {name: own for name, own in parts.items() if all(part in tensors for part in own)}
    gone = {*parted, *(part for name, own in parts.items() if name not in parted for part in own)}
    return {
        name: dataclasses.replace(place, parents=tuple(_each(place.parents, parted)))
        for name, place in places.items()
        if name not in gone
    }


def _each(parents: tuple[str, ...], parted: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    for name in parents:
        yield from parted.get(name, (name,))


def _thirds(linear: nn.Linear) -> list[nn.Linear]:
    """The layer's rows for query, key and value."""
    thirds = []
    for weight, bias in zip(linear.weight.chunk(3), linear.bias.chunk(3), strict=True):
        third = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        third.weight, third.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
        thirds.append(third)
    return thirds


class _Scale(nn.Module):
    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.gamma_1 = gamma

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma_1.reshape(1, 1, -1) * x


class AttentionCore(nn.Module):
    """Attention from packed q, k, v (B, N, 3 * h * d) to what the projection gets (B, N, h * d)."""

    def __init__(self, heads: int, scale: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale

    def compute(self, packed: Tensor, rounding: Rounding) -> Tensor:
        """Scores and probabilities pass through `rounding`."""
        batch, tokens, width = packed.shape
        parts = packed.reshape(batch, tokens, 3, self.heads, width // (3 * self.heads))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        scores = rounding((q * self.scale) @ k.transpose(-2, -1))
        weights = rounding(scores.softmax(dim=-1))
        mixed: Tensor = weights @ v
        return mixed.transpose(1, 2).reshape(batch, tokens, width // 3)


def _mean(_module: nn.Module | None, inputs: tuple[Tensor, ...], _rounding: Rounding) -> Tensor:
    return inputs[0].mean(dim=1)


def _sum(_module: nn.Module | None, inputs: tuple[Tensor, ...], _rounding: Rounding) -> Tensor:
    return sum(inputs[1:], inputs[0])


def _call(module: nn.Module | None, inputs: tuple[Tensor, ...], _rounding: Rounding) -> Tensor:
    assert module is not None
    result: Tensor = module(*inputs)
    return result


def _core(module: nn.Module | None, inputs: tuple[Tensor, ...], rounding: Rounding) -> Tensor:
    assert isinstance(module, AttentionCore)
    return module.compute(inputs[0], rounding)

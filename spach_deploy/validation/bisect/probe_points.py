"""Probe points of a model: tensors of the reference that bisection compares, each with the module that makes it.

A probe point is the output of a leaf module (convolution, linear layer, norm, activation, pooling), the first time that
it runs, of attention between qkv and proj, of LayerScale, of either sum of a mixing block, or of the mean over tokens.
A packed qkv is one point, and query, key and value are three more, because a graph may compute them apart;
`points_of_graph` keeps those that a graph has. Values are (B, N, C), tokens by channels, whatever layout the module
works in, so that they can be found in a graph of any layout.

`measure_rounding` gives the error at a point that rounding alone explains.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spach_deploy.blocks.attention import StaticAttention
from spach_deploy.blocks.channel_mlp import StaticChannelMLP
from spach_deploy.blocks.depthwise import StaticPositionEncoding
from spach_deploy.blocks.mixing_block import StaticBlock
from spach_deploy.blocks.token_mlp import StaticSpatialMLP, TokenLinear
from spach_deploy.common.metrics import relative_l2
from spach_deploy.graph.passes.tokens_first import PARTS
from spach_deploy.models.own_module import has_own_behaviour
from spach_deploy.models.spach import Attention, ChannelMLP, MixingBlock, PositionEncoding, SpatialMLP
from spach_deploy.validation.rounding_error import StorageFormat, converted, rounding_of
from spach_deploy.validation.tolerance import ROUNDING_FACTOR

Float32Array = NDArray[np.float32]
Model = nn.Module
Rounding = Callable[[Tensor], Tensor]

CORE, SCALE, MIDDLE, MEAN = "/core", "/gamma_1", "/middle", "mean"
"""Suffixes of points that are no leaf module's output. A block's second sum has the block's own path as its name."""

QKV_PARTS = tuple(f"/{part}" for part in PARTS)
"""Suffixes of the points of query, key and value."""

_POOLING = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
_CHANNELS_FIRST = (nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm, nn.BatchNorm2d, nn.ReLU, *_POOLING)
_ACTIVATIONS = (nn.GELU, nn.ReLU, nn.SiLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)
_LEAVES = (*_CHANNELS_FIRST, *_ACTIVATIONS, nn.Linear, TokenLinear, nn.LayerNorm)


class ProbeKind(enum.Enum):
    """What is computed at a probe point."""

    LEAF = "module"
    QKV = "query, key or value of attention, or all three"
    CORE = "attention between qkv and proj"
    SCALE = "LayerScale"
    SUM = "residual sum"
    MEAN = "mean over tokens"


@dataclasses.dataclass(frozen=True)
class ProbePoint:
    """One probe point. `module`: path of the PyTorch module to blame; `parents`: the points that it is computed
    from. `is_output`: it is an output of the model. `block`: path of the mixing block that it is in, or "".
    """

    name: str
    module: str
    kind: ProbeKind
    parents: tuple[str, ...]
    is_output: bool = False
    block: str = ""

    @property
    def role(self) -> str:
        """Its name without its block: `.spatial_func.qkv` of `layer3.2.spatial_func.qkv`."""
        return self.name.removeprefix(self.block)


@dataclasses.dataclass(frozen=True)
class ChannelLayout:
    """Converts between a module's layout and (B, N, C).

    `channels`: "last" (B, N, C), "first" (B, C, H, W) or (B, C), "transposed" (B, C, N).
    """

    batch: int
    channels: str = "last"

    def of(self, tensor: Tensor) -> Tensor:
        """`tensor` as (B, N, C)."""
        if self.channels == "first":
            tensor = tensor.movedim(1, -1)
        elif self.channels == "transposed":
            tensor = tensor.transpose(1, 2)
        return tensor.reshape(self.batch, -1, tensor.shape[-1])

    def back(self, rows: Tensor, shaped_as: Tensor) -> Tensor:
        """(B, N, C) in the layout and shape of `shaped_as`."""
        if self.channels != "last":
            rows = rows.transpose(1, 2)
        return rows.reshape(shaped_as.shape)


@dataclasses.dataclass(frozen=True)
class Computation:
    """How a point's value is computed: the module (None for sums), its inputs in their own layout, and a function of
    both.
    """

    module: nn.Module | None
    inputs: tuple[Tensor, ...]
    apply: Callable[[nn.Module | None, tuple[Tensor, ...], Rounding], Tensor]
    rows: ChannelLayout


@dataclasses.dataclass(frozen=True)
class ProbeRecord:
    """A model's value at a probe point: float32 (B, N, C), and how to compute it again. `grid`: height and width of its
    tokens, None where they form none.
    """

    point: ProbePoint
    value: Float32Array
    computation: Computation
    grid: tuple[int, int] | None = None


SAME = 1e-4
"""Relative L2 up to which two forms of the model have the same value at a point; rounding accumulates along the
network.
"""


def record(
    model: Model, images: Float32Array, other_form: Mapping[str, ProbeRecord] | None = None
) -> dict[str, ProbeRecord]:
    """Run `model` on `images` float32 (B, 3, S, S) and record all probe points, in the order of computation.

    `other_form`: records of another form of the same model. Where both have the same value but for rounding, the
    other's value replaces this one's in the run, so that rounding does not accumulate between the two.
    """
    flow = _DataFlow()
    recorder = _Recorder(model, len(images), other_form or {}, flow)
    with torch.inference_mode(), flow:
        recorder.attach()
        try:
            returned = model(torch.from_numpy(images))
        finally:
            recorder.detach()
        return recorder.with_outputs(returned)


class _DataFlow(TorchFunctionMode):
    """Keeps for every tensor the nearest probe points that it is computed from.

    `is_paused`: not now, as within a block, whose points know their inputs: it would keep every attention's scores.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_paused = False
        self._made: dict[int, tuple[Tensor, tuple[str, ...]]] = {}  # with the tensor, so that no other gets its id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`; what it makes comes from the points that its inputs come from."""
        result = func(*args, **(kwargs or {}))
        if self.is_paused:
            return result
        inputs = (self.points_of(tensor) for tensor in _tensors((args, tuple((kwargs or {}).values()))))
        points = tuple(dict.fromkeys(itertools.chain.from_iterable(inputs)))
        for tensor in _tensors(result) if points else ():
            self.set_points(tensor, points)
        return result

    def set_points(self, tensor: Tensor, points: tuple[str, ...]) -> None:
        """From now on `tensor` comes from these alone."""
        self._made[id(tensor)] = tensor, points

    def points_of(self, tensor: Tensor) -> tuple[str, ...]:
        """The points that it comes from."""
        return self._made[id(tensor)][1] if id(tensor) in self._made else ()


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)


def _is_whole(block: nn.Module) -> bool:
    """Whether a module is a mixing block of this package, and all its parts are the usual ones."""
    parts = {name: type(part) for name, part in block.named_children()} if type(block) in _BLOCKS else {}
    known = all(kind in _PARTS for kind in parts.values())
    return bool(parts) and known and not any(map(has_own_behaviour, block.modules()))


_BLOCKS = (MixingBlock, StaticBlock)
_PARTS = (
    *(nn.LayerNorm, PositionEncoding, Attention, SpatialMLP, ChannelMLP),
    *(StaticPositionEncoding, StaticAttention, StaticSpatialMLP, StaticChannelMLP),
)

Call = tuple[str, Tensor, Tensor, ChannelLayout]
"""A leaf module's path, its input, its output and the output's layout."""


class _Recorder:
    """Forward hooks on all leaf modules and mixing blocks. A shared module is told apart by the block that calls it."""

    def __init__(self, model: Model, batch: int, other_form: Mapping[str, ProbeRecord], flow: _DataFlow) -> None:
        self.recorded: dict[str, ProbeRecord] = {}
        self._flow = flow
        shapes = getattr(model, "stage_shapes", ())
        self._grids = {height * width: (height, width) for _, height, width in shapes}
        self._other_form = other_form
        self._model = model
        self._batch = batch
        self._block: tuple[str, MixingBlock | StaticBlock] | None = None
        self._calls: dict[nn.Module, Call] = {}
        self._stream = ""
        self._tensors: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        paths: dict[nn.Module, list[str]] = {}
        for path, module in self._model.named_modules(remove_duplicate=False):
            paths.setdefault(module, []).append(path)
        blocks = {module for module in paths if _is_whole(module)}
        for module, names in paths.items():
            if module in blocks:
                self._handles.append(module.register_forward_pre_hook(self._on_block_entry(names[0])))
                self._handles.append(module.register_forward_hook(self._on_block_exit))
            elif isinstance(module, _LEAVES):
                self._handles.append(module.register_forward_hook(self._on_leaf_call(names)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_block_entry(self, path: str) -> Callable[..., None]:
        def hook(block: MixingBlock | StaticBlock, _inputs: object) -> None:
            self._block, self._calls, self._flow.is_paused = (path, block), {}, True

        return hook

    def _on_leaf_call(self, paths: list[str]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._block is not None:
                path = next(path for path in paths if path.startswith(f"{self._block[0]}."))
                rows = self._rows_of(module, output)
                output = self._substituted(path, output, rows)
                self._calls[module] = path, inputs[0], output, rows
                return output
            if paths[0] in self.recorded or not self._is_batch(inputs, output):
                return output
            parents = self._flow.points_of(inputs[0])
            if self._is_mean(inputs[0]):
                self._mean(inputs[0])
                parents = (MEAN,)
            folded = self._stream if isinstance(module, nn.BatchNorm2d) else paths[0]
            rows = self._rows_of(module, output, parents)
            output = self._substituted(paths[0] if paths[0] in self._other_form else folded, output, rows)
            self._add_leaf(paths[0], parents, module, inputs[0], output, rows)
            self._stream = paths[0]
            self._flow.set_points(output, (paths[0],))
            return output

        return hook

    def _is_batch(self, inputs: tuple[Tensor, ...], output: Tensor) -> bool:
        """Whether a call takes one tensor and gives rows of channels for every image."""
        rows = output.numel() // max(output.shape[-1], 1) if output.ndim > 1 else 0
        return len(inputs) == 1 and rows > 0 and rows % self._batch == 0

    def _is_mean(self, pooled: Tensor) -> bool:
        """Whether a tensor is the mean over tokens of the last point's value."""
        if not self._stream or MEAN in self.recorded or pooled.ndim != 2:
            return False
        tokens = torch.from_numpy(self.recorded[self._stream].value)
        mean = tokens.mean(dim=1)
        return tokens.shape[1] > 1 and mean.shape == pooled.shape and bool((mean - pooled).norm() <= SAME * mean.norm())

    def _substituted(self, name: str, output: Tensor, rows: ChannelLayout) -> Tensor:
        """The other form's value, in this form's layout, where both are the same; else `output`."""
        other = self._other_form.get(name)
        if other is None:
            return output
        value, theirs = rows.of(output), torch.from_numpy(other.value)
        if value.shape != theirs.shape or not (value - theirs).norm() <= SAME * theirs.norm():
            return output
        return rows.back(theirs, output)

    def _mean(self, pooled: Tensor) -> None:
        tokens = torch.from_numpy(self.recorded[self._stream].value)
        point = ProbePoint(MEAN, "", ProbeKind.MEAN, (self._stream,))
        self._add(point, pooled, Computation(None, (tokens,), _mean, ChannelLayout(self._batch)))
        self._stream = MEAN

    def _on_block_exit(self, block: MixingBlock | StaticBlock, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Record the points of a whole block, from the calls of its leaf modules."""
        assert self._block is not None
        path = self._block[0]
        points = self._flow.points_of(inputs[0])
        x = self._stream if self._stream in points or not points else points[-1]
        x_rows = ChannelLayout(self._batch).of(inputs[0])
        encoding = getattr(block, "cpe_net", None)
        branches = [] if encoding is None else [self._chain(encoding, x)]
        if getattr(block, "spatial_func", None) is not None:
            branches.append(self._spatial(path, block, x))
        includes = isinstance(block, StaticBlock) and block.includes_residual
        parts = () if includes else (x_rows,)
        middle = branches[0] if branches else x
        if branches and (not includes or len(branches) > 1):
            middle = path + MIDDLE
            values = (*parts, *(torch.from_numpy(self.recorded[name].value) for name in branches))
            self._add_sum(ProbePoint(middle, path, ProbeKind.SUM, (*branches, x)), self._calls[block.norm2][1], values)
        last = self._chain(block.channel_func, self._chain(block.norm2, middle))
        values = (torch.from_numpy(self.recorded[middle].value), torch.from_numpy(self.recorded[last].value))
        output = self._substituted(path, output, ChannelLayout(self._batch))
        self._add_sum(ProbePoint(path, path, ProbeKind.SUM, (last, middle)), output, values)
        self._stream = path
        self._block, self._flow.is_paused = None, False
        self._flow.set_points(output, (path,))
        return output

    def _spatial(self, path: str, block: MixingBlock | StaticBlock, x: str) -> str:
        """Record the norm before it, the spatial function and LayerScale; returns the name of the last point."""
        mixer = block.spatial_func
        assert mixer is not None
        assert block.norm1 is not None
        last = self._chain(block.norm1, x)
        if isinstance(mixer, (Attention, StaticAttention)):
            last = self._chain(mixer.proj, self._core(mixer, self._chain(mixer.qkv, last)))
        else:
            last = self._chain(mixer, last)
        gamma = getattr(block, "gamma_1", None)
        if gamma is None:
            return last
        branch = torch.from_numpy(self.recorded[last].value)
        scaled = gamma.reshape(1, 1, -1) * branch
        point = ProbePoint(path + SCALE, path, ProbeKind.SCALE, (last,))
        self._add(point, scaled, Computation(_Scale(gamma), (branch,), _call, ChannelLayout(self._batch)))
        return point.name

    def _chain(self, part: nn.Module, last: str) -> str:
        """Record the leaf modules that a part of the block called, one after another; returns the last's name."""
        own = set(part.modules())
        for module in [module for module in self._calls if module in own]:
            path, x, y, rows = self._calls[module]
            self._add_leaf(path, (last,), module, x, y, rows)
            last = path
        return last

    def _core(self, mixer: Attention | StaticAttention, qkv: str) -> str:
        record = self.recorded[qkv]
        self.recorded[qkv] = dataclasses.replace(record, point=dataclasses.replace(record.point, kind=ProbeKind.QKV))
        packed = torch.from_numpy(record.value)
        self._add_parts(qkv, packed)
        core = AttentionCore(mixer.num_heads, mixer.scale)
        path = qkv.rpartition(".")[0]
        point = ProbePoint(path + CORE, path, ProbeKind.CORE, (qkv,))
        self._add(point, self._calls[mixer.proj][1], Computation(core, (packed,), _core, ChannelLayout(self._batch)))
        return point.name

    def _add_parts(self, qkv: str, packed: Tensor) -> None:
        """Record query, key and value, each as the output of its rows of the packed layer."""
        whole = self.recorded[qkv]
        linear, inputs = whole.computation.module, whole.computation.inputs
        assert isinstance(linear, nn.Linear)
        for end, rows, value in zip(QKV_PARTS, _thirds(linear), packed.chunk(3, dim=-1), strict=True):
            point = ProbePoint(qkv + end, qkv, ProbeKind.QKV, whole.point.parents)
            self._add(point, value, Computation(rows, inputs, _call, ChannelLayout(self._batch)))

    def _add_leaf(
        self, path: str, parents: tuple[str, ...], module: nn.Module, x: Tensor, y: Tensor, rows: ChannelLayout
    ) -> None:
        if rows.channels == "first" and y.ndim == 4:
            self._grids.setdefault(y.shape[2] * y.shape[3], (y.shape[2], y.shape[3]))
        self._add(ProbePoint(path, path, ProbeKind.LEAF, parents), y, Computation(module, (x,), _call, rows))

    def _add_sum(self, point: ProbePoint, value: Tensor, parts: tuple[Tensor, ...]) -> None:
        self._add(point, value, Computation(None, parts, _sum, ChannelLayout(self._batch)))

    def _add(self, point: ProbePoint, value: Tensor, computation: Computation) -> None:
        """Record a point. Where the value equals the other form's, both share one array."""
        block = "" if self._block is None else self._block[0]
        parents = tuple(filter(None, point.parents))  # the images are no point
        point = dataclasses.replace(point, parents=parents, block=block)
        self._tensors[point.name] = value
        array = computation.rows.of(value).contiguous().numpy()
        other = self._other_form.get(point.name)
        if other is not None and other.value.shape == array.shape and np.array_equal(other.value, array):
            array = other.value
        self.recorded[point.name] = ProbeRecord(point, array, computation, self._grids.get(array.shape[1]))

    def _rows_of(self, module: nn.Module, output: Tensor, parents: Collection[str] = ()) -> ChannelLayout:
        """The layout of a leaf module's output; of an activation it is that of its input."""
        mixer = None if self._block is None else getattr(self._block[1], "spatial_func", None)
        if isinstance(mixer, SpatialMLP) and module in set(mixer.modules()):
            return ChannelLayout(self._batch, "transposed")
        read = (self.recorded[name].computation.rows.channels for name in parents)
        follows = isinstance(module, _ACTIVATIONS) and output.ndim == 4 and "first" in read
        return ChannelLayout(self._batch, "first" if follows or isinstance(module, _CHANNELS_FIRST) else "last")

    def with_outputs(self, returned: object) -> dict[str, ProbeRecord]:
        """The records, those of the model's outputs marked."""
        outputs = {id(tensor) for tensor in _tensors(returned)}
        return {
            name: dataclasses.replace(
                entry, point=dataclasses.replace(entry.point, is_output=id(self._tensors[name]) in outputs)
            )
            for name, entry in self.recorded.items()
        }


def points_of_graph(points: Mapping[str, ProbePoint], tensors: Collection[str]) -> dict[str, ProbePoint]:
    """The points that a graph with these `tensors` has: query, key and value where it names them, else the packed
    qkv.
    """
    parts = {name: tuple(name + end for end in QKV_PARTS) for name in points if name + QKV_PARTS[0] in points}
    parted = {name: own for name, own in parts.items() if all(part in tensors for part in own)}
    gone = {*parted, *(part for name, own in parts.items() if name not in parted for part in own)}
    return {
        name: dataclasses.replace(point, parents=tuple(_expanded(point.parents, parted)))
        for name, point in points.items()
        if name not in gone
    }


def _expanded(parents: tuple[str, ...], parted: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    for name in parents:
        yield from parted.get(name, (name,))


def _thirds(linear: nn.Linear) -> list[nn.Linear]:
    """The packed layer as three layers, for query, key and value."""
    thirds = []
    biases = (None,) * 3 if linear.bias is None else linear.bias.chunk(3)
    for weight, bias in zip(linear.weight.chunk(3), biases, strict=True):
        third = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        third.weight = nn.Parameter(weight, requires_grad=False)
        third.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        thirds.append(third)
    return thirds


class _Scale(nn.Module):
    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.gamma_1 = gamma

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma_1.reshape(1, 1, -1) * x


class AttentionCore(nn.Module):
    """Attention between qkv and proj: packed q, k, v (B, N, 3 * h * d) -> (B, N, h * d)."""

    def __init__(self, heads: int, scale: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale

    def compute(self, packed: Tensor, rounding: Rounding) -> Tensor:
        """Compute it; scores and probabilities pass through `rounding`."""
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


# Errors of rounding


MODULE_FP32_FACTOR = 4.0
"""Allowed multiple of FP32's error for one module: other kernels and orders of summation than PyTorch's. It is smaller
than `validation.tolerance` allows a whole network, along which errors add up.
"""

_LEAST_FP32_ERROR = 1e-7
"""Lower bound of FP32's error, somewhat above the unit roundoff of 6e-8."""


def identity(tensor: Tensor) -> Tensor:
    """Neither converts nor rounds."""
    return tensor


@dataclasses.dataclass(frozen=True)
class RoundingErrors:
    """Rounding errors at one point, relative L2: of FP32 against FP64, and of the graph's precision against FP32."""

    fp32_error: float
    rounding_error: float

    @property
    def allowed(self) -> float:
        """The error that rounding explains, given right inputs."""
        return MODULE_FP32_FACTOR * self.fp32_error + ROUNDING_FACTOR * self.rounding_error


def measure_rounding(recorded: ProbeRecord, arithmetic: StorageFormat) -> RoundingErrors:
    """Measure both rounding errors at a point, by computing it again from the recorded inputs."""
    exact = recompute(recorded.computation, lambda tensor: tensor.double())
    fp32_error = relative_l2(recorded.value, exact)
    rounding_error = 0.0
    if arithmetic is not StorageFormat.FP32:
        rounding = rounding_of(arithmetic)
        rounding_error = relative_l2(recompute(recorded.computation, rounding, rounding), recorded.value)
    return RoundingErrors(max(fp32_error, _LEAST_FP32_ERROR), rounding_error)


def recompute(
    computation: Computation, convert: Rounding = identity, rounding: Rounding = identity
) -> NDArray[np.floating]:
    """The point's value (B, N, C), computed again: weights and inputs pass through `convert`, results through
    `rounding`.
    """
    with torch.inference_mode():
        module = None if computation.module is None else converted(computation.module, convert)
        inputs = tuple(convert(tensor) for tensor in computation.inputs)
        value = rounding(computation.apply(module, inputs, rounding))
        result: NDArray[np.floating] = computation.rows.of(value).numpy()
    return result

"""Equalization: exchange ranges between neighbouring weights before scales are set. Exact but for FP32's rounding.

The method is SmoothQuant (Xiao et al., arXiv 2211.10438). Where weights that scale an activation channel by channel
precede a linear layer, dividing channel c by s_c and multiplying the layer's column c by s_c changes only ranges.
Without it, one channel with large numbers sets the scale, and the others use few of the 256 steps.

Pairs of this family that are exact:

- a LayerNorm's weight and bias -> the linear layer that reads it (qkv, fc1), or that reads its mean over tokens (the
  head; the mean is linear);
- the value rows of qkv -> the columns of proj (attention's result is linear in v; not where v itself is quantized,
  whose scale would have to follow);
- a convolution's output channels -> the next one's inputs behind ReLU, which is homogeneous (the convolutional stem).

GELU is not homogeneous, so fc1 -> fc2 is no pair. A spatial MLP's inputs are tokens, and LayerNorm scales channels.

With x_c the activations and w_c the weights of column c, s_c = max|x_c|^alpha / max|w_c|^(1 - alpha). For every pair
alpha, or no exchange, is chosen by the expected squared error of the layer's output. Rounding errors of activations and
of weights are independent, so that error follows from histograms and weights without running the model. Errors of
weights count COHERENCE times: an activation's rounding error differs from token to token and averages out in attention
and in the final mean, a weight's is the same for all tokens. (Its mean is removed by bias correction, so it is
multiplied by the activations' variance, not by their mean square.)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.graph.editing import array_of, name_of, operand, permutation, shapes_at_batch_one, tensor_of
from spach_deploy.quantization.formats import INT8, EightBitFormat, Float32, Float64
from spach_deploy.quantization.scales import expected_error
from spach_deploy.quantization.sites import LayerKind, Site, is_weight
from spach_deploy.quantization.statistics import CENTERS, TensorStatistics, mixture

ALPHAS = tuple(round(0.1 * step, 1) for step in range(1, 11))
COHERENCE = 16.0
"""Weight of an error that all tokens share, against one that differs from token to token.

Found by experiment: the relative L2 of ms_hybrid_s's logits is 0.018 at 4, 0.016 at 8 and 0.015 at 16; small models
trained on digits hardly change.
"""

WORTH = {"int8": 0.99, "fp8": 0.75}
"""A pair is equalized only if its expected error falls to this share or less.

FP8's rounding error is relative to the number, so equal ranges gain nothing until numbers underflow. Expected gains of
a few percent made results worse there: relative L2 of ms_hybrid_s's logits 0.068 instead of 0.048.
"""

_LARGEST_FACTOR = 2.0**12
"""Largest ratio of a factor to the geometric mean of all, either way; FP16 cannot hold weights beyond it."""


@dataclasses.dataclass(frozen=True)
class OutputChannels:
    """The output channels of a parameter that are divided by factors: all, or with `values` the value rows of qkv."""

    parameter: str
    values: bool = False


@dataclasses.dataclass(frozen=True)
class EqualizablePair:
    """Neighbouring weights: `divided` is divided by factors, channel by channel, and the columns of `site`'s weights
    are multiplied by them.
    """

    name: str
    divided: tuple[OutputChannels, ...]
    site: Site


@dataclasses.dataclass(frozen=True)
class EqualizedPair:
    """Record of one pair. `alpha` None: it was not equalized, and there are no `factors`.

    `error_before`, `error_after`: expected squared error of the layer's output, relative to the output's mean square,
    with COHERENCE. `range_before`, `range_after`: largest |x| of the activation over its root mean square.
    """

    name: str
    site: str
    divided: tuple[OutputChannels, ...]
    weight: str
    alpha: float | None
    factors: tuple[float, ...]
    error_before: float
    error_after: float
    range_before: float
    range_after: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**dataclasses.asdict(self), "factors": [_short(factor) for factor in self.factors]}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> EqualizedPair:
        """Read what `to_dict` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        divided = tuple(OutputChannels(**rows) for rows in entry["divided"])
        alpha = None if entry["alpha"] is None else float(entry["alpha"])
        return cls(**{**entry, "divided": divided, "alpha": alpha, "factors": tuple(map(float, entry["factors"]))})


def _short(number: float) -> float:
    """`number` to six digits. Equalization is exact with any factors, if division and multiplication use the same."""
    return float(f"{number:.6g}")


def find_pairs(model: ir.Model, sites: Iterable[Site]) -> tuple[EqualizablePair, ...]:
    """The exact pairs of the `sites` that are quantized, found by what the graph computes.

    Numbers that are an output of the graph, or that anything else reads, are not exchanged.
    """
    chosen = tuple(sites)
    finder = _PairFinder(model, {node for site in chosen for node in site.products})
    pairs = []
    for site in chosen:
        divided = finder.divided(site)
        if divided:
            pairs.append(EqualizablePair(f"{divided[0].parameter.rsplit('.', 1)[0]} -> {site.module}", divided, site))
    return tuple(pairs)


class _PairFinder:
    """Goes from a site's activation back to the weights that scale it. `quantized`: products of attentions in eight
    bits, whose values keep their range.
    """

    def __init__(self, model: ir.Model, quantized: Collection[str]) -> None:
        self._shapes = shapes_at_batch_one(model)
        self._nodes = {node.name: node for node in model.graph}
        self._quantized = quantized

    def divided(self, site: Site) -> tuple[OutputChannels, ...]:
        """What can be divided for a site; () where that is nothing."""
        activation = self._nodes[site.node].inputs[site.slot]
        if activation is None or activation.is_graph_output():
            return ()
        if any(_weight_of(reader) != site.weight for reader in activation.consumers()):
            return ()
        if site.kind is LayerKind.CONVOLUTION:
            return self._of_convolution(activation)
        if site.kind is LayerKind.LINEAR:
            return self._of_norm(activation) or self._of_values(activation)
        return ()

    def _of_convolution(self, activation: ir.Value) -> tuple[OutputChannels, ...]:
        """A convolution with a bias, where `activation` is its ReLU."""
        relu = activation.producer()
        before = _only_maker(relu.inputs[0]) if relu is not None and relu.op_type == "Relu" else None
        if before is None or before.op_type != "Conv" or len(before.inputs) < 3:
            return ()
        return _parameters(before.inputs[1:])

    def _of_norm(self, activation: ir.Value) -> tuple[OutputChannels, ...]:
        """A LayerNorm of which `activation` is the result, moved with channels last or averaged over tokens."""
        node = activation.producer()
        while node is not None and self._keeps_channels(node):
            node = _only_maker(node.inputs[0])
        if node is None or node.op_type != "LayerNormalization" or len(self._shapes[name_of(operand(node, 1))]) != 1:
            return ()
        return _parameters(node.inputs[1:])

    def _keeps_channels(self, node: ir.Node) -> bool:
        shapes = [self._shapes[name_of(value)] for value in (node.inputs[0], node.outputs[0])]
        if node.op_type == "Transpose":
            return permutation(node)[-1] == len(shapes[0]) - 1
        if node.op_type == "ReduceMean":
            axes = array_of(node.inputs[1]) if len(node.inputs) > 1 else None
            return axes is not None and not {-1, len(shapes[0]) - 1} & {*axes.tolist()}
        return node.op_type == "Reshape" and shapes[0][-1:] == shapes[1][-1:]

    def _of_values(self, activation: ir.Value) -> tuple[OutputChannels, ...]:
        """The value rows of a packed layer, where `activation` is what an attention makes of them."""
        behind = self._moves(activation)
        product = behind[0].inputs[0].producer() if behind and behind[0].inputs[0] is not None else None
        if product is None or product.op_type != "MatMul" or product.name in self._quantized:
            return ()
        weights, values = (operand(product, slot) for slot in (0, 1))
        maker = _only_maker(weights)
        before = self._moves(values)
        layer = _only_maker(before[0].inputs[0]) if before else None
        if maker is None or maker.op_type != "Softmax" or layer is None or layer.op_type != "Gemm":
            return ()
        columns = self._value_columns(layer, before, behind, values)
        parameters = _parameters([_split_weight(layer.inputs[1])[0], *layer.inputs[2:]], values_only=True)
        return parameters if columns else ()

    def _moves(self, value: ir.Value) -> list[ir.Node]:
        """The moves that make `value`, in order; nothing else may read what is between them."""
        moves: list[ir.Node] = []
        node = value.producer()
        while node is not None and node.op_type in ("Reshape", "Transpose", "Split"):
            moves.insert(0, node)
            node = _only_maker(node.inputs[0])
        return moves

    def _value_columns(self, layer: ir.Node, before: list[ir.Node], behind: list[ir.Node], values: ir.Value) -> bool:
        """Whether the attention's columns are the layer's last rows, one by one: followed by their numbers."""
        weight, part = _split_weight(layer.inputs[1])
        rows, columns = self._shapes[name_of(layer.outputs[0])]
        first = part * columns
        numbers = np.broadcast_to(np.arange(first, first + columns), (rows, columns))
        for node, after in itertools.pairwise([*before, None]):
            assert node is not None
            made = values if after is None else operand(after, 0)
            numbers = self._moved(node, numbers, node.outputs.index(made))
        if numbers.shape[-2:] != self._shapes[name_of(values)][-2:] or (numbers != numbers[..., :1, :]).any():
            return False  # tokens and channels are not the last axes
        for node in behind:
            numbers = self._moved(node, numbers, 0)
        numbers = numbers.reshape(-1, numbers.shape[-1])
        total = 0 if weight is None else self._shapes[name_of(weight)][0]
        return bool((numbers == np.arange(total - numbers.shape[-1], total)).all())

    def _moved(self, node: ir.Node, numbers: NDArray[np.int64], output: int) -> NDArray[np.int64]:
        if node.op_type == "Transpose":
            return numbers.transpose(permutation(node))
        shapes = [self._shapes[name_of(value)] for value in node.outputs]
        if node.op_type == "Reshape":
            return numbers.reshape(shapes[0])
        axis = node.attributes.get_int("axis", 0)
        start = sum(shape[axis] for shape in shapes[:output])
        return numbers.take(range(start, start + shapes[output][axis]), axis)


def _only_maker(value: ir.Value | None) -> ir.Node | None:
    """The node that makes `value`, which one node alone reads and which is no output of the graph."""
    if value is None or value.is_graph_output() or len(value.uses()) != 1:
        return None
    return value.producer()


def _split_weight(value: ir.Value | None) -> tuple[ir.Value | None, int]:
    """The weight of which `value` is one of equal parts, and which one; a weight itself, and 0."""
    split = None if value is None else value.producer()
    if value is None or split is None or split.op_type != "Split":
        return value, 0
    return split.inputs[0], split.outputs.index(value)


def _weight_of(layer: ir.Node) -> str:
    """Name of the weight that a layer multiplies its first input with."""
    weight, _ = _split_weight(layer.inputs[1]) if len(layer.inputs) > 1 else (None, 0)
    return "" if weight is None else name_of(weight)


def _parameters(values: Sequence[ir.Value | None], *, values_only: bool = False) -> tuple[OutputChannels, ...]:
    """Weight and bias of one layer, where they are its own; () where they are not."""
    given = [value for value in values if value is not None]
    if not all(is_weight(value) and len(value.uses()) == 1 for value in given):
        return ()
    return tuple(OutputChannels(name_of(value), values_only) for value in given)


def search(
    pairs: Sequence[EqualizablePair],
    statistics: Mapping[str, TensorStatistics],
    weights: Mapping[str, Float32],
    form: EightBitFormat,
) -> tuple[EqualizedPair, ...]:
    """Choose alpha for every pair. `weights`: the sites' weights by name, (outputs, inputs, ...) float32."""
    return tuple(_search_one(pair, statistics[pair.site.activation], weights[pair.site.weight], form) for pair in pairs)


def _search_one(
    pair: EqualizablePair, statistics: TensorStatistics, weight: Float32, form: EightBitFormat
) -> EqualizedPair:
    columns = _by_column(weight)
    expected = _ExpectedError(statistics, columns, form)
    unchanged = np.ones(len(statistics.max_abs))
    before = expected.relative(unchanged)
    best, alpha, least = unchanged, None, before * WORTH[form.name]
    for candidate in ALPHAS:
        factors = smoothing_factors(statistics.max_abs, np.abs(columns).max(axis=(0, 2)), candidate)
        error = expected.relative(factors)
        if error < least:
            best, alpha, least = factors, candidate, error
    after = before if alpha is None else least
    return EqualizedPair(
        name=pair.name,
        site=pair.site.module,
        divided=pair.divided,
        weight=pair.site.weight,
        alpha=alpha,
        factors=() if alpha is None else tuple(_short(float(factor)) for factor in best),
        error_before=before,
        error_after=after,
        range_before=_peak(statistics, unchanged),
        range_after=_peak(statistics, best),
    )


def _by_column(weight: Float32) -> Float32:
    """`weight` as (outputs, inputs, kernel positions)."""
    return weight.reshape(weight.shape[0], weight.shape[1], -1)


def smoothing_factors(activation: Float64, weight: Float32, alpha: float) -> Float64:
    """s_c = max|x_c|^alpha / max|w_c|^(1 - alpha), divided by their geometric mean, clipped to `_LARGEST_FACTOR`.

    `activation`: max|x_c|, float64 (C). `weight`: max|w_c|, float32 (C). A channel of zeros gets 1.
    """
    alive = (activation > 0) & (weight > 0)
    factors = np.ones(len(activation))
    if not alive.any():
        return factors
    logs = alpha * np.log2(activation[alive]) - (1 - alpha) * np.log2(weight[alive].astype(np.float64))
    logs -= logs.mean()
    limit = np.log2(_LARGEST_FACTOR)
    factors[alive] = np.exp2(np.clip(logs, -limit, limit))
    return factors


class _ExpectedError:
    """Expected squared error of a layer's output for given factors, relative to the output's mean square.

    Computed as if no activation were clipped, whichever method sets the scales later: it only ranks alphas.
    """

    def __init__(self, statistics: TensorStatistics, columns: Float32, form: EightBitFormat) -> None:
        self._statistics, self._form = statistics, form
        self._columns = columns
        self._energy = np.einsum("oir,oir->i", columns, columns).astype(np.float64)
        self._peaks = np.abs(columns).max(axis=2).astype(np.float64)  # (outputs, inputs)
        self._rest = columns.shape[2]
        self._output = float(self._energy @ statistics.mean_square) or 1.0

    def relative(self, factors: Float64) -> float:
        return (self._activation_error(factors) + COHERENCE * self._weight_error(factors)) / self._output

    def _activation_error(self, factors: Float64) -> float:
        energy = self._energy * factors**2
        largest = float((self._statistics.max_abs / factors).max(initial=0.0))
        if largest == 0:
            return 0.0
        if self._statistics.histogram is None:
            scale = self._form.scale_of(largest)
            root = np.sqrt(self._statistics.mean_square) / factors
            return float(energy @ self._form.squared_error(root / scale)) * scale**2
        histogram = mixture(self._statistics, factors, energy)
        scale = self._form.scale_of(largest)
        used = np.flatnonzero(histogram)
        return expected_error(histogram[used], CENTERS[used], scale, self._form) / max(self._statistics.count, 1)

    def _weight_error(self, factors: Float64) -> float:
        power = self._statistics.variance / factors**2 * self._rest
        if self._form != INT8:  # FP8's error is relative, so factors do not matter
            return float(self._energy @ self._statistics.variance) * 2.0**-8 / 12
        scales = (self._peaks * factors).max(axis=1) / self._form.limit
        return float(np.sum(scales**2) / 12 * power.sum())


def _peak(statistics: TensorStatistics, factors: Float64) -> float:
    root = float(np.sqrt(np.mean(statistics.mean_square / factors**2)))
    return float((statistics.max_abs / factors).max(initial=0.0)) / root if root else 0.0


def apply_to_arrays(arrays: Mapping[str, Float32], equalized: Iterable[EqualizedPair]) -> dict[str, Float32]:
    """The changed parameters by name, float32; computed in FP64 and rounded once."""
    changed: dict[str, Float64] = {}

    def current(name: str) -> Float64:
        if name not in changed:
            changed[name] = np.array(arrays[name], np.float64)
        return changed[name]

    for entry in equalized:
        if entry.alpha is None:
            continue
        factors = np.array(entry.factors)
        for rows in entry.divided:
            _divide(current(rows.parameter), rows, factors)
        weight = current(entry.weight)
        shape = (1, -1) + (1,) * (weight.ndim - 2)
        weight *= factors.reshape(shape)
    return {name: value.astype(np.float32) for name, value in changed.items()}


def _divide(parameter: Float64, rows: OutputChannels, factors: Float64) -> None:
    part = parameter[-len(factors) :] if rows.values else parameter
    part /= factors.reshape((-1,) + (1,) * (parameter.ndim - 1))


def apply_to_graph(model: ir.Model, equalized: Iterable[EqualizedPair]) -> int:
    """Equalize the weights of an FP32 graph, in place; returns how many changed."""
    constants = model.graph.initializers
    changed = apply_to_arrays(_Decoded(constants), equalized)
    for name, value in changed.items():
        constants[name].const_value = ir.Tensor(value, name=name)
    return len(changed)


class _Decoded(dict[str, Float32]):
    """Initializers as float32 arrays, decoded on first use."""

    def __init__(self, constants: Mapping[str, ir.Value]) -> None:
        super().__init__()
        self._constants = constants

    def __missing__(self, name: str) -> Float32:
        self[name] = tensor_of(self._constants[name]).numpy()
        return self[name]

"""Exchange of ranges between neighbouring weights, exact in FP32, before any scale is set.

SmoothQuant (Xiao et al., arXiv 2211.10438): where something that is scaled channel by channel precedes a
linear layer, dividing channel c by s_c and multiplying the layer's column c by s_c changes nothing but the ranges. A
channel that alone fills a tensor's range thereby leaves most of the eight bits to the others.

Pairs of this family that are exact:

- a LayerNorm's weight and bias -> qkv, fc1, and the head (the mean over tokens in between is linear);
- the value rows of qkv -> the columns of proj (attention's result is linear in v; not where v itself is quantized,
  whose scale would have to follow);
- of the convolutional stem, a convolution's output channels -> the next one's inputs (ReLU is homogeneous).

GELU is not homogeneous, so fc1 -> fc2 is no pair; and a spatial MLP's inputs are tokens, but LayerNorm scales channels.

With x_c the activations and w_c the weights of column c, s_c = max|x_c|^alpha / max|w_c|^(1 - alpha). Alpha is searched
for every pair, "off" included, by the expected squared error of the layer's output: rounding errors of activations and
of weights are independent, so it follows from histograms and weights without running anything. Errors of weights count
COHERENCE times: an activation's rounding differs from token to token and averages out in attention and in the final
mean; a weight's is the same for all tokens and does not. (What it does on average is corrected in the bias, so it is
the variance of the activations that it meets.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from spach_deploy.graph.editing import tensor_of
from spach_deploy.quantization.formats import INT8, EightBitFormat, Float32, Float64
from spach_deploy.quantization.scales import expected_error
from spach_deploy.quantization.sites import LayerKind, Site
from spach_deploy.quantization.statistics import CENTERS, TensorStatistics, mixture

ALPHAS = tuple(round(0.1 * step, 1) for step in range(1, 11))
COHERENCE = 16.0
"""How many tokens' worth of independent errors one error that all tokens share is. Found by experiment: the relative L2
of ms_hybrid_s's logits is 0.018 at 4, 0.016 at 8 and 0.015 at 16; small models trained on digits hardly care."""

WORTH = {"int8": 0.99, "fp8": 0.75}
"""A pair is left alone unless its expected error falls to this share. FP8's rounding error grows with the number, so
evening out ranges gains it nothing until numbers underflow, and expected gains of a few percent were losses: 0.068 for
ms_hybrid_s's logits instead of 0.048.
"""

_LARGEST_FACTOR = 2.0**12
"""Factors stay within this of their geometric mean: beyond it FP16 would lose the small ones."""


@dataclasses.dataclass(frozen=True)
class OutputChannels:
    """The output channels of a parameter that factors divide: all of them, or with `values` the last third, of qkv."""

    parameter: str
    values: bool = False


@dataclasses.dataclass(frozen=True)
class EqualizablePair:
    """What is divided by the factors, channel by channel, and the site whose weights' inputs are multiplied."""

    name: str
    divided: tuple[OutputChannels, ...]
    site: Site


@dataclasses.dataclass(frozen=True)
class EqualizedPair:
    """What was done to one pair. `alpha` None: it was left alone, and there are no `factors`.

    Errors are expected squared errors of the layer's output, relative to the output's own square, as the search counts
    them; `range_before`, `range_after`: largest |x| of the activation over its root mean square.
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
        """What `to_dict` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        divided = tuple(OutputChannels(**rows) for rows in entry["divided"])
        alpha = None if entry["alpha"] is None else float(entry["alpha"])
        return cls(**{**entry, "divided": divided, "alpha": alpha, "factors": tuple(map(float, entry["factors"]))})


def _short(number: float) -> float:
    """Factors are kept to six digits: exactness does not depend on their value, only on using the same ones twice."""
    return float(f"{number:.6g}")


def find_pairs(sites: Iterable[Site], names: Iterable[str]) -> tuple[EqualizablePair, ...]:
    """The exact pairs of the `sites` that are quantized, in a model whose parameters are called `names`."""
    known, chosen = set(names), tuple(sites)
    attentions = {site.module for site in chosen if site.kind is LayerKind.ATTENTION}
    pairs = []
    for site in chosen:
        divided = _divided(site, known)
        if divided and not (divided[0].values and site.module.rpartition(".")[0] in attentions):
            pairs.append(EqualizablePair(f"{divided[0].parameter.rsplit('.', 1)[0]} -> {site.module}", divided, site))
    return tuple(pairs)


def _divided(site: Site, known: set[str]) -> tuple[OutputChannels, ...]:
    if site.kind is LayerKind.CONVOLUTION:
        return _stem_pair(site, known)
    if site.kind is not LayerKind.LINEAR:
        return ()
    block, _, layer = site.module.rpartition(".")
    norm = {
        "qkv": block.removesuffix(".spatial_func") + ".norm1",
        "fc1": block.removesuffix(".channel_func") + ".norm2",
        "head": "norm2",
    }.get(layer)
    if norm is not None and f"{norm}.weight" in known:
        return tuple(OutputChannels(f"{norm}.{part}") for part in ("weight", "bias"))
    if layer == "proj" and f"{block}.qkv.weight" in known:
        parts = [f"{block}.qkv.{part}" for part in ("weight", "bias")]
        return tuple(OutputChannels(part, values=True) for part in parts if part in known)  # the bias may be absorbed
    return ()


def _stem_pair(site: Site, known: set[str]) -> tuple[OutputChannels, ...]:
    """Convolution, (BatchNorm,) ReLU, convolution: three apart, as the published stem numbers them."""
    prefix, _, index = site.module.rpartition(".")
    if not index.isdigit() or not prefix.startswith("stem"):
        return ()
    before = f"{prefix}.{int(index) - 3}"
    if f"{before}.weight" not in known or f"{before}.bias" not in known:
        return ()
    return tuple(OutputChannels(f"{before}.{part}") for part in ("weight", "bias"))


def search(
    pairs: Sequence[EqualizablePair],
    statistics: Mapping[str, TensorStatistics],
    weights: Mapping[str, Float32],
    form: EightBitFormat,
) -> tuple[EqualizedPair, ...]:
    """The best alpha of every pair. `weights`: the sites' weights by name, (outputs, inputs, ...) float32."""
    return tuple(_search_one(pair, statistics[pair.site.activation], weights[pair.site.weight], form) for pair in pairs)


def _search_one(
    pair: EqualizablePair, statistics: TensorStatistics, weight: Float32, form: EightBitFormat
) -> EqualizedPair:
    columns = _by_column(weight)
    judge = _Judge(statistics, columns, form)
    unchanged = np.ones(len(statistics.max_abs))
    before = judge.error(unchanged)
    best, alpha, least = unchanged, None, before * WORTH[form.name]
    for candidate in ALPHAS:
        factors = smoothing_factors(statistics.max_abs, np.abs(columns).max(axis=(0, 2)), candidate)
        error = judge.error(factors)
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
    """(outputs, inputs, rest)."""
    return weight.reshape(weight.shape[0], weight.shape[1], -1)


def smoothing_factors(activation: Float64, weight: Float32, alpha: float) -> Float64:
    """s_c = max|x_c|^alpha / max|w_c|^(1 - alpha), their geometric mean 1, none further from it than FP16 bears."""
    alive = (activation > 0) & (weight > 0)
    factors = np.ones(len(activation))
    if not alive.any():
        return factors
    logs = alpha * np.log2(activation[alive]) - (1 - alpha) * np.log2(weight[alive].astype(np.float64))
    logs -= logs.mean()
    limit = np.log2(_LARGEST_FACTOR)
    factors[alive] = np.exp2(np.clip(logs, -limit, limit))
    return factors


class _Judge:
    """Expected squared error of a layer's output for given factors, relative to the output's square.

    Nothing is taken to be clipped, whichever method will set the scales: that is as good an order of the alphas.
    """

    def __init__(self, statistics: TensorStatistics, columns: Float32, form: EightBitFormat) -> None:
        self._statistics, self._form = statistics, form
        self._columns = columns
        self._energy = np.einsum("oir,oir->i", columns, columns).astype(np.float64)
        self._peaks = np.abs(columns).max(axis=2).astype(np.float64)  # (outputs, inputs)
        self._rest = columns.shape[2]
        self._output = float(self._energy @ statistics.mean_square) or 1.0

    def error(self, factors: Float64) -> float:
        return (self._activation_error(factors) + COHERENCE * self._weight_error(factors)) / self._output

    def _activation_error(self, factors: Float64) -> float:
        energy = self._energy * factors**2
        largest = float((self._statistics.max_abs / factors).max(initial=0.0))
        if largest == 0:
            return 0.0
        if self._statistics.histogram is None:
            scale = self._form.scale_of(largest)
            root = np.sqrt(self._statistics.mean_square) / factors
            return float(energy @ self._form.noise(root / scale)) * scale**2
        histogram = mixture(self._statistics, factors, energy)
        scale = self._form.scale_of(largest)
        used = np.flatnonzero(histogram)
        return expected_error(histogram[used], CENTERS[used], scale, self._form) / max(self._statistics.count, 1)

    def _weight_error(self, factors: Float64) -> float:
        power = self._statistics.variance / factors**2 * self._rest
        if self._form != INT8:  # a relative error, whatever the factors
            return float(self._energy @ self._statistics.variance) * 2.0**-8 / 12
        scales = (self._peaks * factors).max(axis=1) / self._form.limit
        return float(np.sum(scales**2) / 12 * power.sum())


def _peak(statistics: TensorStatistics, factors: Float64) -> float:
    root = float(np.sqrt(np.mean(statistics.mean_square / factors**2)))
    return float((statistics.max_abs / factors).max(initial=0.0)) / root if root else 0.0


def apply_to_arrays(arrays: Mapping[str, Float32], equalized: Iterable[EqualizedPair]) -> dict[str, Float32]:
    """The parameters that change, by name, float32; computed in FP64 and rounded once."""
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
    """Give the graph the changed weights, in place; how many changed."""
    constants = model.graph.initializers
    changed = apply_to_arrays(_Decoded(constants), equalized)
    for name, value in changed.items():
        constants[name].const_value = ir.Tensor(value, name=name)
    return len(changed)


class _Decoded(dict[str, Float32]):
    """Initializers as arrays, decoded when asked for."""

    def __init__(self, constants: Mapping[str, ir.Value]) -> None:
        super().__init__()
        self._constants = constants

    def __missing__(self, name: str) -> Float32:
        self[name] = tensor_of(self._constants[name]).numpy()
        return self[name]

"""Outliers that FP16 cannot hold, taken out of LayerNorm and value channels before a graph is typed.

A channel whose LayerNorm weight is thousands of times the others' makes numbers beyond FP16's limit, and with them the
whole layer would have to stay in FP32. Where such a channel is followed by a linear layer, the same exact exchange that
comes before eight bits (`equalize.py`) helps: the channel is divided until it is as large as the others, and the next
weights take the factor. Nothing is measured for it: how large a channel gets follows from the weights in front of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from spach_deploy.graph.edit import initializers
from spach_deploy.graph.precision.formats import HalfFormat
from spach_deploy.graph.precision.ranges import Ranges
from spach_deploy.quantization.equalization import (
    EqualizablePair,
    EqualizedPair,
    OutputChannels,
    apply_to_graph,
    find_pairs,
)
from spach_deploy.quantization.formats import Float32, Float64
from spach_deploy.quantization.sites import LayerKind, find_sites

ORDINARY = 16.0
"""Channels up to this many times the median are left as they are."""


def migrate_outliers(model: ModelProto, ranges: Ranges, form: HalfFormat, margin: float) -> tuple[str, ...]:
    """Equalize the pairs of the FP32 graph whose activation passes `form`'s limit, in place; names of those changed."""
    known = initializers(model.graph)
    floats = {name: tensor for name, tensor in known.items() if tensor.data_type == TensorProto.FLOAT}
    layers = [site for site in find_sites(model) if site.kind is not LayerKind.ATTENTION]
    loud = [
        pair
        for pair in find_pairs(layers, floats)
        if ranges.max_abs.get(pair.site.activation, 0.0) * margin > form.limit
    ]
    tamed = [_migrated(pair, [numpy_helper.to_array(floats[rows.parameter]) for rows in pair.divided]) for pair in loud]
    changed = [pair for pair in tamed if pair.alpha is not None]
    apply_to_graph(model, changed)
    return tuple(pair.name for pair in changed)


def _migrated(pair: EqualizablePair, parameters: Iterable[Float32]) -> EqualizedPair:
    sizes = _channel_sizes(pair.divided, list(parameters))
    median = float(np.median(sizes[sizes > 0])) if (sizes > 0).any() else 1.0
    factors = np.where(sizes > ORDINARY * median, sizes / median, 1.0)
    alpha = 1.0 if (factors != 1.0).any() else None
    return EqualizedPair(
        name=pair.name,
        site=pair.site.module,
        divided=pair.divided,
        weight=pair.site.weight,
        alpha=alpha,
        factors=() if alpha is None else tuple(float(2.0 ** np.round(np.log2(factor))) for factor in factors),
        error_before=0.0,
        error_after=0.0,
        range_before=float(sizes.max()) / median,
        range_after=float((sizes / factors).max()) / median,
    )


def _channel_sizes(divided: tuple[OutputChannels, ...], parameters: list[Float32]) -> Float64:
    """How large each channel may get, up to a common factor: the norm of its weights, and its bias."""
    channels = len(parameters[0]) // 3 if divided[0].values else len(parameters[0])
    squares = np.zeros(channels)
    for rows, parameter in zip(divided, parameters, strict=True):
        part = parameter[-channels:] if rows.values else parameter
        squares += np.square(part.astype(np.float64)).reshape(channels, -1).sum(axis=1)
    sizes: Float64 = np.sqrt(squares)
    return sizes

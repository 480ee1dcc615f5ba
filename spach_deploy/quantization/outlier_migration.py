"""Outlier migration: divide channels that FP16 cannot hold, and multiply the next layer's weights (pass, FP32 graph).

A channel whose LayerNorm weight is thousands of times the others' makes numbers beyond FP16's limit, and the whole
layer would have to stay in FP32. If a linear layer follows, equalization (`equalization.py`) avoids that: the channel
is divided until it is as large as the others, and the layer's column is multiplied. The factor follows from the weights
that scale the channel; no images are needed. It runs before the graph is typed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from spach_deploy.graph.editing import tensor_of
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
"""Channels up to this many times the median are not changed."""


@dataclasses.dataclass
class MigratedOutliers(ir.passes.PassResult):
    """The model, whether it was modified, and the names of the changed pairs."""

    pairs: tuple[str, ...]


class MigrateOutliers(ir.passes.InPlacePass):
    """Migrates outliers in every pair whose activation, by `ranges` times `margin`, is beyond the limit of `form`."""

    def __init__(self, ranges: Ranges, form: HalfFormat, margin: float) -> None:
        self._ranges, self._form, self._margin = ranges, form, margin

    def call(self, model: ir.Model) -> MigratedOutliers:
        """Change the weights of the FP32 graph `model`, in place."""
        constants = model.graph.initializers
        pairs = find_pairs(model, (site for site in find_sites(model) if site.kind is not LayerKind.ATTENTION))
        migrated = [
            _migrated(pair, [tensor_of(constants[rows.parameter]).numpy() for rows in pair.divided])
            for pair in pairs
            if self._exceeds_limit(pair)
        ]
        changed = [pair for pair in migrated if pair.alpha is not None]
        apply_to_graph(model, changed)
        return MigratedOutliers(model, bool(changed), tuple(pair.name for pair in changed))

    def _exceeds_limit(self, pair: EqualizablePair) -> bool:
        return self._ranges.max_abs.get(pair.site.activation, 0.0) * self._margin > self._form.limit


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
    """How large each channel may get, up to a common factor: the L2 norm of its weights and bias."""
    channels = len(parameters[0]) // 3 if divided[0].values else len(parameters[0])
    squares = np.zeros(channels)
    for rows, parameter in zip(divided, parameters, strict=True):
        part = parameter[-channels:] if rows.values else parameter
        squares += np.square(part.astype(np.float64)).reshape(channels, -1).sum(axis=1)
    sizes: Float64 = np.sqrt(squares)
    return sizes

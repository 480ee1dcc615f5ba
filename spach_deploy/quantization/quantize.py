"""Quantize an FP32 graph in memory: statistics -> quantization plan -> changed graph.

The pipeline calls the single functions; `quantize_graph` does all in one call:

    quantized = quantize_graph(graph, batches, Scaling(INT8, Method.MAX))
    onnx_ir.save(quantized.model, "model.onnx")
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from spach_deploy.bundle.outputs import INPUT
from spach_deploy.common.errors import ImageError, PrecisionError
from spach_deploy.graph.editing import mark_quantized, tensor_of
from spach_deploy.graph.precision.ranges import measure_ranges
from spach_deploy.graph.precision.typed_graph import type_graph
from spach_deploy.options.specs import Precision
from spach_deploy.quantization.equalization import (
    EqualizablePair,
    apply_to_arrays,
    apply_to_graph,
    find_pairs,
    search,
)
from spach_deploy.quantization.fake_quantization import CorrectBiases
from spach_deploy.quantization.formats import Float32
from spach_deploy.quantization.plan import QuantizationPlan, Scaling, make_plan
from spach_deploy.quantization.qdq import InsertQdq, audit
from spach_deploy.quantization.sites import FOLDED, REPEATED, Selection, Site, find_sites, is_weight
from spach_deploy.quantization.statistics import Collector, TensorRequest, TensorStatistics, wanted_tensors


@dataclasses.dataclass(frozen=True)
class QuantizableSites:
    """All sites of a graph. `reasons`: by node, why it stays in float; "" where it will be quantized."""

    sites: tuple[Site, ...]
    reasons: Mapping[str, str]

    @property
    def quantized(self) -> tuple[Site, ...]:
        """Sites that will be quantized."""
        return tuple(site for site in self.sites if not self.reasons[site.node])

    @property
    def wanted(self) -> tuple[TensorRequest, ...]:
        """The tensors that calibration measures, by channel wherever a site has channels."""
        chosen = self.quantized
        return wanted_tensors(chosen, [site.node for site in chosen if site.channel_axis is not None])


def candidates(
    model: ir.Model, selection: Selection, scaling: Scaling, layers: Collection[str] | None = None
) -> QuantizableSites:
    """Find the layers of the FP32 graph that can be, and that will be quantized. UsageError for patterns that match
    nothing. `layers`: paths of the only modules whose weights are known to be their own; None for all.
    """
    sites = find_sites(model)
    if layers is not None:
        runs = Counter((site.module, site.kind) for site in sites)
        sites = tuple(
            dataclasses.replace(site, unfit=REPEATED)
            if runs[site.module, site.kind] > 1
            else dataclasses.replace(site, unfit=FOLDED)
            if site.weight and site.module not in layers
            else site
            for site in sites
        )
    return QuantizableSites(sites, selection.chosen(sites, scaling.form))


def plan_from_statistics(
    model: ir.Model,
    chosen: QuantizableSites,
    statistics: Mapping[str, TensorStatistics],
    scaling: Scaling,
    *,
    equalize: bool = True,
) -> QuantizationPlan:
    """The plan for the FP32 graph `model`, which is not changed: equalization, scales, bias corrections.

    `statistics`: by tensor, of the tensors that `chosen.wanted` names.
    """
    weights = _weights(model, chosen.quantized)
    pairs = find_pairs(model, chosen.quantized) if equalize else ()
    equalized = search(pairs, statistics, weights, scaling.form)
    changed = apply_to_arrays(_all_floats(model, equalized_names(pairs)), equalized)
    weights |= _all_floats(model, {site.bias for site in chosen.quantized if site.bias})
    weights.update((name, value) for name, value in changed.items() if name in weights)
    return make_plan(chosen.sites, chosen.reasons, statistics, weights, equalized, scaling)


def equalized_names(pairs: Sequence[EqualizablePair]) -> set[str]:
    """Names of the parameters that equalizing the pairs may change."""
    names: set[str] = set()
    for pair in pairs:
        names.update(rows.parameter for rows in pair.divided)
        names.add(pair.site.weight)
    return names


def _weights(model: ir.Model, sites: Sequence[Site]) -> dict[str, Float32]:
    return _all_floats(model, {site.weight for site in sites if site.weight})


def _all_floats(model: ir.Model, names: set[str]) -> dict[str, Float32]:
    constants = model.graph.initializers
    return {name: tensor_of(constants[name]).numpy() for name in names if is_weight(constants[name])}


def equalize_graph(model: ir.Model, plan: QuantizationPlan) -> int:
    """Apply the plan's equalization to the FP32 graph, in place; returns how many weights changed."""
    return apply_to_graph(model, plan.equalized)


@dataclasses.dataclass(frozen=True)
class QuantizedGraph:
    """A typed graph with Q/DQ, and its plan."""

    model: ir.Model = dataclasses.field(repr=False)
    plan: QuantizationPlan


def quantize_graph(
    model: ir.Model,
    batches: Iterable[Float32],
    scaling: Scaling,
    selection: Selection | None = None,
    *,
    rest: Precision = Precision.FP16,
    equalize: bool = True,
) -> QuantizedGraph:
    """Quantize the FP32 graph `model`, which is not changed.

    `batches`: calibration images, float32 (n, 3, S, S) each, in the scale that the model takes; they are read twice
    where `rest` is a half precision, whose ranges are measured on the equalized graph. Raises ImageError when there are
    none, PrecisionError for numbers that are not finite.
    """
    images = list(batches)
    chosen = candidates(model, selection or Selection(), scaling)
    collector = Collector(model, chosen.wanted, histograms=scaling.method.needs_histograms)
    for batch in images:
        collector.run({INPUT: batch})
    if not collector.images:
        raise ImageError("No images were given to calibrate on.", "Give 64 or more.")
    plan = plan_from_statistics(model, chosen, collector.statistics, scaling, equalize=equalize)
    changed = model.clone()
    equalize_graph(changed, plan)
    feeds = ({INPUT: batch} for batch in images)
    ranges = measure_ranges(changed, feeds) if rest.is_half else None
    CorrectBiases(plan)(changed)
    typed = type_graph(changed, rest, ranges).model
    return QuantizedGraph(InsertQdq(plan)(typed).model, plan)


def mark_sites(model: ir.Model, plan: QuantizationPlan) -> None:
    """Mark the nodes that will be quantized, in place, so that passes leave them whole."""
    nodes = set(plan.product_nodes)
    for node in model.graph:
        if node.name in nodes:
            mark_quantized(node)


def quantize_typed(typed: ir.Model, plan: QuantizationPlan) -> ir.Model:
    """Insert Q/DQ into the typed graph, in place, and compare it with the plan. PrecisionError where they differ."""
    quantized = InsertQdq(plan)(typed).model
    findings = audit(quantized, plan)
    if findings:
        raise PrecisionError(f"The quantized graph is not what was planned: {findings[0]}.", "Report this.")
    return quantized

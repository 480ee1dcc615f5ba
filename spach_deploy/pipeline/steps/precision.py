"""Steps "measure ranges" and "set types": the typed graph, in the requested precision, from the FP32 graph.

Ranges of activations decide which nodes must stay in FP32. Quantized layers get their Q/DQ nodes here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from spach_deploy.bundle.inputs import feeds_of
from spach_deploy.bundle.schema import LevelEntry
from spach_deploy.common.batches import ranges
from spach_deploy.common.errors import MismatchError
from spach_deploy.common.progress import Phases
from spach_deploy.data.preprocess import to_input
from spach_deploy.data.readers import batches
from spach_deploy.graph.certificate import Certificate, certify
from spach_deploy.graph.opset import check_operators
from spach_deploy.graph.passes.tokens_first import part_weights
from spach_deploy.graph.precision.decision import PrecisionPolicy, TypingOptions
from spach_deploy.graph.precision.formats import LayerPrecision, half_format, infer_all_types, weighted_layers
from spach_deploy.graph.precision.ranges import RangeMeter, Ranges
from spach_deploy.graph.precision.typed_graph import type_graph
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.specs import ExportOptions, IODtype, Precision
from spach_deploy.pipeline.steps.graph import Fp32Graph, export_graph, prove_graph
from spach_deploy.pipeline.steps.images import GoldenImages, note_skipped
from spach_deploy.pipeline.steps.reference import EXACT_BATCHES, ReferenceOutputs
from spach_deploy.quantization.fake_quantization import CorrectBiases
from spach_deploy.quantization.outlier_migration import MigrateOutliers
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.quantization.plan import summary as quantized_summary
from spach_deploy.quantization.quantize import quantize_typed
from spach_deploy.quantization.spelt_quantize import spell_quantizers
from spach_deploy.runtime.onnxruntime_runner import save_model
from spach_deploy.validation.tolerance import check_equal

RANGE_IMAGES = 256
"""Ranges are measured on at most this many of the user's images, spread evenly over the set."""

RANGE_BATCH = 1
"""One image at a time is as fast as several, and takes the least memory."""


@dataclasses.dataclass(frozen=True)
class CertifiedGraph:
    """The typed graph, its precision policy and its certificate.

    `passes`: nodes that each pass changed. `errors`: relative L2 in FP32 by batch size, of the graph in its target's
    form and, where it was compared by itself, of the exported graph. `levels`: as in `Fp32Graph`.
    """

    model: ir.Model
    policy: PrecisionPolicy
    certificate: Certificate
    layers: tuple[LayerPrecision, ...]
    passes: dict[str, tuple[str, ...]]
    errors: dict[str, dict[int, float]]
    levels: dict[str, LevelEntry]

    def written(self, path: Path) -> CertifiedGraph:
        """Save the graph to `path`. Returns a copy that keeps only its inputs and outputs, to free the weights."""
        save_model(self.model, path)
        graph = self.model.graph
        inputs, outputs = (
            [ir.val(value.name, value.dtype, value.shape) for value in values]
            for values in (graph.inputs, graph.outputs)
        )
        interface = ir.Graph(inputs, outputs, nodes=(), opset_imports=dict(graph.opset_imports))
        return dataclasses.replace(self, model=ir.Model(interface, ir_version=self.model.ir_version))


@dataclasses.dataclass(frozen=True)
class MeasuredGraph:
    """The FP32 graph in its target's form, the ranges of its tensors, and its outputs by name for each batch of the
    golden images.
    """

    graph: Fp32Graph
    ranges: Ranges
    outputs: tuple[dict[str, NDArray[Any]], ...]


def measure_ranges(graph: Fp32Graph, images: GoldenImages, options: ExportOptions, phases: Phases) -> MeasuredGraph:
    """Measure ranges in FP32. Outlier channels that the half format could not hold are migrated, in place."""
    measured = _measured(graph, images, options, phases)
    if _migrated(graph.model, measured.ranges, options.rest, phases):
        measured = _measured(graph, images, options, phases)
    return measured


def set_types(
    measured: MeasuredGraph,
    static: nn.Module,
    loaded: LoadedModel,
    images: GoldenImages,
    reference: ReferenceOutputs,
    plan: QuantizationPlan | None,
    options: ExportOptions,
) -> CertifiedGraph:
    """Compare the FP32 graph with the reference, set types, and certify.

    With a plan, biases are corrected after that comparison, and Q/DQ nodes are inserted. MismatchError where the FP32
    graph differs from the reference, with the name of the first wrong step.
    """
    graph, model, rest = measured.graph, measured.graph.model, options.rest
    with _first_wrong_step(graph, static, images, reference):
        errors = _errors(measured.outputs, reference)
    if plan is not None:
        CorrectBiases(plan)(model)
    part_weights(model)
    typed = type_graph(model, rest, measured.ranges, TypingOptions(io_dtype=options.outputs.io_dtype))
    result, policy = typed.model, typed.policy
    if plan is not None:
        result = quantize_typed(result, plan)
        if options.is_for_rtx:
            spell_quantizers(result)
        policy = dataclasses.replace(policy, quantized=options.precision, quantized_summary=quantized_summary(plan))
    infer_all_types(result)
    check_operators(result)
    modules = {path for model in (loaded.model, static) for path, _ in model.named_modules(remove_duplicate=False)}
    if loaded.origin == "module":  # nodes made of an output are named after it, and its name is the user's
        modules |= {value.name or "" for value in result.graph.outputs}
    certificate = certify(result, modules, is_own=loaded.origin == "module")
    by_step = {"exported graph": graph.errors, "graph in its target's form": errors}
    return CertifiedGraph(result, policy, certificate, weighted_layers(result), graph.changed, by_step, graph.levels)


@contextlib.contextmanager
def _first_wrong_step(
    graph: Fp32Graph, static: nn.Module, images: GoldenImages, reference: ReferenceOutputs
) -> Iterator[None]:
    """Find the first wrong step where the block raises MismatchError for the graph in its target's form.

    If the exported graph was not compared by itself, that is done now; its own MismatchError then comes first.
    """
    try:
        yield
    except MismatchError:
        if not graph.errors:
            prove_graph(
                export_graph(static, images.preprocessing.image_size, images.preprocessing.channels), images, reference
            )
        raise


def _errors(outputs: Sequence[Mapping[str, NDArray[Any]]], reference: ReferenceOutputs) -> dict[int, float]:
    """The FP32 graph's relative L2 by batch size; MismatchError where that exceeds rounding."""
    expected, errors, start = reference.reference, dict[int, float](), 0
    for found in outputs:
        size = len(next(iter(found.values())))
        error = check_equal("graph in its target's form", found, expected.of(slice(start, start + size)))
        errors[size] = max(error, errors.get(size, 0.0))
        start += size
    return errors


def _measured(graph: Fp32Graph, images: GoldenImages, options: ExportOptions, phases: Phases) -> MeasuredGraph:
    is_half = options.rest.is_half
    meter = RangeMeter(graph.model, tensors=None if is_half else ())
    io_dtype = IODtype.UINT8 if options.outputs.io_dtype is IODtype.UINT8 else IODtype.FP32
    feeds = images.engine_input(io_dtype)
    outputs = tuple(meter.run(feeds_of(feeds[slice(*part)])) for part in _parts(len(feeds)))
    described = f"the {len(feeds)} built-in photographs"
    if not images.built_in and is_half:
        described = _measure_users_images(meter, images, io_dtype, phases)
    return MeasuredGraph(graph, meter.ranges(described), outputs)


def _parts(count: int) -> list[tuple[int, int]]:
    """Index ranges of the runs: two images, then one at a time, so that both batch sizes are compared."""
    first = min(max(EXACT_BATCHES), count)
    return [(0, first), *ranges(count, RANGE_BATCH, first)]


def _migrated(model: ir.Model, ranges: Ranges, rest: Precision, phases: Phases) -> tuple[str, ...]:
    """Migrate outlier channels that overflow the half format into the weights behind them, in place. Returns names."""
    form = half_format(rest)
    if form is None:
        return ()
    migrated = MigrateOutliers(ranges, form, TypingOptions().margin).call(model).pairs
    if migrated:
        names = f"{', '.join(migrated[:2])}{' and more' if len(migrated) > 2 else ''}"
        phases.note(f"Outlier channels that {rest.value} could not hold were equalized, exactly: {names}.")
    return migrated


def _measure_users_images(meter: RangeMeter, images: GoldenImages, io_dtype: IODtype, phases: Phases) -> str:
    """Measure ranges on more of the user's images, streamed. Returns a description of the images."""
    chosen = images.source.limit(RANGE_IMAGES)
    seen = 0
    named = frozenset(images.skipped)
    for batch in batches(chosen, images.preprocessing, RANGE_BATCH):
        meter.run(feeds_of(images.takes.of(to_input(batch.pixels, images.preprocessing, io_dtype), seen)))
        seen += len(batch)
    note_skipped([skipped for skipped in chosen.skipped if skipped not in named], phases)
    described = f"{seen} images{chosen.of_all(seen)} from {images.source.description}"
    phases.note(f"Ranges were measured on {described}.")
    return described

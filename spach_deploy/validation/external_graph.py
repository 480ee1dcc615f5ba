"""Validate a graph that did not come from an export (another exporter's, or edited) against what a bundle was made
from.

Names may be any: input and logits (without logits: the bundle's outputs) are found by shape, inner tensors by value
(`bisect`). The report says which tensor was taken for which, and what was not compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from msgspec import structs

from spach_deploy.bundle.inputs import image_of
from spach_deploy.bundle.outputs import INPUT, model_outputs
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import SpachError, UsageError
from spach_deploy.graph.editing import made_values, name_of
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.specs import BatchProfile, IODtype, Precision, Role
from spach_deploy.runtime.onnxruntime_runner import saved_graph
from spach_deploy.validation.bisect.locate import bisect_graph
from spach_deploy.validation.bisect.opened_graph import half_type
from spach_deploy.validation.bisect.tensor_matching import ProbedReference
from spach_deploy.validation.bundle_facts import BundleFacts, read_record
from spach_deploy.validation.live_reference import ImagesReference, Weights, as_images, rebuild
from spach_deploy.validation.result import ReportHeader, Validation
from spach_deploy.validation.runs import (
    EvaluationSet,
    RunResult,
    examine_graph,
    examine_typed,
    truncated_by,
    truncation_notes,
)
from spach_deploy.validation.tolerance import Bounds, derive_tolerances

Say = Callable[[str], None]

_PRECISIONS: dict[ir.DataType, Precision] = {ir.DataType.FLOAT16: Precision.FP16, ir.DataType.BFLOAT16: Precision.BF16}
_FLOATS: dict[ir.DataType, IODtype] = {
    ir.DataType.FLOAT: IODtype.FP32,
    ir.DataType.FLOAT16: IODtype.FP16,
    ir.DataType.UINT8: IODtype.UINT8,
}
_BISECTED_IMAGES = 2


@dataclasses.dataclass(frozen=True)
class MatchedGraph:
    """An external graph with its input and outputs renamed to ours. `outputs`: those that are compared, in its dtypes.
    `notes`: which names were taken for which.
    """

    graph: ir.Model
    precision: Precision
    io_dtype: IODtype
    batch: BatchProfile
    outputs: tuple[TensorInfo, ...]
    notes: tuple[str, ...]


def validate_external(
    header: ReportHeader, bundle: Bundle, facts: BundleFacts, reference: ImagesReference, weights: Weights, say: Say
) -> Validation:
    """Compare the graph at `header.target` with PyTorch, as a whole and module by module.

    Without the weights (the bundle is from a checkpoint that was not given) only as a whole, by the bundle's
    tolerances; a note says so. Raises UsageError where the graph's input or outputs cannot be found, and without the
    weights for a graph in another half precision than the bundle's: they would tell what that may cost.
    """
    graph = _read(Path(header.target))
    _check_quantization(graph, facts)
    matched = map_interface(graph, facts.outputs, facts.preprocessing.pixel_shape)
    eval_set = _graph_inputs(reference.eval_set, facts, matched)
    notes = truncation_notes(Path(header.target), matched.precision)
    matched = dataclasses.replace(matched, notes=(*matched.notes, *notes))
    header = dataclasses.replace(header, precision=matched.precision.value)
    try:
        say("Rebuilding the reference.")
        loaded = rebuild(bundle.manifest.model, weights, matched.outputs)
    except UsageError as error:
        if not (_has_bounds(facts, matched) or matched.precision is Precision.FP32):
            why = f"The graph is in {matched.precision.value}, and the bundle allows for {facts.precision.value} alone."
            raise UsageError(f"{why} {error.message}", error.hint) from error
        note = f"Not bisected by module: {error.message} {error.hint}"
        bounds = _of_compared(reference.tolerances.graph, matched)
        return Validation(header, eval_set, _evidence(matched, eval_set, bounds), notes=(*matched.notes, note))
    bounds = _bounds(loaded, eval_set, facts, reference, matched)
    validation = Validation(header, eval_set, _evidence(matched, eval_set, bounds), notes=matched.notes)
    say("Bisecting by module.")
    return _bisected(validation, matched, loaded, facts)


def _bisected(validation: Validation, matched: MatchedGraph, loaded: LoadedModel, facts: BundleFacts) -> Validation:
    inputs = image_of(validation.eval_set.inputs(0, _BISECTED_IMAGES))
    pixels = inputs.astype(np.uint8) if matched.io_dtype is IODtype.UINT8 else None
    images = image_of(as_images(inputs, matched.io_dtype, facts.preprocessing))
    try:
        made = facts.quantization  # a plan belongs to the static model that it was made of
        static = None if made is None else made.static_model(loaded.model)
        reference = ProbedReference(loaded.model, images, static=static, plan=read_record(facts), pixels=pixels)
        bisection = bisect_graph(matched.graph, reference)
    except SpachError as error:
        note = f"Not bisected by module: {error.message}"
        return dataclasses.replace(validation, notes=(*validation.notes, note))
    truncating = truncated_by(Path(validation.header.target), matched.precision)
    return dataclasses.replace(validation, bisection=dataclasses.replace(bisection, truncated_by=truncating))


def _read(path: Path) -> ir.Model:
    try:
        model = ir.from_proto(onnx.load(path))
        model.graph.sort()  # onnxruntime's converter to float16 appends its casts behind the nodes that read them
        return model
    except (ir.serde.SerdeError, ValueError) as error:
        raise UsageError(f"{path} is not a valid graph ({error.__cause__ or error}).", "Give another graph.") from error


def _check_quantization(graph: ir.Model, facts: BundleFacts) -> None:
    """A quantized graph needs a quantized bundle: its scales decide what is right."""
    if facts.quantization is None and _is_quantized(graph):
        raise UsageError(
            "The graph is quantized, and the bundle is not: what eight bits may cost is not known.",
            "Hold it to a bundle exported with --int8 or --fp8.",
        )


def _is_quantized(graph: ir.Model) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in graph.graph)


def _evidence(matched: MatchedGraph, eval_set: EvaluationSet, bounds: Bounds) -> tuple[RunResult, ...]:
    with saved_graph(matched.graph) as path:
        if matched.precision is Precision.FP32:
            return (examine_graph(path, eval_set, bounds, what="graph"),)
        return examine_typed(path, matched.precision, eval_set, bounds)


def _graph_inputs(eval_set: EvaluationSet, facts: BundleFacts, matched: MatchedGraph) -> EvaluationSet:
    """The images in the graph's input dtype, with the outputs that are compared."""
    if facts.io_dtype is IODtype.UINT8 or matched.io_dtype is not IODtype.UINT8:
        expected = {tensor.name: eval_set.expected[tensor.name] for tensor in matched.outputs}
        dtype = np.float16 if matched.io_dtype is IODtype.FP16 else np.float32

        def inputs(start: int, stop: int) -> npt.NDArray[np.generic]:
            given = image_of(eval_set.inputs(start, stop))
            if matched.io_dtype is IODtype.UINT8:
                return given
            return image_of(as_images(given, facts.io_dtype, facts.preprocessing)).astype(dtype)

        return dataclasses.replace(
            eval_set, inputs=inputs, expected=expected, outputs=matched.outputs, batch=matched.batch
        )
    raise UsageError(
        "The graph takes uint8 pixels, and the bundle's golden images are normalized already.",
        "Give a bundle exported with --io-dtype uint8.",
    )


def _bounds(
    loaded: LoadedModel, eval_set: EvaluationSet, facts: BundleFacts, reference: ImagesReference, matched: MatchedGraph
) -> Bounds:
    """The bundle's bounds where they are for such a graph, else bounds derived for its precision."""
    if _has_bounds(facts, matched):
        return _of_compared(reference.tolerances.graph, matched)
    count = len(eval_set)
    images = as_images(eval_set.inputs(0, count), matched.io_dtype, facts.preprocessing)
    return derive_tolerances(loaded.model, images, eval_set.expected, matched.precision, eval_set.outputs).graph


def _has_bounds(facts: BundleFacts, matched: MatchedGraph) -> bool:
    """Whether the bundle's bounds are for graphs like this one: quantized, or of its precision and types."""
    if facts.quantization is not None and _is_quantized(matched.graph):
        return True
    return facts.precision is matched.precision and facts.io_dtype is matched.io_dtype


def _of_compared(bounds: Bounds, matched: MatchedGraph) -> Bounds:
    return dataclasses.replace(bounds, outputs={tensor.name: bounds.outputs[tensor.name] for tensor in matched.outputs})


# Names and shapes


def map_interface(graph: ir.Model, outputs: Sequence[TensorInfo], pixel_shape: tuple[int, int, int]) -> MatchedGraph:
    """Rename the input of `graph` and those of its outputs that are compared, in place, to ours.

    `outputs` are the bundle's, `pixel_shape` (height, width, channels) its model's. Of a classifier the logits are
    compared. UsageError where the input or an output cannot be found.
    """
    inputs = [value for value in graph.graph.inputs if not value.is_initializer()]
    if len(inputs) != 1:
        raise UsageError(f"The graph has {len(inputs)} inputs; a classifier of images has one.", "Give another graph.")
    _check_image(inputs[0], pixel_shape)
    found = _outputs_of(graph, outputs)
    renamed = {INPUT: inputs[0], **found}
    before = {name: name_of(value) for name, value in renamed.items()}
    kept = [*found.values()]
    others = [name_of(value) for value in graph.graph.outputs if value not in kept]
    io_dtype = _FLOATS[_element(inputs[0])]
    floats = "float16" if io_dtype is IODtype.FP16 else "float32"
    batch = _batch(inputs[0])
    _rename(graph.graph, renamed)
    graph.graph.outputs.clear()
    graph.graph.outputs.extend(kept)
    for value in kept:
        value.shape = None
    half = half_type(graph)
    return MatchedGraph(
        graph=graph,
        precision=_PRECISIONS[half] if half is not None else Precision.FP32,
        io_dtype=io_dtype,
        batch=batch,
        outputs=tuple(structs.replace(tensor, dtype=floats) for tensor in outputs if tensor.name in found),
        notes=_notes(before, others),
    )


def _check_image(value: ir.Value, pixel_shape: tuple[int, int, int]) -> None:
    dims = _dims(value)
    if _element(value) not in _FLOATS:
        raise UsageError(f"The graph's input {value.name} holds no images: {_type(value)}.", "Give another graph.")
    height, width, channels = pixel_shape
    wanted = pixel_shape if _element(value) == ir.DataType.UINT8 else (channels, height, width)
    if len(dims) == 4 and all(have in (0, want) for have, want in zip(dims[1:], wanted, strict=True)):
        return
    raise UsageError(
        f"The graph takes {value.name} as {dims or 'a tensor of unknown shape'}; the bundle's images are"
        f" (N, {', '.join(map(str, wanted))}).",
        "Export it with that input, and normalized images.",
    )


def _outputs_of(graph: ir.Model, outputs: Sequence[TensorInfo]) -> dict[str, ir.Value]:
    """The graph's outputs by our names: of a classifier its logits, else every output that the model computes."""
    logits = [tensor for tensor in outputs if tensor.role is Role.LOGITS]
    found: dict[str, ir.Value] = {}
    for tensor in logits or model_outputs(outputs):
        found[tensor.name] = _output_like(graph, tensor, [*found.values()])
    return found


def _output_like(graph: ir.Model, tensor: TensorInfo, taken: Sequence[ir.Value]) -> ir.Value:
    """The float output of this shape that is not `taken`; one of its name is preferred."""
    wanted = tensor.shape[1:]

    def fits(value: ir.Value) -> bool:
        known = _dims(value)[1:] or [0] * len(wanted)
        is_float = _element(value) in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
        return is_float and len(known) == len(wanted) and all(a in (0, b) for a, b in zip(known, wanted, strict=True))

    fitting = [value for value in graph.graph.outputs if fits(value) and value not in taken]
    if fitting:
        return min(fitting, key=lambda value: value.name != tensor.name)
    shown = ", ".join(f"{value.name} {_type(value)}" for value in graph.graph.outputs)
    if tensor.role is Role.LOGITS:
        problem = f"No output of the graph holds {wanted[-1]} logits: {shown}."
    else:
        problem = f"No output of the graph is like {tensor.name}, (N, {', '.join(map(str, wanted))}): {shown}."
    raise UsageError(problem, "Give a graph of this model.")


def _element(value: ir.Value) -> ir.DataType:
    return ir.DataType.UNDEFINED if value.dtype is None else value.dtype


def _dims(value: ir.Value) -> list[int]:
    """Extents of a shape, 0 where unknown."""
    return [dim if isinstance(dim, int) else 0 for dim in value.shape or ()]


def _type(value: ir.Value) -> str:
    dims = [str(dim) if isinstance(dim, int) else dim.value or "?" for dim in value.shape or ()]
    return f"{_element(value).name.lower()} ({', '.join(dims)})"


def _batch(value: ir.Value) -> BatchProfile:
    fixed = _dims(value)[0]
    return BatchProfile(fixed, fixed, fixed) if fixed else BatchProfile()


def _rename(graph: ir.Graph, names: dict[str, ir.Value]) -> None:
    """Rename tensors in place; a tensor that already has one of the new names gets another."""
    for value in (*graph.inputs, *graph.initializers.values(), *made_values(graph)):
        if names.get(name_of(value), value) is not value:
            value.name = f"{value.name}/theirs"
    for name, value in names.items():
        value.name = name


def _notes(before: dict[str, str], others: list[str]) -> tuple[str, ...]:
    """`before`: the graph's names by ours."""
    renamed = [f"{old} was taken for {new}" for new, old in before.items() if old != new]
    notes = [f"{' and '.join(renamed)}, by shape."] if renamed else []
    if others:
        notes.append(f"Not compared: {', '.join(others)}.")
    return tuple(notes)

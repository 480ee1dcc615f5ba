"""Nodes for a graph's inputs and outputs: pixels become normalized floats, logits become probabilities and top-k.

--io-dtype uint8   input (B, H, W, C) uint8 pixels; scale, mean and standard deviation are in the graph
--softmax          output `probabilities` (B, classes) float32
--top-k K          outputs `top_values` (B, K) float32 and `top_indices` (B, K) int64, ranked by logit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from spach_deploy.bundle.outputs import INPUT
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.common.errors import UsageError
from spach_deploy.common.text import noun
from spach_deploy.graph.editing import NodeWriter, constant, mark_float32, name_of, new_node
from spach_deploy.graph.export import BATCH
from spach_deploy.options.specs import IODtype, OutputSpec, Preprocessing, Role


def add_interface(
    model: ir.Model,
    outputs: Sequence[TensorInfo],
    io_dtype: IODtype,
    preprocessing: Preprocessing,
    images: Sequence[str] = (INPUT,),
) -> None:
    """Add to the FP32 graph, in place, the nodes of those of `outputs` that follow from logits, and of uint8 pixels.

    `preprocessing` gives mean, standard deviation (of pixels in 0..1) and image size for uint8 pixels, `images` the
    inputs that are images.
    """
    if io_dtype is IODtype.UINT8:
        _take_pixels(model, preprocessing, images)
    by_role = {tensor.role: tensor for tensor in outputs}
    if Role.PROBABILITIES in by_role:
        _add_softmax(model, _logits(model, by_role), by_role[Role.PROBABILITIES])
    if Role.TOP_VALUES in by_role:
        _add_top_k(model, _logits(model, by_role), by_role[Role.TOP_VALUES], by_role[Role.TOP_INDICES])


def _logits(model: ir.Model, by_role: Mapping[Role | None, TensorInfo]) -> ir.Value:
    return next(value for value in model.graph.outputs if name_of(value) == by_role[Role.LOGITS].name)


def check_outputs(outputs: OutputSpec, classes: int) -> None:
    """UsageError for a top-k below 1 or above the number of classes, and for the softmax of one class."""
    k = outputs.top_k
    if k is not None and classes and not 1 <= k <= classes:
        raise UsageError(
            f"--top-k {k} of {classes} {noun(classes, 'class')} does not exist.", f"Give a number from 1 to {classes}."
        )
    if outputs.softmax and classes == 1:
        raise UsageError("--softmax: the softmax of one class is 1 for every image.", "Leave it out.")


def _take_pixels(model: ir.Model, preprocessing: Preprocessing, images: Sequence[str]) -> None:
    """Replace the graph's images by uint8 pixels: (B, H, W, C) -> (x - 255 mean) / (255 std) -> (B, C, H, W).

    The arithmetic is marked FP32, because half precision would round the normalized pixels.
    """
    graph = model.graph
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    offset = constant(graph, "io.offset", (255.0 * mean).astype(np.float32))
    scale = constant(graph, "io.scale", (1.0 / (255.0 * std)).astype(np.float32))
    for number, name in enumerate(images):
        index, label = [name_of(value) for value in graph.inputs].index(name), f"_{name}" if number else ""
        pixels = ir.val(name, ir.DataType.UINT8, [BATCH, *preprocessing.pixel_shape])
        writer = NodeWriter("io")
        floats = writer.add("Cast", f"float{label}", pixels, to=ir.DataType.FLOAT.value)
        centred = writer.add("Sub", f"centred{label}", floats, offset)
        scaled = writer.add("Mul", f"scaled{label}", centred, scale)
        mark_float32(*writer.nodes)
        normalized = writer.add("Transpose", f"normalized{label}", scaled, perm=[0, 3, 1, 2])
        graph.inputs[index].replace_all_uses_with(normalized)
        graph.inputs[index] = pixels
        graph[0].prepend(writer.nodes)


def _add_softmax(model: ir.Model, logits: ir.Value, probabilities: TensorInfo) -> None:
    node = new_node("Softmax", [logits], "io/Softmax", [probabilities.name], axis=-1)
    _add_output_node(model.graph, node, [(ir.DataType.FLOAT, probabilities)])


def _add_top_k(model: ir.Model, logits: ir.Value, values: TensorInfo, indices: TensorInfo) -> None:
    graph = model.graph
    k = values.shape[-1]
    assert k is not None
    inputs = [logits, constant(graph, "io.top_k", [k])]
    node = new_node("TopK", inputs, "io/TopK", [values.name, indices.name], axis=-1)
    _add_output_node(graph, node, [(ir.DataType.FLOAT, values), (ir.DataType.INT64, indices)])


def _add_output_node(graph: ir.Graph, node: ir.Node, outputs: list[tuple[ir.DataType, TensorInfo]]) -> None:
    """Append `node`, marked FP32; its outputs, (B, width) of the given types, become outputs of the graph."""
    mark_float32(node)
    graph.append(node)
    for value, (kind, tensor) in zip(node.outputs, outputs, strict=True):
        value.dtype, value.shape = kind, ir.Shape([BATCH, *tensor.shape[1:]])
        graph.outputs.append(value)

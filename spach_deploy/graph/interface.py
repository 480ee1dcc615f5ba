"""Nodes for a graph's inputs and outputs: pixels become normalized floats, logits become probabilities and top-k.

--io-dtype uint8   input (B, H, W, C) uint8 pixels; scale, mean and standard deviation are in the graph
--softmax          output `probabilities` (B, classes) float32
--top-k K          outputs `top_values` (B, K) float32 and `top_indices` (B, K) int64, ranked by logit
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from spach_deploy.common.errors import UsageError
from spach_deploy.graph.editing import NodeWriter, constant, mark_float32, new_node
from spach_deploy.graph.export import BATCH, INPUT
from spach_deploy.options.specs import IODtype, OutputSpec, Preprocessing

PROBABILITIES, TOP_VALUES, TOP_INDICES = "probabilities", "top_values", "top_indices"


def add_interface(model: ir.Model, outputs: OutputSpec, preprocessing: Preprocessing) -> None:
    """Add to the FP32 graph, in place, the nodes that `outputs` asks for.

    `preprocessing` gives mean, standard deviation (of pixels in 0..1) and image size for uint8 pixels. Raises
    UsageError for a top-k that the number of classes does not allow.
    """
    if outputs.io_dtype is IODtype.UINT8:
        _take_pixels(model, preprocessing)
    classes = _classes(model)
    check_outputs(outputs, classes)
    if outputs.softmax:
        _add_softmax(model, classes)
    if outputs.top_k is not None:
        _add_top_k(model, outputs.top_k)


def _classes(model: ir.Model) -> int:
    shape = model.graph.outputs[0].shape
    assert shape is not None
    return int(shape[1])  # type: ignore[arg-type]


def check_outputs(outputs: OutputSpec, classes: int) -> None:
    """UsageError for a top-k below 1 or above the number of classes."""
    k = outputs.top_k
    if k is not None and not 1 <= k <= classes:
        raise UsageError(f"--top-k {k} of {classes} classes does not exist.", f"Give a number from 1 to {classes}.")


def _take_pixels(model: ir.Model, preprocessing: Preprocessing) -> None:
    """Replace the graph's input by uint8 pixels: (B, H, W, C) -> (x - 255 mean) / (255 std) -> (B, C, H, W).

    The arithmetic is marked FP32, because half precision would round the normalized pixels.
    """
    graph = model.graph
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    offset = constant(graph, "io.offset", (255.0 * mean).astype(np.float32))
    scale = constant(graph, "io.scale", (1.0 / (255.0 * std)).astype(np.float32))
    pixels = ir.val(INPUT, ir.DataType.UINT8, [BATCH, *preprocessing.pixel_shape])
    writer = NodeWriter("io")
    centred = writer.add("Sub", "centred", writer.add("Cast", "float", pixels, to=ir.DataType.FLOAT.value), offset)
    scaled = writer.add("Mul", "scaled", centred, scale)
    mark_float32(*writer.nodes)
    normalized = writer.add("Transpose", "normalized", scaled, perm=[0, 3, 1, 2])
    graph.inputs[0].replace_all_uses_with(normalized)
    graph.inputs[0] = pixels
    graph[0].prepend(writer.nodes)


def _add_softmax(model: ir.Model, classes: int) -> None:
    node = new_node("Softmax", [model.graph.outputs[0]], "io/Softmax", [PROBABILITIES], axis=-1)
    _add_output_node(model.graph, node, [(ir.DataType.FLOAT, classes)])


def _add_top_k(model: ir.Model, k: int) -> None:
    graph = model.graph
    inputs = [graph.outputs[0], constant(graph, "io.top_k", [k])]
    node = new_node("TopK", inputs, "io/TopK", [TOP_VALUES, TOP_INDICES], axis=-1)
    _add_output_node(graph, node, [(ir.DataType.FLOAT, k), (ir.DataType.INT64, k)])


def _add_output_node(graph: ir.Graph, node: ir.Node, outputs: list[tuple[ir.DataType, int]]) -> None:
    """Append `node`, marked FP32; its outputs, (B, width) of the given types, become outputs of the graph."""
    mark_float32(node)
    graph.append(node)
    for value, (kind, width) in zip(node.outputs, outputs, strict=True):
        value.dtype, value.shape = kind, ir.Shape([BATCH, width])
        graph.outputs.append(value)

"""Depthwise 3x3 convolutions as nine shifted products over (B, H, W, C).

    conv(x)[h, w] = bias + sum over i, j in 0..2 of weight[:, i, j] * pad(x)[h + i, w + j]

To a TensorRT compiler Pad, Slice, Mul and Add are pointwise work: the residual add before them, the whole depthwise
convolution and the LayerNorm behind it become one kernel, where a convolution is a kernel of its own between two layout
changes. Slices, products and sums are marked to stay in FP32: that is registers, while the padded tensor is memory.
The transposes around the convolution disappear. On a CPU a convolution is faster, so this pass is for TensorRT
targets only.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from spach_deploy.graph.edit import (
    attributes,
    constant,
    consumers,
    initializers,
    is_marked_quantized,
    mark_float32,
    producers,
    remove_unused_initializers,
    replace_nodes,
)
from spach_deploy.graph.passes.block_boundaries import TO_CHANNELS_FIRST, TO_CHANNELS_LAST, is_transpose

NAME = "shift_depthwise"


def is_depthwise_3x3(node: NodeProto, weight_shape: tuple[int, ...]) -> bool:
    """Whether `node` is a depthwise 3x3 convolution of stride 1 and padding 1."""
    options = attributes(node)
    return (
        weight_shape[1:] == (1, 3, 3)
        and options.get("group") == weight_shape[0]
        and options.get("pads") == [1, 1, 1, 1]
        and options.get("strides", [1, 1]) == [1, 1]
        and options.get("dilations", [1, 1]) == [1, 1]
    )


def shift_depthwise(model: ModelProto) -> tuple[str, ...]:
    """Rewrite every depthwise Conv behind which channels go last, in place; names of the changed nodes."""
    graph = model.graph
    read, weights = consumers(graph), initializers(graph)
    position = {node.name: index for index, node in enumerate(graph.node)}
    replacement: dict[int, list[NodeProto]] = {}
    for node in list(graph.node):
        if node.op_type != "Conv" or not is_depthwise_3x3(node, tuple(weights[node.input[1]].dims)):
            continue
        if is_marked_quantized(node):  # a quantized convolution has to stay one
            continue
        after = read[node.output[0]]
        if [is_transpose(reader, TO_CHANNELS_LAST) for reader in after] != [True]:
            continue
        source, layout_change = _channels_last(graph, node)
        products = _shifted_products(graph, node, source, after[0].output[0])
        replacement[position[node.name]] = layout_change + products
        replacement[position[after[0].name]] = []
    replace_nodes(graph, replacement)
    _remove_dead_transposes(graph)
    remove_unused_initializers(graph)
    return tuple(graph_name for graph_name, index in position.items() if replacement.get(index))


def _channels_last(graph: GraphProto, conv: NodeProto) -> tuple[str, list[NodeProto]]:
    """The convolution's input as (B, H, W, C), and the nodes that make it."""
    before = producers(graph).get(conv.input[0])
    if before is not None and is_transpose(before, TO_CHANNELS_FIRST):
        return before.input[0], []
    name = f"{conv.name}/channels_last"
    return name, [helper.make_node("Transpose", [conv.input[0]], [name], name=name, perm=TO_CHANNELS_LAST)]


def _remove_dead_transposes(graph: GraphProto) -> None:
    read = consumers(graph)
    outputs = {output.name for output in graph.output}
    dead = {
        index: list[NodeProto]()
        for index, node in enumerate(graph.node)
        if node.op_type == "Transpose" and not read.get(node.output[0]) and node.output[0] not in outputs
    }
    replace_nodes(graph, dead)


def _shifted_products(graph: GraphProto, conv: NodeProto, source: str, target: str) -> list[NodeProto]:
    """Nodes that compute `target` (B, H, W, C) from `source` (B, H, W, C)."""
    name = conv.name
    weights = initializers(graph)
    kernel = numpy_helper.to_array(weights[conv.input[1]])[:, 0]  # (C, 3, 3)
    stem = conv.input[1].removesuffix(".weight")
    _shared_constants(graph)
    nodes = [_node("Pad", [source, "shift.pads"], f"{name}/pad")]
    total = ""
    for i in range(3):
        for j in range(3):
            tap = f"{stem}.tap_{i}{j}"
            graph.initializer.append(constant(tap, kernel[:, i, j]))
            nodes.append(
                _node(
                    "Slice",
                    [f"{name}/pad", f"shift.start_{i}{j}", f"shift.end_{i}{j}", "shift.axes"],
                    f"{name}/slice_{i}{j}",
                )
            )
            nodes.append(_node("Mul", [f"{name}/slice_{i}{j}", tap], f"{name}/product_{i}{j}"))
            if total:
                nodes.append(_node("Add", [total, f"{name}/product_{i}{j}"], f"{name}/sum_{i}{j}"))
            total = nodes[-1].output[0]
    if len(conv.input) > 2:
        nodes.append(_node("Add", [total, conv.input[2]], f"{name}/bias"))
    nodes[-1].output[0] = target
    return [nodes[0], *(mark_float32(node) for node in nodes[1:])]


def _node(op_type: str, inputs: list[str], name: str) -> NodeProto:
    return helper.make_node(op_type, inputs, [name], name=name)


def _shared_constants(graph: GraphProto) -> None:
    """Pads, slice bounds and axes, once for all convolutions. Ends are relative, so every grid shares them."""
    if "shift.pads" in initializers(graph):
        return
    graph.initializer.append(constant("shift.pads", np.array([0, 1, 1, 0, 0, 1, 1, 0], np.int64)))
    graph.initializer.append(constant("shift.axes", np.array([1, 2], np.int64)))
    last = {0: -2, 1: -1, 2: np.iinfo(np.int64).max}
    for i in range(3):
        for j in range(3):
            graph.initializer.append(constant(f"shift.start_{i}{j}", np.array([i, j], np.int64)))
            graph.initializer.append(constant(f"shift.end_{i}{j}", np.array([last[i], last[j]], np.int64)))

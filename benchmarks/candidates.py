"""Forms that spach-export does not use, each exact: tried beside its own by `benchmarks.forms`.

Each works in place on a graph with all our passes and returns how many places it changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from spach_deploy.graph.edit import (
    attributes,
    constant,
    consumers,
    initializers,
    mark_float32,
    producers,
    replace_nodes,
    shapes_at_batch_one,
)
from spach_deploy.graph.passes.block_boundaries import TO_CHANNELS_LAST, is_transpose

_TO_CHANNELS_FIRST = [0, 3, 1, 2]


def spell_out_layer_norm(model: ModelProto) -> int:
    """LayerNormalization as means, differences and products, which stay in FP32."""
    graph = model.graph
    found = {index: node for index, node in enumerate(graph.node) if node.op_type == "LayerNormalization"}
    graph.initializer.append(constant("layer_norm.axis", np.array([-1], np.int64)))
    for node in found.values():
        epsilon = np.array([attributes(node).get("epsilon", 1e-5)], np.float32)
        graph.initializer.append(constant(f"{node.name}.epsilon", epsilon))
    replace_nodes(graph, {index: _spelt_out(node) for index, node in found.items()})
    return len(found)


def _spelt_out(node: NodeProto) -> list[NodeProto]:
    nodes: list[NodeProto] = []

    def add(op_type: str, label: str, *inputs: str, **options: Any) -> str:
        output = f"{node.name}/{label}"
        nodes.append(mark_float32(helper.make_node(op_type, list(inputs), [output], name=output, **options)))
        return output

    x, weight, bias = node.input
    centred = add("Sub", "centred", x, add("ReduceMean", "mean", x, "layer_norm.axis", keepdims=1))
    squares = add("Mul", "squares", centred, centred)
    variance = add("ReduceMean", "variance", squares, "layer_norm.axis", keepdims=1)
    deviation = add("Sqrt", "deviation", add("Add", "variance_eps", variance, f"{node.name}.epsilon"))
    scaled = add("Mul", "scaled", add("Div", "normalized", centred, deviation), weight)
    add("Add", "shifted", scaled, bias)
    nodes[-1].output[0] = node.output[0]
    return nodes


def take_squares_in_one_pass(model: ModelProto) -> int:
    """GroupNorm's statistics of a token from its values and their squares, so that neither waits for the other."""
    changed = 0
    for node in model.graph.node:
        name, _, label = node.name.rpartition("/")
        if label == "token_squares":
            node.input[:] = [f"{name}/rows"] * 2
            changed += 1
        elif label == "token_power":  # variance + mean^2 is the mean of the squares
            node.op_type, node.input[:] = "Identity", node.input[:1]
    _remove_unused(model.graph)
    return changed


def stem_as_gemm(model: ModelProto) -> int:
    """The stem's convolution over patches as a matrix product."""
    return _patches_as_gemm(model, lambda source: not is_transpose(source, _TO_CHANNELS_FIRST))


def downsampling_as_gemm(model: ModelProto) -> int:
    """The downsampling's convolutions over patches as matrix products, from channels last to channels last."""
    return _patches_as_gemm(model, lambda source: is_transpose(source, _TO_CHANNELS_FIRST))


def _patches_as_gemm(model: ModelProto, is_wanted: Callable[[NodeProto], bool]) -> int:
    graph = model.graph
    made, read = producers(graph), consumers(graph)
    position = {node.name: index for index, node in enumerate(graph.node)}
    shapes = shapes_at_batch_one(model)
    replacement: dict[int, list[NodeProto]] = {}
    for node in list(graph.node):
        source = made.get(node.input[0], NodeProto()) if node.op_type == "Conv" else NodeProto()
        follower = read[node.output[0]][0] if node.op_type == "Conv" else NodeProto()
        if not _is_of_patches(node) or not is_wanted(source) or not is_transpose(follower, TO_CHANNELS_LAST):
            continue
        replacement[position[node.name]] = _gemm(graph, node, source, follower, shapes[node.input[0]])
        replacement[position[follower.name]] = []
    replace_nodes(graph, replacement)
    _remove_unused(graph)
    return len(replacement) // 2


def _is_of_patches(node: NodeProto) -> bool:
    """Whether it is a convolution whose windows do not overlap, without groups and margins."""
    if node.op_type != "Conv":
        return False
    options: dict[str, Any] = {"group": 1, "pads": [0], **attributes(node)}
    return options["group"] == 1 and not any(options["pads"]) and options["strides"] == options["kernel_shape"]


def _gemm(
    graph: GraphProto, node: NodeProto, source: NodeProto, follower: NodeProto, shape: tuple[int, ...]
) -> list[NodeProto]:
    """Nodes from the image, (B, C, H, W) or (B, H, W, C) where a transpose made the former of it, to (B, H, W, C)."""
    name = node.name
    weight = numpy_helper.to_array(initializers(graph)[node.input[1]])
    out, channels, height, width = weight.shape
    rows, columns = shape[2] // height, shape[3] // width
    is_last = is_transpose(source, _TO_CHANNELS_FIRST)
    if is_last:
        patches, order = [-1, rows, height, columns, width, channels], [0, 1, 3, 2, 4, 5]
        matrix = weight.transpose(0, 2, 3, 1)
    else:
        patches, order = [-1, channels, rows, height, columns, width], [0, 2, 4, 1, 3, 5]
        matrix = weight
    of = {"patches": patches, "rows": [-1, channels * height * width], "grid": [-1, rows, columns, out]}
    graph.initializer.extend(constant(f"{name}.{label}", np.array(value, np.int64)) for label, value in of.items())
    graph.initializer.append(constant(f"{name}.matrix", np.ascontiguousarray(matrix.reshape(out, -1))))
    image = source.input[0] if is_last else node.input[0]
    return [
        helper.make_node("Reshape", [image, f"{name}.patches"], [f"{name}/patches"], name=f"{name}/patches"),
        helper.make_node("Transpose", [f"{name}/patches"], [f"{name}/moved"], name=f"{name}/moved", perm=order),
        helper.make_node("Reshape", [f"{name}/moved", f"{name}.rows"], [f"{name}/rows"], name=f"{name}/rows"),
        helper.make_node(
            "Gemm", [f"{name}/rows", f"{name}.matrix", *node.input[2:]], [f"{name}/product"], name=name, transB=1
        ),
        helper.make_node("Reshape", [f"{name}/product", f"{name}.grid"], list(follower.output), name=f"{name}/grid"),
    ]


def _remove_unused(graph: GraphProto) -> None:
    """Nodes that nothing reads, until there are none."""
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        unused = [node for node in graph.node if read.isdisjoint(node.output)]
        if not unused:
            return
        for node in unused:
            graph.node.remove(node)


CANDIDATES: dict[str, Callable[[ModelProto], int]] = {
    "LayerNorm spelt out": spell_out_layer_norm,
    "GroupNorm's squares in one pass": take_squares_in_one_pass,
    "stem as GEMM": stem_as_gemm,
    "downsampling as GEMM": downsampling_as_gemm,
}

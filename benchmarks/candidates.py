"""Forms that spach-export does not use, each exact: tried beside its own by `benchmarks.forms`.

Each works in place on a graph with all our passes and returns how many places it changed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from spach_deploy.graph.editing import (
    NodeWriter,
    constant,
    is_read,
    is_transpose,
    mark_float32,
    name_of,
    new_node,
    operand,
    replace_nodes,
    shapes_at_batch_one,
    tensor_of,
)
from spach_deploy.graph.passes.block_boundaries import TO_CHANNELS_FIRST, TO_CHANNELS_LAST


def spell_out_layer_norm(model: ir.Model) -> int:
    """LayerNormalization as means, differences and products, which stay in FP32."""
    graph = model.graph
    found = [node for node in graph if node.op_type == "LayerNormalization"]
    for node in found:
        replace_nodes([node], _spelt_out(graph, node))
    return len(found)


def _spelt_out(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    axis = constant(graph, "layer_norm.axis", [-1])
    epsilon = np.array([node.attributes.get_float("epsilon", 1e-5)], np.float32)
    x, weight, bias = node.inputs
    writer = NodeWriter(name_of(node))
    add = writer.add
    centred = add("Sub", "centred", x, add("ReduceMean", "mean", x, axis, keepdims=1))
    squares = add("Mul", "squares", centred, centred)
    variance = add("ReduceMean", "variance", squares, axis, keepdims=1)
    moved = add("Add", "variance_eps", variance, constant(graph, f"{node.name}.epsilon", epsilon))
    normalized = add("Div", "normalized", centred, add("Sqrt", "deviation", moved))
    add("Add", "shifted", add("Mul", "scaled", normalized, weight), bias)
    mark_float32(*writer.nodes)
    return writer.nodes


def take_squares_in_one_pass(model: ir.Model) -> int:
    """GroupNorm's statistics of a token from its values and their squares, so that neither waits for the other."""
    by_name = {node.name: node for node in model.graph}
    found = [node for node in model.graph if name_of(node).endswith("/token_squares")]
    for node in found:
        path = name_of(node).rpartition("/")[0]
        for slot in (0, 1):
            node.replace_input_with(slot, by_name[f"{path}/rows"].outputs[0])
        power = by_name[f"{path}/token_power"]  # variance + mean^2 is the mean of the squares
        power.op_type = "Identity"
        power.resize_inputs(1)
    _remove_unused(model.graph)
    return len(found)


def stem_as_gemm(model: ir.Model) -> int:
    """The stem's convolution over patches as a matrix product."""
    return _patches_as_gemm(model, lambda source: not is_transpose(source, TO_CHANNELS_FIRST))


def downsampling_as_gemm(model: ir.Model) -> int:
    """The downsampling's convolutions over patches as matrix products, from channels last to channels last."""
    return _patches_as_gemm(model, lambda source: is_transpose(source, TO_CHANNELS_FIRST))


def _patches_as_gemm(model: ir.Model, is_wanted: Callable[[ir.Node | None], bool]) -> int:
    graph, shapes = model.graph, shapes_at_batch_one(model)
    changed = 0
    for node in [node for node in graph if _is_of_patches(node)]:
        image, follower = node.inputs[0], node.outputs[0].consumers()[0]
        if image is not None and is_wanted(image.producer()) and is_transpose(follower, TO_CHANNELS_LAST):
            replace_nodes([node, follower], _gemm(graph, node, image, shapes[name_of(image)]))
            changed += 1
    _remove_unused(graph)
    return changed


def _is_of_patches(node: ir.Node) -> bool:
    """Whether it is a convolution whose windows do not overlap, without groups and margins."""
    if node.op_type != "Conv":
        return False
    of = node.attributes
    is_plain = of.get_int("group", 1) == 1 and not any(of.get_ints("pads", (0,)))
    return is_plain and of.get_ints("strides") == of.get_ints("kernel_shape")


def _gemm(graph: ir.Graph, node: ir.Node, image: ir.Value, shape: tuple[int, ...]) -> list[ir.Node]:
    """Nodes from the image, (B, C, H, W) or (B, H, W, C) where a transpose made the former of it, to (B, H, W, C)."""
    name, source = name_of(node), image.producer()
    weight = tensor_of(operand(node, 1)).numpy()
    out, channels, height, width = weight.shape
    rows, columns = shape[2] // height, shape[3] // width
    if source is not None and is_transpose(source, TO_CHANNELS_FIRST):
        patches, order = [-1, rows, height, columns, width, channels], [0, 1, 3, 2, 4, 5]
        matrix, x = weight.transpose(0, 2, 3, 1), source.inputs[0]
    else:
        patches, order = [-1, channels, rows, height, columns, width], [0, 2, 4, 1, 3, 5]
        matrix, x = weight, image
    of = {"patches": patches, "rows": [-1, channels * height * width], "grid": [-1, rows, columns, out]}
    to = {label: constant(graph, f"{name}.{label}", value) for label, value in of.items()}
    writer = NodeWriter(name)
    moved = writer.add("Transpose", "moved", writer.add("Reshape", "patches", x, to["patches"]), perm=order)
    flat = writer.add("Reshape", "rows", moved, to["rows"])
    operands = [flat, constant(graph, f"{name}.matrix", matrix.reshape(out, -1)), *node.inputs[2:]]
    product = new_node("Gemm", operands, name, [f"{name}/product"], transB=1)
    grid = new_node("Reshape", [product.outputs[0], to["grid"]], f"{name}/grid")
    return [*writer.nodes, product, grid]


def _remove_unused(graph: ir.Graph) -> None:
    """Nodes that nothing reads; whoever made what they read comes after them, from behind."""
    for node in reversed(list(graph)):
        if not any(is_read(value) for value in node.outputs):
            graph.remove(node, safe=True)


CANDIDATES: dict[str, Callable[[ir.Model], int]] = {
    "LayerNorm spelt out": spell_out_layer_norm,
    "GroupNorm's squares in one pass": take_squares_in_one_pass,
    "stem as GEMM": stem_as_gemm,
    "downsampling as GEMM": downsampling_as_gemm,
}

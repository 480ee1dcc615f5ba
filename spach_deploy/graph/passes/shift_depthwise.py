"""Write depthwise 3x3 convolutions as sums of nine shifted products over (B, H, W, C), for TensorRT.

    conv(x)[h, w] = bias + sum over i, j in 0..2 of weight[:, i, j] * pad(x)[h + i, w + j]

TensorRT fuses Pad, Slice, Mul and Add as pointwise operators: the residual addition before the convolution, the
convolution and the LayerNorm after it become one kernel. A Conv is a kernel of its own between two changes of layout;
its transposes disappear here. Slices, products and sums are marked to stay in FP32, which costs nothing because they
are kept in registers; the padded tensor is stored, so it is not marked. On a CPU a Conv is faster.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from spach_deploy.graph.editing import (
    NodeWriter,
    constant,
    is_marked_quantized,
    is_read,
    is_transpose,
    mark_float32,
    name_of,
    operand,
    remove_unused_initializers,
    replace_nodes,
    tensor_of,
)
from spach_deploy.graph.passes.block_boundaries import TO_CHANNELS_FIRST, TO_CHANNELS_LAST

NAME = "shift_depthwise"


def shift_depthwise(model: ir.Model) -> tuple[str, ...]:
    """Rewrite every depthwise Conv that a transpose to channels-last follows, in place; names of the changed nodes."""
    changed = [node for node in model.graph if _is_candidate(node)]
    for conv in changed:
        _take_apart(model.graph, conv)
    remove_unused_initializers(model.graph)
    return tuple(name_of(conv) for conv in changed)


def _is_candidate(node: ir.Node) -> bool:
    """Whether `node` is a depthwise convolution whose only reader transposes to channels-last, and is not quantized."""
    if not is_depthwise_3x3(node) or is_marked_quantized(node):
        return False
    return [is_transpose(reader, TO_CHANNELS_LAST) for reader in node.outputs[0].consumers()] == [True]


def is_depthwise_3x3(node: ir.Node) -> bool:
    """Whether `node` is a depthwise 3x3 convolution of stride 1 and padding 1."""
    weight = node.inputs[1].const_value if node.op_type == "Conv" and node.inputs[1] is not None else None
    if weight is None:
        return False
    options, (channels, *kernel) = node.attributes, weight.shape.numpy()
    return (
        kernel == [1, 3, 3]
        and options.get_int("group") == channels
        and [*options.get_ints("pads", ())] == [1, 1, 1, 1]
        and [*options.get_ints("strides", (1, 1))] == [1, 1]
        and [*options.get_ints("dilations", (1, 1))] == [1, 1]
    )


def _take_apart(graph: ir.Graph, conv: ir.Node) -> None:
    (after,) = conv.outputs[0].consumers()
    source = operand(conv, 0)
    before, writer = source.producer(), NodeWriter(name_of(conv))
    if before is not None and is_transpose(before, TO_CHANNELS_FIRST):
        x = before.inputs[0]
    else:
        x = writer.add("Transpose", "channels_last", source, perm=TO_CHANNELS_LAST)
    mark_float32(*_add_products(graph, conv, x, writer))
    replace_nodes([conv, after], writer.nodes)
    if before is not None and before.op_type == "Transpose" and not is_read(source):
        graph.remove(before, safe=True)


def _add_products(graph: ir.Graph, conv: ir.Node, x: ir.Value | None, writer: NodeWriter) -> list[ir.Node]:
    """Write the convolution of `x`, both (B, H, W, C), with `writer`; returns the new nodes but the Pad."""
    weight, add = operand(conv, 1), writer.add
    stem, kernel = name_of(weight).removesuffix(".weight"), tensor_of(weight).numpy()[:, 0]  # (C, 3, 3)
    shared = _shared_constants(graph)
    padded, total = add("Pad", "pad", x, shared["pads"]), None
    first = len(writer.nodes)
    for i, j in TAPS:
        tap = constant(graph, f"{stem}.tap_{i}{j}", kernel[:, i, j])
        bounds = (shared[f"start_{i}{j}"], shared[f"end_{i}{j}"], shared["axes"])
        product = add("Mul", f"product_{i}{j}", add("Slice", f"slice_{i}{j}", padded, *bounds), tap)
        total = product if total is None else add("Add", f"sum_{i}{j}", total, product)
    if len(conv.inputs) > 2:
        add("Add", "bias", total, conv.inputs[2])
    return writer.nodes[first:]


TAPS = tuple((i, j) for i in range(3) for j in range(3))
"""(row, column) of a 3x3 kernel's weights, row by row."""


def _shared_constants(graph: ir.Graph) -> dict[str, ir.Value]:
    """Initializers by label that all convolutions share: pads, bounds of slices, axes.

    Ends of slices count from the end of the axis, so they fit every image size.
    """
    values = {"pads": [0, 1, 1, 0, 0, 1, 1, 0], "axes": [1, 2]}
    last = {0: -2, 1: -1, 2: np.iinfo(np.int64).max}
    for i, j in TAPS:
        values |= {f"start_{i}{j}": [i, j], f"end_{i}{j}": [last[i], last[j]]}
    return {label: constant(graph, f"shift.{label}", value) for label, value in values.items()}

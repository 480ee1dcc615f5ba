"""Write depthwise 3x3 convolutions as sums of nine shifted products over (B, H, W, C), for TensorRT.

    conv(x)[h, w] = bias + sum over i, j in 0..2 of weight[:, i, j] * pad(x)[h + i, w + j]

TensorRT fuses Pad, Slice, Mul and Add as pointwise operators: the residual addition before the convolution, the
convolution and the LayerNorm after it become one kernel. A Conv is a kernel of its own between two changes of layout;
its transposes disappear here. Slices, products and sums are marked to stay in FP32, which costs nothing because they
are kept in registers; the padded tensor is stored, so it is not marked. On a CPU a Conv is faster, so `join_depthwise`
takes it back.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.graph.editing import (
    NodeWriter,
    array_of,
    constant,
    ints_of,
    is_marked_quantized,
    is_read,
    is_transpose,
    mark_float32,
    name_of,
    new_node,
    operand,
    owner,
    remove_unused_initializers,
    replace_nodes,
    tensor_of,
    unused_name,
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


_PADS = [0, 1, 1, 0, 0, 1, 1, 0]
_ENDS = (-2, -1, np.iinfo(np.int64).max)


def _shared_constants(graph: ir.Graph) -> dict[str, ir.Value]:
    """Initializers by label that all convolutions share: pads, bounds of slices, axes.

    Ends of slices count from the end of the axis, so they fit every image size.
    """
    values = {"pads": _PADS, "axes": [1, 2]}
    for i, j in TAPS:
        values |= {f"start_{i}{j}": [i, j], f"end_{i}{j}": [_ENDS[i], _ENDS[j]]}
    return {label: constant(graph, f"shift.{label}", value) for label, value in values.items()}


def join_depthwise(model: ir.Model) -> tuple[str, ...]:
    """Write sums of nine shifted products as depthwise Conv again, in place; names of the convolutions.

    The kernel is the products' own weights, so nothing is rounded. A sum that is not exactly what `shift_depthwise`
    writes stays.
    """
    joined: list[str] = []
    for pad in [node for node in model.graph if node.op_type == "Pad"]:
        shifted = _shifted(pad)
        if shifted is not None:
            joined.append(_join(model.graph, pad, shifted))
    remove_unused_initializers(model.graph)
    return tuple(joined)


@dataclasses.dataclass(frozen=True)
class _Shifted:
    """The nodes between a Pad and the sum of nine products, `kernel` (C, 1, 3, 3), and a `bias` (C,) or None."""

    nodes: tuple[ir.Node, ...]
    kernel: NDArray[np.float32]
    bias: ir.Value | None


def _shifted(pad: ir.Node) -> _Shifted | None:
    products: dict[tuple[int, int], ir.Node] = {}
    if ints_of(pad.inputs[1]) != _PADS or any(value is not None for value in pad.inputs[2:]):
        return None
    slices = pad.outputs[0].consumers()
    for node in slices:
        tap, readers = _tap(node), node.outputs[0].consumers()
        if tap is None or tap in products or [reader.op_type for reader in readers] != ["Mul"]:
            return None
        products[tap] = readers[0]
    weights = [array_of(products[tap].inputs[1]) for tap in TAPS if tap in products]
    if len(products) != len(TAPS) or any(weight is None or weight.ndim != 1 for weight in weights):
        return None
    sums = _sums(list(products.values()))
    if sums is None:
        return None
    kernel = np.stack([weight for weight in weights if weight is not None], axis=-1).reshape(-1, 1, 3, 3)
    bias = _added(sums[-1] if sums else products[TAPS[0]], len(kernel))
    last = () if bias is None else (sums[-1].outputs[0].consumers()[0],)
    return _Shifted((*slices, *products.values(), *sums, *last), kernel, None if bias is None else bias)


def _tap(node: ir.Node) -> tuple[int, int] | None:
    """The (row, column) of the kernel that a Slice of the padded images is for."""
    if node.op_type != "Slice" or len(node.inputs) != 4 or ints_of(node.inputs[3]) != [1, 2]:
        return None
    start, end = ints_of(node.inputs[1]), ints_of(node.inputs[2])
    return next((tap for tap in TAPS if start == [*tap] and end == [_ENDS[part] for part in tap]), None)


def _sums(terms: list[ir.Node]) -> list[ir.Node] | None:
    """The additions that make one sum of all `terms`, in order; None where something else reads one of them."""
    open_terms, found = {node.outputs[0] for node in terms}, list[ir.Node]()
    while len(open_terms) > 1:
        readers = [value.consumers() for value in open_terms]
        addition = next(
            (
                reader
                for of_value in readers
                for reader in of_value
                if reader.op_type == "Add" and len({*reader.inputs} & open_terms) == 2
            ),
            None,
        )
        if addition is None or any(len(value.uses()) != 1 for value in addition.inputs if value is not None):
            return None
        open_terms = (open_terms - {*addition.inputs}) | {addition.outputs[0]}
        found.append(addition)
    return found


def _added(total: ir.Node, channels: int) -> ir.Value | None:
    """The constant of one number a channel that the only reader of `total` adds."""
    readers = total.outputs[0].consumers()
    if len(readers) != 1 or readers[0].op_type != "Add" or total.outputs[0].is_graph_output():
        return None
    constants = [value for value in readers[0].inputs if value is not None and array_of(value) is not None]
    return constants[0] if len(constants) == 1 and constants[0].shape == ir.Shape([channels]) else None


def _join(graph: ir.Graph, pad: ir.Node, shifted: _Shifted) -> str:
    name = name_of(pad).removesuffix("/pad")
    path = owner(name)
    weight = constant(graph, unused_name(graph, f"{path}.weight"), np.ascontiguousarray(shifted.kernel))
    writer, channels = NodeWriter(name), len(shifted.kernel)
    first = writer.add("Transpose", "channels_first", pad.inputs[0], perm=TO_CHANNELS_FIRST)
    inputs = [first, weight, *([] if shifted.bias is None else [shifted.bias])]
    conv = new_node("Conv", inputs, name, group=channels, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    last = new_node("Transpose", conv.outputs, f"{name}/channels_last", perm=TO_CHANNELS_LAST)
    # The last of the old nodes is the one whose output is replaced; the rest go with it, readers first.
    replace_nodes([pad, *shifted.nodes], [*writer.nodes, conv, last])
    return name

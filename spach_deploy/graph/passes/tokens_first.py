"""Attention with tokens as the first dimension, (N, B, C) instead of (B, N, C), so that TensorRT copies no q, k and v.

TensorRT's attention kernel reads batch and heads as one dimension with one stride. Of (B, N, h, d), q, k and v must be
copied into that order; of (N, B, h, d) it is a view, B*h, and the kernel writes its result in that order anyway. So the
input of norm1 is transposed, which fuses with the norm, and transposed back before the residual addition.

Where qkv has no bias (`absorb_qkv_bias`) and is not quantized, the Gemm becomes three, with the rows of the weight for
query, key and value. TensorRT joins them into one batched product and needs no kernel to take the parts apart; a Split
after one product would copy each part. With a bias or in eight bits one product stays: there is a kernel after it
anyway, for the bias or the scale, which also moves the parts.

The weight stays one initializer under its published name, which a Split takes apart, for all that changes weights
later. Before a graph is written, `part_weights` gives each product an initializer of its own: every compiler folds such
a Split, but OpenCV 4 reads no graph that has one.

For other runtimes, which gain nothing by it, `images_first` takes it back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from spach_deploy.graph.editing import (
    array_of,
    constant,
    ints_of,
    is_marked_quantized,
    is_transpose,
    maker,
    name_of,
    new_node,
    operand,
    reader,
    remove_unused_initializers,
    replace_nodes,
    set_ints,
    shapes_at_batch_one,
    tensor_of,
)

NAME = "tokens_first"
PARTS = ("query", "key", "value")
_SWAPPED = [1, 0, 2]


@dataclasses.dataclass(frozen=True)
class _Attention:
    """The nodes of one attention as torch.onnx writes it, in order; B batch, N tokens, h heads, d `head_dim`,
    C `dim` channels of the stream.

    `norm`: the LayerNormalization before it. `qkv`: its Gemm. `unpack`: the Reshape to (B, N, 3h, d). `swap`: the
    Transpose to (B, 3h, N, d). `split`: the Split into q, k, v. `key`: the Transpose of k. `merge`: the Transpose of
    the result to (B, N, h, d). `back`: the Reshape after the projection.
    """

    path: str
    norm: ir.Node
    qkv: ir.Node
    unpack: ir.Node
    swap: ir.Node
    split: ir.Node
    key: ir.Node
    merge: ir.Node
    back: ir.Node
    tokens: int
    heads: int
    head_dim: int
    dim: int


def tokens_first(model: ir.Model) -> tuple[str, ...]:
    """Rewrite every attention, in place; returns the paths of those that changed."""
    graph, shapes = model.graph, shapes_at_batch_one(model)
    softmaxes = [node for node in graph if node.op_type == "Softmax"]
    found = [attention for node in softmaxes if (attention := _attention(node, shapes)) is not None]
    for attention in found:
        _enter(graph, attention, shapes)
        set_ints(attention.key, "perm", [0, 2, 1])
        set_ints(attention.merge, "perm", _SWAPPED)
        _separate(graph, attention) if _has_no_bias(attention.qkv) else _pack(graph, attention)
        _leave(graph, attention, shapes)
    remove_unused_initializers(graph)
    return tuple(attention.path for attention in found)


def _attention(softmax: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> _Attention | None:
    """The attention whose Softmax is `softmax`; None where its nodes are others than torch.onnx's."""
    try:
        scores, mixed = _before(softmax, 0, "MatMul"), _behind(softmax, "MatMul")
        key = _before(scores, 1, "Transpose")
        split = _before(key, 0, "Split")
        if mixed.inputs[1] is not split.outputs[2]:
            return None
        swap = _before(split, 0, "Transpose")
        unpack = _before(swap, 0, "Reshape")
        qkv = _before(unpack, 0, "Gemm")
        rows = _before(qkv, 0, "Reshape")
        norm = _before(rows, 0, "LayerNormalization")
        merge = _behind(mixed, "Transpose")
        back = _behind(_behind(_behind(merge, "Reshape"), "Gemm"), "Reshape")
        for node, following in ((norm, "Reshape"), (rows, "Gemm"), (qkv, "Reshape")):  # without other readers
            _behind(node, following)
    except LookupError:
        return None
    _, triple, tokens, head_dim = shapes[name_of(swap.outputs[0])]
    path, dim = name_of(softmax).rpartition("/")[0], shapes[name_of(norm.outputs[0])][-1]
    return _Attention(path, norm, qkv, unpack, swap, split, key, merge, back, tokens, triple // 3, head_dim, dim)


def _before(node: ir.Node, slot: int, op_type: str) -> ir.Node:
    """The node that makes input `slot` of `node`; LookupError where that is no `op_type`."""
    value = node.inputs[slot]
    source = None if value is None else value.producer()
    if source is None or source.op_type != op_type:
        raise LookupError
    return source


def _behind(node: ir.Node, op_type: str) -> ir.Node:
    """The only reader of `node`; LookupError where there are several, or it is no `op_type`."""
    readers = node.outputs[0].consumers()
    if [reader.op_type for reader in readers] != [op_type]:
        raise LookupError
    return readers[0]


def _has_no_bias(qkv: ir.Node) -> bool:
    if is_marked_quantized(qkv) or not qkv.attributes.get_int("transB", 0):
        return False
    bias = array_of(qkv.inputs[2]) if len(qkv.inputs) > 2 else None
    return len(qkv.inputs) < 3 or (bias is not None and not bias.any())


def _enter(graph: ir.Graph, attention: _Attention, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Transpose the input of the norm from the stream, (B, N, C) or (B, H, W, C), to (N, B, C)."""
    norm = attention.norm
    source, path = operand(norm, 0), name_of(norm).rpartition("/")[0]
    nodes: list[ir.Node] = []
    if len(shapes[name_of(source)]) != 3:
        nodes.append(_reshape(graph, source, f"{path}/tokens", -1, attention.tokens, attention.dim))
        source = nodes[-1].outputs[0]
    nodes.append(_transpose(source, f"{path}/tokens_first"))
    norm.prepend(nodes)
    norm.replace_input_with(0, nodes[-1].outputs[0])


def _leave(graph: ir.Graph, attention: _Attention, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Transpose the projection's rows, (N*B, C), back to the stream."""
    path, back = attention.path, attention.back
    rows = _reshape(graph, back.inputs[0], f"{path}/rows_by_token", attention.tokens, -1, attention.dim)
    swapped = _transpose(rows.outputs[0], f"{path}/tokens_second")
    if len(shapes[name_of(back.outputs[0])]) == 3:
        replace_nodes([back], [rows, swapped])
    else:
        back.prepend([rows, swapped])
        back.replace_input_with(0, swapped.outputs[0])


def _pack(graph: ir.Graph, attention: _Attention) -> None:
    """Keep one product for q, k and v, and reshape each to (B*h, N, d)."""
    unpack, split, (tokens, dim) = attention.unpack, attention.split, (attention.tokens, attention.head_dim)
    name = name_of(unpack.outputs[0])
    replace_nodes([unpack], [_reshape(graph, unpack.inputs[0], name, tokens, -1, 3 * attention.heads, dim)])
    set_ints(attention.swap, "perm", [1, 2, 0, 3])
    merged = []
    for part, heads in zip(PARTS, split.outputs, strict=True):
        uses, name = heads.uses(), name_of(heads)
        heads.name = f"{attention.path}/{part}_heads"
        merged.append(_reshape(graph, heads, name, -1, tokens, dim))
        for using, slot in uses:
            using.replace_input_with(slot, merged[-1].outputs[0])
    split.append(merged)


def _separate(graph: ir.Graph, attention: _Attention) -> None:
    """Replace the product for q, k and v by three, each (B*h, N, d) after a view and a transpose."""
    qkv, split = attention.qkv, attention.split
    rows, weight = qkv.inputs[:2]
    path = name_of(qkv).rpartition("/")[0]
    weights = [f"{path}.weight/{part}" for part in PARTS]
    nodes = [new_node("Split", [weight], f"{path}/split", weights, axis=0, num_outputs=3)]
    made = []
    for part, own, old in zip(PARTS, nodes[0].outputs, split.outputs, strict=True):
        product = new_node("Gemm", [rows, own], f"{path}/{part}", transB=1)
        heads = _reshape(graph, product.outputs[0], f"{path}/{part}_heads", attention.tokens, -1, attention.head_dim)
        swapped = _transpose(heads.outputs[0], name_of(old))
        nodes.extend((product, heads, swapped))
        made.append(swapped.outputs[0])
    gone = [qkv, attention.unpack, attention.swap, split]
    ir.convenience.replace_nodes_and_values(graph, qkv, gone, nodes, split.outputs, made)


def part_weights(model: ir.Model) -> tuple[str, ...]:
    """Replace every Split of an initializer by initializers, in place; returns the names of those that were split.

    A part has the name that it had as the Split's output, such as `blocks.0.spatial_func.qkv.weight/query`.
    """
    graph = model.graph
    splits = [node for node in graph if node.op_type == "Split" and operand(node, 0).is_initializer()]
    weights = [operand(split, 0) for split in splits]
    for split, weight in zip(splits, weights, strict=True):
        parts = np.split(tensor_of(weight).numpy(), len(split.outputs), split.attributes.get_int("axis", 0))
        for made, part in zip(split.outputs, parts, strict=True):
            name, made.name = name_of(made), None
            made.replace_all_uses_with(constant(graph, name, part))
        graph.remove(split, safe=True)
    remove_unused_initializers(graph)
    return tuple(map(name_of, weights))


def _reshape(graph: ir.Graph, source: ir.Value | None, name: str, *shape: int) -> ir.Node:
    return new_node("Reshape", [source, constant(graph, f"tokens_first.{'x'.join(map(str, shape))}", shape)], name)


def _transpose(source: ir.Value, name: str) -> ir.Node:
    return new_node("Transpose", [source], name, perm=_SWAPPED)


@dataclasses.dataclass(frozen=True)
class _Swapped:
    """The nodes of one attention as `tokens_first` leaves it, and its sizes.

    `qkv`: the product for q, k and v, or the three products. `taken`: the nodes from there to `heads`, the q, k and v
    that its products read; they are removed. `weights`: (3hd, C), or those of q, k and v, (hd, C) each; `bias`: (3hd,)
    or None.
    """

    enter: ir.Node
    norm: ir.Node
    rows: ir.Node
    qkv: ir.Node
    weights: tuple[ir.Value, ...]
    bias: ir.Value | None
    taken: tuple[ir.Node, ...]
    heads: tuple[ir.Value, ir.Value, ir.Value]
    key: ir.Node
    merge: ir.Node
    leave: tuple[ir.Node, ir.Node]
    tokens: int
    head_dim: int


def images_first(model: ir.Model) -> tuple[str, ...]:
    """Write attention with images before tokens again, with one product for q, k and v, in place; paths of those that
    changed.
    """
    graph = model.graph
    found = [swapped for node in graph if node.op_type == "Softmax" and (swapped := _swapped(node)) is not None]
    for swapped in found:
        _unswap(graph, swapped)
    remove_unused_initializers(graph)
    return tuple(name_of(swapped.key).rpartition("/")[0] for swapped in found)


def _swapped(softmax: ir.Node) -> _Swapped | None:
    """The attention whose Softmax is `softmax`; None where its nodes are others than `tokens_first` writes."""
    try:
        scores, mixed = maker(softmax, 0, "MatMul"), reader(softmax, "MatMul")
        key, merge = maker(scores, 1, "Transpose"), reader(mixed, "Transpose")
        by_token = reader(reader(reader(merge, "Reshape"), "Gemm"), "Reshape")
        leave = (by_token, reader(by_token, "Transpose"))
        heads = (operand(scores, 0), operand(key, 0), operand(mixed, 1))
        parts = _separated(heads) or _packed(heads)
        if parts is None:
            return None
        rows = maker(parts.qkv, 0, "Reshape")
        norm = maker(rows, 0, "LayerNormalization")
        enter = maker(norm, 0, "Transpose")
    except LookupError:
        return None
    orders = [(enter, _SWAPPED), (merge, _SWAPPED), (leave[1], _SWAPPED), (key, [0, 2, 1])]
    if not all(is_transpose(node, order) for node, order in orders):
        return None
    return _Swapped(
        enter, norm, rows, parts.qkv, parts.weights, parts.bias, parts.nodes, heads, key, merge, leave, *parts.sizes
    )


@dataclasses.dataclass(frozen=True)
class _Parts:
    """How q, k and v are made. `sizes`: tokens, and channels of a head."""

    qkv: ir.Node
    weights: tuple[ir.Value, ...]
    bias: ir.Value | None
    nodes: tuple[ir.Node, ...]
    sizes: tuple[int, int]


def _separated(heads: tuple[ir.Value, ...]) -> _Parts | None:
    """Of three products (`_separate`), before `part_weights` or after it."""
    swaps = [value.producer() for value in heads]
    if not all(is_transpose(node, _SWAPPED) for node in swaps):
        return None
    moves = [node for node in swaps if node is not None]
    views = [maker(node, 0, "Reshape") for node in moves]
    products = [maker(node, 0, "Gemm") for node in views]
    weights = tuple(operand(node, 1) for node in products)
    split = weights[0].producer()
    if split is not None:
        if split.op_type != "Split" or list(weights) != list(split.outputs):
            return None
        weights = (operand(split, 0),)
    shapes = {tuple(ints_of(node.inputs[1])) for node in views}
    is_whole = (
        len(shapes) == 1
        and len({node.inputs[0] for node in products}) == 1
        and all(len(node.inputs) == 2 and node.attributes.get_int("transB", 0) for node in products)
        and all(array_of(weight) is not None for weight in weights)
    )
    shape = next(iter(shapes))
    if not is_whole or len(shape) != 3 or shape[1] != -1:
        return None
    nodes = (*products, *views, *moves, *([] if split is None else [split]))
    return _Parts(products[0], weights, None, nodes, (shape[0], shape[2]))


def _packed(heads: tuple[ir.Value, ...]) -> _Parts | None:
    """Of one product (`_pack`)."""
    views = [value.producer() for value in heads]
    if any(node is None or node.op_type != "Reshape" for node in views):
        return None
    merged = [node for node in views if node is not None]
    split = maker(merged[0], 0, "Split")
    swap = maker(split, 0, "Transpose")
    unpack = maker(swap, 0, "Reshape")
    qkv, shape = maker(unpack, 0, "Gemm"), ints_of(unpack.inputs[1])
    is_whole = [node.inputs[0] for node in merged] == list(split.outputs) and is_transpose(swap, [1, 2, 0, 3])
    if not is_whole or len(shape) != 4 or shape[1] != -1 or not qkv.attributes.get_int("transB", 0):
        return None
    bias = qkv.inputs[2] if len(qkv.inputs) > 2 else None
    return _Parts(qkv, (operand(qkv, 1),), bias, (qkv, unpack, swap, split, *merged), (shape[0], shape[3]))


def _unswap(graph: ir.Graph, swapped: _Swapped) -> None:
    head_dim, tokens = swapped.head_dim, swapped.tokens
    weight = _joined(graph, swapped.weights)
    triple = _rows_of(weight) // head_dim
    dim = ints_of(swapped.leave[0].inputs[1])[-1]  # of the stream, where heads may be padded
    swapped.norm.replace_input_with(0, swapped.enter.inputs[0])
    path, names = name_of(swapped.qkv).rpartition("/")[0], [name_of(value) for value in swapped.heads]
    attention = name_of(swapped.key).rpartition("/")[0]
    inputs = [swapped.rows.outputs[0], weight, *([] if swapped.bias is None else [swapped.bias])]
    product = new_node("Gemm", inputs, f"{path}/Gemm", transB=1)
    product.metadata_props.update(swapped.qkv.metadata_props)  # marks: to be quantized, or to stay in FP32
    unpack = _reshape(graph, product.outputs[0], f"{attention}/unpack", -1, tokens, triple, head_dim)
    swap = new_node("Transpose", unpack.outputs, f"{attention}/heads", perm=[0, 2, 1, 3])
    split = new_node("Split", swap.outputs, f"{attention}/Split", names, axis=1, num_outputs=3)
    set_ints(swapped.key, "perm", [0, 1, 3, 2])
    set_ints(swapped.merge, "perm", [0, 2, 1, 3])
    ir.convenience.replace_nodes_and_values(
        graph, swapped.qkv, swapped.taken, [product, unpack, swap, split], swapped.heads, split.outputs
    )
    by_token, leave = swapped.leave
    replace_nodes([by_token, leave], [_reshape(graph, by_token.inputs[0], name_of(leave), -1, tokens, dim)])
    if not swapped.enter.outputs[0].uses():
        graph.remove(swapped.enter, safe=True)


def _joined(graph: ir.Graph, weights: tuple[ir.Value, ...]) -> ir.Value:
    """One weight for q, k and v."""
    if len(weights) == 1:
        return weights[0]
    rows = np.concatenate([tensor_of(weight).numpy() for weight in weights])
    return constant(graph, name_of(weights[0]).removesuffix(f"/{PARTS[0]}"), rows)


def _rows_of(weight: ir.Value) -> int:
    assert weight.const_value is not None
    return int(weight.const_value.shape.numpy()[0])

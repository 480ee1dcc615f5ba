"""Attention over rows that run through tokens first and images second: (N, B, C) instead of (B, N, C).

The compiler's attention kernel takes batch and heads as one dimension of one stride. Of (B, N, h, d) that has to be
made by moving q, k and v; of (N, B, h, d) it is a view, and the kernel writes its result in that order anyway. So
norm1 gets its tokens transposed, which costs nothing in front of a row reduction, and the tokens go back where the
residual is added. Heads and images are one dimension, B*h, all along.

Where qkv has no bias (`absorb_qkv_bias`) and is not quantized, its rows for query, key and value become three products.
The compiler makes one batched product of the three and no kernel at all of what was a move; a Split behind one product
would be a copy each. With a bias or in eight bits one product stays, and what scales or biases it moves it too.

The weight stays one tensor under its published name, split in the graph, where every compiler folds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from spach_deploy.graph.edit import (
    attributes,
    constant,
    consumers,
    initializers,
    is_marked_quantized,
    producers,
    remove_unused_initializers,
    replace_nodes,
    shapes_at_batch_one,
)

NAME = "tokens_first"
PARTS = ("query", "key", "value")
_SWAPPED = [1, 0, 2]


@dataclasses.dataclass(frozen=True)
class _Attention:
    """The nodes of one attention as the exporter writes it; `norm` and `back` stand before and behind it."""

    path: str
    norm: NodeProto
    qkv: NodeProto
    unpack: NodeProto
    swap: NodeProto
    split: NodeProto
    key: NodeProto
    merge: NodeProto
    back: NodeProto
    tokens: int
    heads: int
    head_dim: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


def tokens_first(model: ModelProto) -> tuple[str, ...]:
    """Give every attention this form, in place; paths of those that changed."""
    graph = model.graph
    shapes = shapes_at_batch_one(model)
    position = {node.name: index for index, node in enumerate(graph.node)}
    found = list(_attentions(graph, shapes))
    replacement: dict[int, list[NodeProto]] = {}
    for attention in found:
        changed = _changed(graph, attention, shapes)
        replacement.update({position[name]: nodes for name, nodes in changed.items()})
    replace_nodes(graph, replacement)
    remove_unused_initializers(graph)
    return tuple(attention.path for attention in found)


def _attentions(graph: GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> list[_Attention]:
    made, read = producers(graph), consumers(graph)
    found = (_attention(node, made, read, shapes) for node in graph.node if node.op_type == "Softmax")
    return [attention for attention in found if attention is not None]


def _attention(
    softmax: NodeProto,
    made: Mapping[str, NodeProto],
    read: Mapping[str, list[NodeProto]],
    shapes: Mapping[str, tuple[int, ...]],
) -> _Attention | None:
    """The attention around a softmax; None where it is written otherwise."""

    def before(node: NodeProto, slot: int, op_type: str) -> NodeProto:
        source = made[node.input[slot]]
        if source.op_type != op_type:
            raise LookupError
        return source

    def behind(node: NodeProto, op_type: str) -> NodeProto:
        (reader,) = read[node.output[0]]
        if reader.op_type != op_type:
            raise LookupError
        return reader

    try:
        scores, mixed = before(softmax, 0, "MatMul"), behind(softmax, "MatMul")
        key = before(scores, 1, "Transpose")
        split = before(key, 0, "Split")
        if mixed.input[1] != split.output[2]:
            return None
        swap = before(split, 0, "Transpose")
        unpack = before(swap, 0, "Reshape")
        qkv = before(unpack, 0, "Gemm")
        rows = before(qkv, 0, "Reshape")
        norm = before(rows, 0, "LayerNormalization")
        merge = behind(mixed, "Transpose")
        back = behind(behind(behind(merge, "Reshape"), "Gemm"), "Reshape")
        for node, reader in ((norm, "Reshape"), (rows, "Gemm"), (qkv, "Reshape")):  # nobody else may read them
            behind(node, reader)
    except (KeyError, LookupError, ValueError):
        return None
    _, triple, tokens, head_dim = shapes[swap.output[0]]
    path = softmax.name.rpartition("/")[0]
    return _Attention(path, norm, qkv, unpack, swap, split, key, merge, back, tokens, triple // 3, head_dim)


def _changed(
    graph: GraphProto, attention: _Attention, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[NodeProto]]:
    """New nodes in the place of old ones, by the old one's name."""
    norm, back = attention.norm, attention.back
    to_tokens = _entering(graph, attention, shapes[norm.input[0]])
    norm.input[0] = to_tokens[-1].output[0]
    attention.key.attribute[0].CopyFrom(helper.make_attribute("perm", [0, 2, 1]))
    attention.merge.attribute[0].CopyFrom(helper.make_attribute("perm", _SWAPPED))
    heads = _separate(graph, attention) if _has_no_bias(graph, attention.qkv) else _packed(graph, attention)
    return {
        norm.name: [*to_tokens, norm],
        **heads,
        back.name: _leaving(graph, attention, shapes[back.output[0]]),
    }


def _has_no_bias(graph: GraphProto, qkv: NodeProto) -> bool:
    if is_marked_quantized(qkv) or not attributes(qkv).get("transB"):
        return False
    return len(qkv.input) < 3 or not numpy_helper.to_array(initializers(graph)[qkv.input[2]]).any()


def _entering(graph: GraphProto, attention: _Attention, shape: tuple[int, ...]) -> list[NodeProto]:
    """From the stream, (B, N, C) or (B, H, W, C), to (N, B, C)."""
    name, source = attention.norm.name.rpartition("/")[0], attention.norm.input[0]
    nodes = []
    if len(shape) != 3:
        nodes.append(_reshape(graph, source, f"{name}/tokens", -1, attention.tokens, attention.dim))
        source = nodes[-1].output[0]
    return [*nodes, _transpose(source, f"{name}/tokens_first", _SWAPPED)]


def _leaving(graph: GraphProto, attention: _Attention, shape: tuple[int, ...]) -> list[NodeProto]:
    """From the projection's rows to the stream."""
    path, back = attention.path, attention.back
    rows = _reshape(graph, back.input[0], f"{path}/rows_by_token", attention.tokens, -1, attention.dim)
    swapped = _transpose(rows.output[0], f"{path}/tokens_second", _SWAPPED)
    if len(shape) == 3:
        swapped.output[0] = back.output[0]
        return [rows, swapped]
    back.input[0] = swapped.output[0]
    return [rows, swapped, back]


def _packed(graph: GraphProto, attention: _Attention) -> dict[str, list[NodeProto]]:
    """One product for q, k and v, their heads with the batch: (B*h, N, d)."""
    unpack, swap, split = attention.unpack, attention.swap, attention.split
    triple = 3 * attention.heads
    unpack = _reshape(graph, unpack.input[0], unpack.output[0], attention.tokens, -1, triple, attention.head_dim)
    swap.attribute[0].CopyFrom(helper.make_attribute("perm", [1, 2, 0, 3]))
    outputs = list(split.output)
    split.output[:] = [f"{attention.path}/{part}_heads" for part in PARTS]
    merged = [
        _reshape(graph, source, target, -1, attention.tokens, attention.head_dim)
        for source, target in zip(split.output, outputs, strict=True)
    ]
    return {attention.unpack.name: [unpack], split.name: [split, *merged]}


def _separate(graph: GraphProto, attention: _Attention) -> dict[str, list[NodeProto]]:
    """A product each for q, k and v."""
    qkv, split = attention.qkv, attention.split
    path = qkv.name.rpartition("/")[0]
    weights = [f"{path}.weight/{part}" for part in PARTS]
    nodes = [helper.make_node("Split", [qkv.input[1]], weights, name=f"{path}/split", axis=0, num_outputs=3)]
    for part, weight, target in zip(PARTS, weights, split.output, strict=True):
        product = f"{path}/{part}"
        nodes.append(helper.make_node("Gemm", [qkv.input[0], weight], [product], name=product, transB=1))
        heads = _reshape(graph, product, f"{product}_heads", attention.tokens, -1, attention.head_dim)
        nodes.extend((heads, _transpose(heads.output[0], target, _SWAPPED)))
    gone: dict[str, list[NodeProto]] = {node.name: [] for node in (attention.unpack, attention.swap, split)}
    return {**gone, qkv.name: nodes}


def _reshape(graph: GraphProto, source: str, name: str, *shape: int) -> NodeProto:
    stored = "tokens_first." + "x".join(map(str, shape))
    if stored not in initializers(graph):
        graph.initializer.append(constant(stored, np.array(shape, np.int64)))
    return helper.make_node("Reshape", [source, stored], [name], name=name)


def _transpose(source: str, name: str, perm: list[int]) -> NodeProto:
    return helper.make_node("Transpose", [source], [name], name=name, perm=perm)

"""Every block reads and hands out the stream in one layout: (B, H, W, C), or (B, N, C) without `grid_stream`.

The exporter cancels what ends a downsampling against what begins the block behind it. That saves nothing (the compiler
does the same), but then the first block of a stage differs from the others and has two inputs, or another input than
its output. This pass puts the layout back, so that blocks of one kind are alike.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper

from spach_deploy.common.errors import CertificateError
from spach_deploy.graph.edit import (
    attributes,
    constant,
    consumers,
    initializers,
    producers,
    replace_nodes,
    shapes_at_batch_one,
)
from spach_deploy.graph.names import owner

TO_CHANNELS_FIRST, TO_CHANNELS_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def is_transpose(node: NodeProto | None, perm: list[int]) -> bool:
    """Whether `node` is a Transpose of exactly this permutation."""
    return node is not None and node.op_type == "Transpose" and attributes(node).get("perm") == perm


def restore_block_boundaries(model: ModelProto, *, is_grid: bool) -> tuple[str, ...]:
    """Make convolutions that read another module's channels-first tensor take it from the stream, in place.

    `is_grid`: the stream is (B, H, W, C).
    """
    graph = model.graph
    _drop_idle_transposes(graph)
    made = producers(graph)
    shapes = {} if is_grid else shapes_at_batch_one(model)
    replacement: dict[str, list[NodeProto]] = {}
    changed: list[str] = []
    for node in list(graph.node):
        if not node.name.endswith(".cpe_net.net.1/Conv"):
            continue
        source = made[node.input[0]]
        block = owner(node.name).removesuffix(".cpe_net.net.1")
        if owner(source.name).startswith(f"{block}."):
            continue
        stream = _leave(graph, source, shapes.get(source.output[0]), replacement)
        replacement[node.name] = _enter(graph, node, stream, block, shapes.get(source.output[0]))
        changed.append(node.name)
    replace_nodes(graph, {i: replacement[node.name] for i, node in enumerate(graph.node) if node.name in replacement})
    return tuple(changed)


def _drop_idle_transposes(graph: GraphProto) -> None:
    """Take out what moves nothing: two moves that cancel each other, as onnxsim before 0.8 joins them."""
    idle = [node for node in graph.node if is_transpose(node, list(range(len(_perm(node)))))]
    for node in idle:
        _redirect(list(graph.node), node.output[0], node.input[0])
        graph.node.remove(node)


def _perm(node: NodeProto) -> list[int]:
    perm = attributes(node).get("perm", []) if node.op_type == "Transpose" else []
    return perm if isinstance(perm, list) else []


def _leave(
    graph: GraphProto, source: NodeProto, shape: tuple[int, ...] | None, replacement: dict[str, list[NodeProto]]
) -> str:
    """The stream that `source` makes, channels first; as tokens for a `shape` (1, C, H, W). All readers get it.

    Raises CertificateError where one reads something else.
    """
    last = stream = f"{_layer(source.name)}/channels_last"
    nodes = [source, _transpose(source.output[0], last, TO_CHANNELS_LAST)]
    if shape is not None:
        _, channels, height, width = shape
        stream = f"{_layer(source.name)}/tokens"
        nodes.append(_reshape(graph, last, stream, (height * width, channels)))
    replacement[source.name] = nodes
    read = consumers(graph)
    for reader in read[source.output[0]]:
        if is_transpose(reader, TO_CHANNELS_LAST):
            behind = read.get(reader.output[0], [])
            made = [reader] if shape is None else behind
            if any(node.op_type != "Reshape" for node in made if node is not reader):
                raise CertificateError(f"What reads {reader.name} takes a grid where the stream is tokens.")
            replacement.update({node.name: [] for node in (reader, *made)})
            for node in made:
                _redirect(read.get(node.output[0], []), node.output[0], stream)
    return stream


def _enter(
    graph: GraphProto, conv: NodeProto, stream: str, block: str, shape: tuple[int, ...] | None
) -> list[NodeProto]:
    """From the stream to a block's convolution."""
    grid, first = f"{block}.cpe_net/grid", f"{block}.cpe_net/channels_first"
    conv.input[0] = first
    if shape is None:
        return [_transpose(stream, first, TO_CHANNELS_FIRST), conv]
    _, channels, height, width = shape
    return [
        _reshape(graph, stream, grid, (height, width, channels)),
        _transpose(grid, first, TO_CHANNELS_FIRST),
        conv,
    ]


def _reshape(graph: GraphProto, source: str, name: str, shape: tuple[int, ...]) -> NodeProto:
    """To (B, *shape)."""
    stored = "grid." + "x".join(map(str, shape))
    if stored not in initializers(graph):
        graph.initializer.append(constant(stored, np.array([-1, *shape], np.int64)))
    return helper.make_node("Reshape", [source, stored], [name], name=name)


def _layer(name: str) -> str:
    return ".".join(owner(name).split(".")[:2])


def _transpose(source: str, name: str, perm: list[int]) -> NodeProto:
    return helper.make_node("Transpose", [source], [name], name=name, perm=perm)


def _redirect(readers: list[NodeProto], old: str, new: str) -> None:
    for reader in readers:
        reader.input[:] = [new if name == old else name for name in reader.input]

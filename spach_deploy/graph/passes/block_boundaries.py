"""Every block reads and hands out the stream in one layout: (B, H, W, C), or (B, N, C) without `grid_stream`.

The exporter cancels what ends a downsampling against what begins the block behind it. That saves nothing (the compiler
does the same), but then the first block of a stage differs from the others and has two inputs, or another input than
its output. This pass puts the layout back, so that blocks of one kind are alike.
"""

from __future__ import annotations

import onnx_ir as ir

from spach_deploy.common.errors import CertificateError
from spach_deploy.graph.editing import (
    constant,
    is_transpose,
    name_of,
    new_node,
    operand,
    permutation,
    shapes_at_batch_one,
)
from spach_deploy.graph.names import owner

TO_CHANNELS_FIRST, TO_CHANNELS_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def restore_block_boundaries(model: ir.Model, *, is_grid: bool) -> tuple[str, ...]:
    """Make convolutions that read another module's channels-first tensor take it from the stream, in place.

    `is_grid`: the stream is (B, H, W, C).
    """
    graph = model.graph
    _drop_idle_transposes(graph)
    shapes = {} if is_grid else shapes_at_batch_one(model)
    changed: list[str] = []
    for conv in [node for node in graph if name_of(node).endswith(".cpe_net.net.1/Conv")]:
        block, source = owner(name_of(conv)).removesuffix(".cpe_net.net.1"), operand(conv, 0)
        maker = source.producer()
        if maker is None or owner(name_of(maker)).startswith(f"{block}."):
            continue
        shape = shapes.get(name_of(source))
        _enter(graph, conv, _leave(graph, maker, shape), block, shape)
        changed.append(name_of(conv))
    return tuple(changed)


def _drop_idle_transposes(graph: ir.Graph) -> None:
    """Take out what moves nothing: two moves that cancel each other, as onnxsim before 0.8 joins them."""
    for node in list(graph):
        order = permutation(node)
        if order and is_transpose(node, range(len(order))):
            node.outputs[0].replace_all_uses_with(operand(node, 0))
            graph.remove(node, safe=True)


def _leave(graph: ir.Graph, source: ir.Node, shape: tuple[int, ...] | None) -> ir.Value:
    """The stream that `source` makes, channels first; as tokens for a `shape` (1, C, H, W). All readers get it.

    Raises CertificateError where one reads something else.
    """
    readers, layer = source.outputs[0].consumers(), _layer(name_of(source))
    nodes = [_transpose(source.outputs[0], f"{layer}/channels_last", TO_CHANNELS_LAST)]
    if shape is not None:
        _, channels, height, width = shape
        nodes.append(_reshape(graph, nodes[0].outputs[0], f"{layer}/tokens", (height * width, channels)))
    source.append(nodes)
    for reader in readers:
        if is_transpose(reader, TO_CHANNELS_LAST):
            _redirect(graph, reader, nodes[-1].outputs[0], as_tokens=shape is not None)
    return nodes[-1].outputs[0]


def _redirect(graph: ir.Graph, transpose: ir.Node, stream: ir.Value, *, as_tokens: bool) -> None:
    """Let who reads the channels-last tensor, or the tokens made of it, read the stream."""
    behind = transpose.outputs[0].consumers() if as_tokens else ()
    if any(node.op_type != "Reshape" for node in behind):
        raise CertificateError(f"What reads {transpose.name} takes a grid where the stream is tokens.")
    for node in behind if as_tokens else (transpose,):
        node.outputs[0].replace_all_uses_with(stream)
    graph.remove([transpose, *behind], safe=True)


def _enter(graph: ir.Graph, conv: ir.Node, stream: ir.Value, block: str, shape: tuple[int, ...] | None) -> None:
    """From the stream to a block's convolution."""
    nodes: list[ir.Node] = []
    if shape is not None:
        _, channels, height, width = shape
        nodes.append(_reshape(graph, stream, f"{block}.cpe_net/grid", (height, width, channels)))
        stream = nodes[0].outputs[0]
    nodes.append(_transpose(stream, f"{block}.cpe_net/channels_first", TO_CHANNELS_FIRST))
    conv.prepend(nodes)
    conv.replace_input_with(0, nodes[-1].outputs[0])


def _reshape(graph: ir.Graph, source: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Node:
    """To (B, *shape)."""
    stored = constant(graph, f"grid.{'x'.join(map(str, shape))}", [-1, *shape])
    return new_node("Reshape", [source, stored], name)


def _transpose(source: ir.Value, name: str, perm: list[int]) -> ir.Node:
    return new_node("Transpose", [source], name, perm=perm)


def _layer(name: str) -> str:
    return ".".join(owner(name).split(".")[:2])

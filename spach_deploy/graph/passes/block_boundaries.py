"""Give every block the same layout at its input and output: (B, H, W, C), or (B, N, C) without `grid_stream`.

Where a downsampling ends with a transpose and the block after it begins with the inverse, torch.onnx removes both. That
saves nothing, because TensorRT does the same, and it makes the first block of a network stage differ from the others:
it then reads two tensors, or reads another layout than it makes. This pass restores the transposes, so that one block's
nodes can be repeated for all blocks of its kind (`block_prototype.py`).
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
    owner,
    permutation,
    shapes_at_batch_one,
)

TO_CHANNELS_FIRST, TO_CHANNELS_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def restore_block_boundaries(model: ir.Model, *, is_grid: bool) -> tuple[str, ...]:
    """Restore the transposes before blocks' first convolutions, in place; returns the names of these convolutions.

    `is_grid`: the residual stream is (B, H, W, C), else (B, N, C). Raises CertificateError where another node that
    reads the stream needs the other layout.
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
    """Remove transposes that change no order. onnxsim before 0.8 makes them of two that cancel each other."""
    for node in list(graph):
        order = permutation(node)
        if order and is_transpose(node, range(len(order))):
            node.outputs[0].replace_all_uses_with(operand(node, 0))
            graph.remove(node, safe=True)


def _leave(graph: ir.Graph, source: ir.Node, shape: tuple[int, ...] | None) -> ir.Value:
    """Add nodes that make the stream of the channels-first output of `source`, and let its other readers read that.

    With a `shape` (1, C, H, W) the stream is tokens (B, N, C), with None a grid (B, H, W, C). Raises CertificateError
    for a reader that needs the other layout.
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
    """Remove `transpose` (and the reshapes to tokens after it) and let their readers read `stream`."""
    behind = transpose.outputs[0].consumers() if as_tokens else ()
    if any(node.op_type != "Reshape" for node in behind):
        raise CertificateError(f"What reads {transpose.name} takes a grid where the stream is tokens.")
    for node in behind if as_tokens else (transpose,):
        node.outputs[0].replace_all_uses_with(stream)
    graph.remove([transpose, *behind], safe=True)


def _enter(graph: ir.Graph, conv: ir.Node, stream: ir.Value, block: str, shape: tuple[int, ...] | None) -> None:
    """Add nodes that turn the stream into the channels-first tensor that a block's first convolution reads."""
    nodes: list[ir.Node] = []
    if shape is not None:
        _, channels, height, width = shape
        nodes.append(_reshape(graph, stream, f"{block}.cpe_net/grid", (height, width, channels)))
        stream = nodes[0].outputs[0]
    nodes.append(_transpose(stream, f"{block}.cpe_net/channels_first", TO_CHANNELS_FIRST))
    conv.prepend(nodes)
    conv.replace_input_with(0, nodes[-1].outputs[0])


def _reshape(graph: ir.Graph, source: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Node:
    """A Reshape to (B, *shape)."""
    stored = constant(graph, f"grid.{'x'.join(map(str, shape))}", [-1, *shape])
    return new_node("Reshape", [source, stored], name)


def _transpose(source: ir.Value, name: str, perm: list[int]) -> ir.Node:
    return new_node("Transpose", [source], name, perm=perm)


def _layer(name: str) -> str:
    return ".".join(owner(name).split(".")[:2])

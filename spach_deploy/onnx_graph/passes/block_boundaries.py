"""Every block reads and hands out the stream with channels last.

The exporter cancels a transpose at the end of a downsampling against one at the start of the block behind it. That
saves nothing (the compiler does the same), but then the first block of a stage differs from the others and has two
inputs. This pass puts the pair back, so that blocks of one kind are alike.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, helper

from spach_deploy.onnx_graph.graph import attributes, consumers, producers, replace_nodes
from spach_deploy.onnx_graph.names import owner

TO_CHANNELS_FIRST, TO_CHANNELS_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def is_transpose(node: NodeProto | None, perm: list[int]) -> bool:
    """Whether `node` is a Transpose of exactly this permutation."""
    return node is not None and node.op_type == "Transpose" and attributes(node).get("perm") == perm


def restore_block_boundaries(model: ModelProto) -> tuple[str, ...]:
    """Make convolutions that read another module's channels-first tensor transpose it themselves, in place."""
    graph = model.graph
    made, read = producers(graph), consumers(graph)
    position = {node.name: index for index, node in enumerate(graph.node)}
    replacement: dict[int, list[NodeProto]] = {}
    changed: list[str] = []
    for node in list(graph.node):
        if not node.name.endswith(".cpe_net.net.1/Conv"):
            continue
        source = made[node.input[0]]
        block = owner(node.name).removesuffix(".cpe_net.net.1")
        if owner(source.name).startswith(f"{block}."):
            continue
        last = f"{_layer(source.name)}/channels_last"
        first = f"{block}.cpe_net/channels_first"
        replacement[position[source.name]] = [source, _transpose(source.output[0], last, TO_CHANNELS_LAST)]
        for reader in read[source.output[0]]:
            if is_transpose(reader, TO_CHANNELS_LAST):
                replacement[position[reader.name]] = []
                _redirect(read.get(reader.output[0], []), reader.output[0], last)
        node.input[0] = first
        replacement[position[node.name]] = [_transpose(last, first, TO_CHANNELS_FIRST), node]
        changed.append(node.name)
    replace_nodes(graph, replacement)
    return tuple(changed)


def _layer(name: str) -> str:
    return ".".join(owner(name).split(".")[:2])


def _transpose(source: str, name: str, perm: list[int]) -> NodeProto:
    return helper.make_node("Transpose", [source], [name], name=name, perm=perm)


def _redirect(readers: list[NodeProto], old: str, new: str) -> None:
    for reader in readers:
        reader.input[:] = [new if name == old else name for name in reader.input]

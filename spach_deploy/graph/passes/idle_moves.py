"""Remove transposes and reshapes that undo the one before them: what is left where other passes took nodes away."""

from __future__ import annotations

import onnx_ir as ir

from spach_deploy.graph.editing import ints_of, name_of, operand, permutation, remove_unused_initializers

NAME = "idle_moves"


def remove_idle_moves(model: ir.Model) -> tuple[str, ...]:
    """Remove pairs of transposes that cancel, and reshapes of reshapes, in place; names of the removed nodes."""
    graph = model.graph
    removed: list[str] = []
    for node in list(graph):
        source = _source(node)
        if source is None or node.outputs[0].is_graph_output():
            continue
        if node.op_type == "Reshape":
            node.replace_input_with(0, source)
        elif node.op_type == "Transpose":
            node.outputs[0].replace_all_uses_with(source)
    for node in reversed(list(graph)):
        if node.op_type in ("Transpose", "Reshape") and not any(
            value.uses() or value.is_graph_output() for value in node.outputs
        ):
            removed.append(name_of(node))
            graph.remove(node, safe=True)
    remove_unused_initializers(graph)
    return tuple(reversed(removed))


def _source(node: ir.Node) -> ir.Value | None:
    """What `node` can read, or stand for, instead of the output of the move before it; None where it is needed."""
    before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if before is None or before.op_type != node.op_type:
        return None
    if node.op_type == "Reshape":
        shape = ints_of(node.inputs[1])
        return operand(before, 0) if shape and 0 not in shape else None  # a 0 may stand for an extent of the input
    order, first = permutation(node), permutation(before)
    cancel = node.op_type == "Transpose" and [first[axis] for axis in order] == list(range(len(order)))
    return operand(before, 0) if cancel else None

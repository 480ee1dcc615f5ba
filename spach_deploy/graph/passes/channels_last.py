"""Add images channels last, (B, H, W, C), where an addend was made so: transposes around the sum then cancel.

    transpose(a) + transpose(b) = transpose(a + b)

A residual stream of images, (B, C, H, W), whose blocks work channels last (`blocks/shift.py`, `blocks/token_mlp.py`) is
(B, H, W, C) from end to end then.
"""

from __future__ import annotations

import onnx_ir as ir

from spach_deploy.graph.editing import is_read, is_transpose, name_of, new_node, operand, replace_nodes
from spach_deploy.graph.passes.block_boundaries import TO_CHANNELS_FIRST, TO_CHANNELS_LAST

NAME = "channels_last"


def channels_last(model: ir.Model) -> tuple[str, ...]:
    """Move transposes to channels-first behind the additions that read them, in place; names of these additions."""
    graph = model.graph
    changed: list[str] = []
    for node in list(graph):
        if _is_candidate(node):
            _move(node)
            changed.append(name_of(node))
    for node in list(graph) if changed else ():
        if is_transpose(node, TO_CHANNELS_LAST) and is_transpose(operand(node, 0).producer(), TO_CHANNELS_FIRST):
            node.outputs[0].replace_all_uses_with(_source(operand(node, 0)))
    if changed:
        _remove_unread(graph)
    return tuple(changed)


def _is_candidate(node: ir.Node) -> bool:
    """Whether `node` adds two tensors, one of them made channels last."""
    return (
        node.op_type == "Add"
        and any(_is_last(value) for value in node.inputs)
        and not any(value is None or value.is_initializer() for value in node.inputs)
    )


def _is_last(value: ir.Value | None) -> bool:
    return value is not None and is_transpose(value.producer(), TO_CHANNELS_FIRST)


def _move(addition: ir.Node) -> None:
    name, nodes, addends = name_of(addition), list[ir.Node](), list[ir.Value | None]()
    for index, value in enumerate(addition.inputs):
        made = None if value is None else value.producer()
        if made is None or not is_transpose(made, TO_CHANNELS_FIRST):
            nodes.append(new_node("Transpose", [value], f"{name}/channels_last_{index}", perm=TO_CHANNELS_LAST))
            addends.append(nodes[-1].outputs[0])
        else:
            addends.append(made.inputs[0])
    total = new_node("Add", addends, name, [f"{name}/sum"])
    back = new_node("Transpose", [total.outputs[0]], f"{name}/channels_first", perm=TO_CHANNELS_FIRST)
    replace_nodes([addition], [*nodes, total, back])


def _source(value: ir.Value) -> ir.Value:
    """What the transpose that makes `value` reads."""
    made = value.producer()
    assert made is not None
    return operand(made, 0)


def _remove_unread(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if node.op_type == "Transpose" and not is_read(node.outputs[0]):
            graph.remove(node, safe=True)

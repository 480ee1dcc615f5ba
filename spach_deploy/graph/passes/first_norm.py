"""Write the LayerNorm after the stem as single operators, so that TensorRT moves half the bytes between two kernels.

Shifted depthwise products follow it. They read a token's neighbours, so TensorRT needs two kernels in any case. For a
LayerNormalization the first kernel stores the whole centred tensor in FP32 for the second. Written as single operators,
with statistics of a reshaped view (for the reason in `group_norm.py`), the first kernel stores two numbers a token, and
the second reads the norm's input again, in half precision. The operators are marked to stay in FP32, as the statistics
of LayerNormalization are.

Where the stream is a grid (models with MLP blocks), this form costs one kernel more, so the norm stays as it is.
For other runtimes `join_first_norm` takes it back.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from spach_deploy.graph.editing import (
    NodeWriter,
    array_of,
    constant,
    ints_of,
    maker,
    mark_float32,
    name_of,
    new_node,
    operand,
    owner,
    reader,
    remove_unused_initializers,
    replace_nodes,
    shapes_at_batch_one,
)

NAME = "spell_first_norm"
_NODE = "norm1/LayerNormalization"


def spell_first_norm(model: ir.Model) -> tuple[str, ...]:
    """Write the LayerNorm after the stem as single operators, in place.

    Returns its name; nothing where there is no such norm or the stream is a grid (B, H, W, C).
    """
    norm = next((node for node in model.graph if node.name == _NODE), None)
    if norm is None:
        return ()
    shape = shapes_at_batch_one(model)[name_of(norm.inputs[0])]
    if len(shape) != 3:
        return ()
    replace_nodes([norm], _spelt_out(model.graph, norm, *shape[1:]))
    return (_NODE,)


def _spelt_out(graph: ir.Graph, norm: ir.Node, tokens: int, channels: int) -> list[ir.Node]:
    """Nodes that compute the norm's output, (B, N, C), from its input."""
    x, weight, bias = norm.inputs
    view = constant(graph, "norm1.view", [-1, tokens, 1, channels])
    statistics = constant(graph, "norm1.statistics", [-1, tokens, 1])
    axis = constant(graph, "norm1.axis", [-1])
    epsilon = constant(graph, "norm1.epsilon", np.array(norm.attributes.get_float("epsilon", 1e-5), np.float32))
    writer = NodeWriter("norm1")
    add = writer.add
    rows = add("Reshape", "view", x, view)
    mean = add("ReduceMean", "mean", rows, axis, keepdims=1)
    centred = add("Sub", "centred", rows, mean)
    variance = add("ReduceMean", "variance", add("Mul", "squares", centred, centred), axis, keepdims=1)
    deviation = add("Sqrt", "deviation", add("Add", "variance_eps", variance, epsilon))
    means = add("Reshape", "means", mean, statistics)
    deviations = add("Reshape", "deviations", deviation, statistics)
    normalized = add("Div", "normalized", add("Sub", "difference", x, means), deviations)
    add("Add", "shifted", add("Mul", "scaled", normalized, weight), bias)
    mark_float32(*writer.nodes[1:])
    return writer.nodes


def join_first_norm(model: ir.Model) -> tuple[str, ...]:
    """Write norms that `spell_first_norm` spelt out as LayerNormalization again, in place; returns their names."""
    joined: list[str] = []
    for division in [node for node in model.graph if node.op_type == "Div"]:
        spelt = _spelt(division)
        if spelt is not None:
            joined.append(_join(model.graph, spelt))
    remove_unused_initializers(model.graph)
    return tuple(joined)


@dataclasses.dataclass(frozen=True)
class _Spelt:
    """The nodes of a spelt-out norm in order, its input, weight and bias (C,), and epsilon."""

    nodes: tuple[ir.Node, ...]
    x: ir.Value
    weight: ir.Value
    bias: ir.Value
    epsilon: float


def _spelt(division: ir.Node) -> _Spelt | None:
    """The norm whose division is `division`; None where its nodes are others than `_spelt_out` writes."""
    try:
        difference, deviations = maker(division, 0, "Sub"), maker(division, 1, "Reshape")
        means = maker(difference, 1, "Reshape")
        mean = maker(means, 0, "ReduceMean")
        view = maker(mean, 0, "Reshape")
        deviation = maker(deviations, 0, "Sqrt")
        shifted = maker(deviation, 0, "Add")
        variance = maker(shifted, 0, "ReduceMean")
        squares = maker(variance, 0, "Mul")
        centred = maker(squares, 0, "Sub")
        scaled = reader(division, "Mul")
        result = reader(scaled, "Add")
    except LookupError:
        return None
    x, weight, bias = operand(difference, 0), operand(scaled, 1), operand(result, 1)
    epsilon = array_of(shifted.inputs[1])
    is_whole = (
        operand(view, 0) is x
        and operand(centred, 0) is view.outputs[0]
        and operand(centred, 1) is mean.outputs[0]
        and squares.inputs[0] is squares.inputs[1]
        and all(ints_of(node.inputs[1]) == [-1] for node in (mean, variance))
    )
    if not is_whole or epsilon is None or epsilon.size != 1 or array_of(weight) is None or array_of(bias) is None:
        return None
    nodes = (view, mean, centred, squares, variance, shifted, deviation, means, deviations, difference, division)
    return _Spelt((*nodes, scaled, result), x, weight, bias, float(epsilon.reshape(-1)[0]))


def _join(graph: ir.Graph, spelt: _Spelt) -> str:
    name = f"{owner(name_of(spelt.nodes[0]))}/LayerNormalization"
    inputs = [spelt.x, spelt.weight, spelt.bias]
    norm = new_node("LayerNormalization", inputs, name, axis=-1, epsilon=spelt.epsilon, stash_type=1)
    replace_nodes(spelt.nodes, [norm])
    return name

"""The LayerNorm behind the stem, spelt out, so that two kernels share its work with half the memory between them.

What follows it are a block's depthwise products, which read a token's neighbours: no kernel can make the norm and them
at once. Of a LayerNormalization the compiler makes the first half in one kernel and hands the centred tensor, in FP32,
to the next. Spelt out, with statistics from a view of the tensor (see `group_norm`), two numbers a token are handed on
and the tensor is read again as it was, in half. All of it is marked to stay in FP32: LayerNormalization keeps its
statistics there too.

On a grid stream, in models of MLP blocks, the compiler needs a kernel more for this form, so there the norm stays.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from spach_deploy.graph.editing import NodeWriter, constant, mark_float32, name_of, replace_nodes, shapes_at_batch_one

NAME = "spell_first_norm"
_NODE = "norm1/LayerNormalization"


def spell_first_norm(model: ir.Model) -> tuple[str, ...]:
    """Spell out the norm behind the stem, in place; its name, or nothing where tokens travel as a grid."""
    norm = next((node for node in model.graph if node.name == _NODE), None)
    if norm is None:
        return ()
    shape = shapes_at_batch_one(model)[name_of(norm.inputs[0])]
    if len(shape) != 3:
        return ()
    replace_nodes([norm], _spelt_out(model.graph, norm, *shape[1:]))
    return (_NODE,)


def _spelt_out(graph: ir.Graph, norm: ir.Node, tokens: int, channels: int) -> list[ir.Node]:
    """Nodes from the norm's input, (B, N, C), to its output."""
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

"""Write the LayerNorm after the stem as single operators, so that TensorRT moves half the bytes between two kernels.

Shifted depthwise products follow it. They read a token's neighbours, so TensorRT needs two kernels in any case. For a
LayerNormalization the first kernel stores the whole centred tensor in FP32 for the second. Written as single operators,
with statistics of a reshaped view (for the reason in `group_norm.py`), the first kernel stores two numbers a token, and
the second reads the norm's input again, in half precision. The operators are marked to stay in FP32, as the statistics
of LayerNormalization are.

Where the stream is a grid (models with MLP blocks), this form costs one kernel more, so the norm stays as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from spach_deploy.graph.editing import NodeWriter, constant, mark_float32, name_of, replace_nodes, shapes_at_batch_one

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

"""The LayerNorm behind the stem, spelt out, so that two kernels share its work with half the memory between them.

What follows it are a block's depthwise products, which read a token's neighbours: no kernel can make the norm and them
at once. Of a LayerNormalization the compiler makes the first half in one kernel and hands the centred tensor, in FP32,
to the next. Spelt out, with statistics from a view of the tensor (see `group_norm`), two numbers a token are handed on
and the tensor is read again as it was, in half. All of it is marked to stay in FP32: LayerNormalization keeps its
statistics there too.

On a grid stream, in models of MLP blocks, the compiler needs a kernel more for this form, so there the norm stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper

from spach_deploy.graph.edit import attributes, constant, mark_float32, replace_nodes, shapes_at_batch_one

NAME = "spell_first_norm"
_NODE = "norm1/LayerNormalization"


def spell_first_norm(model: ModelProto) -> tuple[str, ...]:
    """Spell out the norm behind the stem, in place; its name, or nothing where tokens travel as a grid."""
    graph = model.graph
    for index, node in enumerate(graph.node):
        if node.name == _NODE:
            shape = shapes_at_batch_one(model)[node.input[0]]
            if len(shape) == 3:
                replace_nodes(graph, {index: _spelt_out(graph, node, *shape[1:])})
                return (node.name,)
    return ()


def _spelt_out(graph: GraphProto, norm: NodeProto, tokens: int, channels: int) -> list[NodeProto]:
    """Nodes from the norm's input, (B, N, C), to its output."""
    x, weight, bias = norm.input
    views = {"view": [-1, tokens, 1, channels], "statistics": [-1, tokens, 1], "axis": [-1]}
    graph.initializer.extend(constant(f"norm1.{label}", np.array(value, np.int64)) for label, value in views.items())
    epsilon = np.array(attributes(norm).get("epsilon", 1e-5), np.float32)
    graph.initializer.append(constant("norm1.epsilon", epsilon))
    view = helper.make_node("Reshape", [x, "norm1.view"], ["norm1/view"], name="norm1/view")
    nodes: list[NodeProto] = []

    def add(op_type: str, label: str, *inputs: str, **options: Any) -> str:
        output = f"norm1/{label}"
        nodes.append(mark_float32(helper.make_node(op_type, list(inputs), [output], name=output, **options)))
        return output

    mean = add("ReduceMean", "mean", view.output[0], "norm1.axis", keepdims=1)
    centred = add("Sub", "centred", view.output[0], mean)
    variance = add("ReduceMean", "variance", add("Mul", "squares", centred, centred), "norm1.axis", keepdims=1)
    deviation = add("Sqrt", "deviation", add("Add", "variance_eps", variance, "norm1.epsilon"))
    means = add("Reshape", "means", mean, "norm1.statistics")
    deviations = add("Reshape", "deviations", deviation, "norm1.statistics")
    normalized = add("Div", "normalized", add("Sub", "difference", x, means), deviations)
    add("Add", "shifted", add("Mul", "scaled", normalized, weight), bias)
    nodes[-1].output[0] = norm.output[0]
    return [view, *nodes]

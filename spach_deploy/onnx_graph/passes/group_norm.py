"""GroupNorm of one group in a form that compiles to two passes over memory.

Statistics over (H, W, C) in one step make the compiler clear an accumulator, reduce with atomics, and do so twice. Taken
in two levels, each token over its channels and then the tokens, the first level is a row reduction like LayerNorm's and
the second works on one number a token:

    m_t = mean_c x,  v_t = mean_c (x - m_t)^2          a token's own mean and variance
    m = mean_t m_t,  v = mean_t (v_t + (m_t - m)^2)    law of total variance, nothing cancels
    y = (x - m) / sqrt(v + eps) * weight + bias

The normalization then fuses with what follows (the shifted depthwise products). All of it is marked to stay in FP32: a
decomposed normalization keeps no FP32 statistics of its own.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from spach_deploy.onnx_graph.graph import (
    attributes,
    constant,
    consumers,
    initializers,
    mark_float32,
    producers,
    remove_unused_initializers,
    replace_nodes,
)
from spach_deploy.onnx_graph.names import owner
from spach_deploy.onnx_graph.passes.block_boundaries import TO_CHANNELS_LAST, is_transpose


def split_group_norm(model: ModelProto) -> tuple[str, ...]:
    """Rewrite every GroupNorm(1) that a transpose to channels-last follows, in place; modules that changed.

    The exporter writes GroupNorm as Reshape, InstanceNormalization, Reshape, Mul, Add.
    """
    graph = model.graph
    made, read = producers(graph), consumers(graph)
    position = {node.name: index for index, node in enumerate(graph.node)}
    replacement: dict[int, list[NodeProto]] = {}
    changed: list[str] = []
    for node in list(graph.node):
        if node.op_type != "InstanceNormalization":
            continue
        before, back = made[node.input[0]], read[node.output[0]][0]
        scale = read[back.output[0]][0]
        shift = read[scale.output[0]][0]
        last = read[shift.output[0]]
        if len(last) != 1 or not is_transpose(last[0], TO_CHANNELS_LAST):
            continue
        name = owner(node.name)
        epsilon = attributes(node).get("epsilon", 1e-5)
        _store_constants(graph, name, _other(scale, back), _other(shift, scale), epsilon)
        replacement[position[shift.name]] = _two_level(name, before.input[0], last[0].output[0])
        replacement.update({position[old.name]: [] for old in (before, node, back, scale, last[0])})
        changed.append(name)
    replace_nodes(graph, replacement)
    remove_unused_initializers(graph)
    return tuple(changed)


def _other(node: NodeProto, producer: NodeProto) -> str:
    """The input of a binary node that `producer` does not make."""
    return next(name for name in node.input if name not in producer.output)


def _store_constants(graph: GraphProto, name: str, weight: str, bias: str, epsilon: object) -> None:
    known = initializers(graph)
    for label, source in (("scale", weight), ("shift", bias)):
        graph.initializer.append(constant(f"{name}.{label}", numpy_helper.to_array(known[source]).reshape(-1)))
    if f"{name}.epsilon" not in known:
        graph.initializer.append(constant(f"{name}.epsilon", np.array([epsilon], np.float32)))
    if "group_norm.channel" not in known:
        graph.initializer.append(constant("group_norm.channel", np.array([3], np.int64)))
        graph.initializer.append(constant("group_norm.tokens", np.array([1, 2], np.int64)))


def _two_level(name: str, source: str, target: str) -> list[NodeProto]:
    """Nodes from the convolution's (B, C, H, W) to the normalized (B, H, W, C)."""
    nodes: list[NodeProto] = []

    def add(op_type: str, label: str, *inputs: str, **options: object) -> str:
        output = f"{name}/{label}"
        nodes.append(mark_float32(helper.make_node(op_type, list(inputs), [output], name=output, **options)))
        return output

    x = f"{name}/channels_last"
    transpose = helper.make_node("Transpose", [source], [x], name=x, perm=TO_CHANNELS_LAST)
    token_mean = add("ReduceMean", "token_mean", x, "group_norm.channel", keepdims=1)
    centred = add("Sub", "token_centred", x, token_mean)
    squares = add("Mul", "token_squares", centred, centred)
    token_variance = add("ReduceMean", "token_variance", squares, "group_norm.channel", keepdims=1)
    mean = add("ReduceMean", "mean", token_mean, "group_norm.tokens", keepdims=1)
    spread = add("Sub", "spread", token_mean, mean)
    between = add("Mul", "between", spread, spread)
    total = add("Add", "total", token_variance, between)
    variance = add("ReduceMean", "variance", total, "group_norm.tokens", keepdims=1)
    deviation = add("Sqrt", "deviation", add("Add", "variance_eps", variance, f"{name}.epsilon"))
    normalized = add("Div", "normalized", add("Sub", "centred", x, mean), deviation)
    add("Add", "shifted", add("Mul", "scaled", normalized, f"{name}.scale"), f"{name}.shift")
    nodes[-1].output[0] = target
    return [transpose, *nodes]

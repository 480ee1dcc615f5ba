"""GroupNorm of one group in a form that compiles to two passes over memory, and keeps its digits on large images.

Statistics over (H, W, C) in one step make the compiler clear an accumulator, reduce with atomics, and do so twice.
Taken in two levels, each token over its channels and then the tokens, the first level is a row reduction like
LayerNorm's and the second works on one number a token:

    m_t = mean_c x,  v_t = mean_c (x - m_t)^2        a token's own mean and variance
    m = mean_t m_t,  v = mean_t (v_t + m_t^2) - m^2  law of total variance
    y = (x - m) / sqrt(v + eps) * weight + bias

For TensorRT both means over tokens stand side by side in one tensor, so one reduction makes them: with (m_t - m)^2 in
place of m_t^2 nothing would cancel, but m would be needed first and that costs a kernel. What cancels is the mean of
all channels and tokens alone, which a convolution without bias keeps small; the proof of the graph sees it where it is
not. On a CPU a reduction of one number a token costs nothing: there v = mean_t (v_t + (m_t - m)^2), and each mean over
tokens is one over rows and then one over columns, for ONNX Runtime adds one number after the other.

Statistics are taken from a view of the tensor, (B, N, 1, C): of one tensor with two readers the compiler would store
the FP32 numbers that the first kernel has computed, of a view and its tensor it stores the half ones that were there.

Its own GroupNorm so adds all of (C, H, W), which costs ms_conv_xxs a relative L2 of 1e-5 at 768 pixels. In levels it is
FP32's noise, and takes as long.

The normalization then fuses with what follows (the shifted depthwise products). All of it is marked to stay in FP32: a
decomposed normalization keeps no FP32 statistics of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from spach_deploy.graph.edit import (
    attributes,
    constant,
    consumers,
    initializers,
    mark_float32,
    producers,
    remove_unused_initializers,
    replace_nodes,
    shapes_at_batch_one,
)
from spach_deploy.graph.names import owner
from spach_deploy.graph.passes.block_boundaries import TO_CHANNELS_LAST, is_transpose


def split_group_norm(model: ModelProto) -> tuple[str, ...]:
    """Rewrite every GroupNorm(1) that a transpose to channels-last follows, in place; modules that changed.

    The exporter writes GroupNorm as Reshape, InstanceNormalization, Reshape, Mul, Add.
    """
    return _split(model, for_cpu=False)


def split_group_norm_for_cpu(model: ModelProto) -> tuple[str, ...]:
    """The same with nothing that cancels, and with few numbers in each sum."""
    return _split(model, for_cpu=True)


def _split(model: ModelProto, *, for_cpu: bool) -> tuple[str, ...]:
    graph = model.graph
    made, read = producers(graph), consumers(graph)
    position = {node.name: index for index, node in enumerate(graph.node)}
    shapes = shapes_at_batch_one(model)
    replacement: dict[int, list[NodeProto]] = {}
    changed: list[str] = []
    for node in list(graph.node):
        if node.op_type != "InstanceNormalization":
            continue
        before, chain = made[node.input[0]], _chain(graph, read, node)
        if not is_transpose(chain[-1], TO_CHANNELS_LAST):
            continue
        name = owner(node.name)
        _, channels, height, width = shapes[before.input[0]]
        rows = [-1, height, width, channels] if for_cpu else [-1, height * width, 1, channels]
        graph.initializer.append(constant(f"{name}.rows", np.array(rows, np.int64)))
        _store_constants(graph, name, chain, channels, attributes(node).get("epsilon", 1e-5))
        replacement[position[chain[-1].name]] = _two_level(
            name, before.input[0], chain[-1].output[0], _row_by_row if for_cpu else _one_reduction
        )
        replacement.update({position[old.name]: [] for old in (before, node, *chain[:-1])})
        changed.append(name)
    replace_nodes(graph, replacement)
    remove_unused_initializers(graph)
    return tuple(changed)


def _chain(graph: GraphProto, read: Mapping[str, list[NodeProto]], node: NodeProto) -> list[NodeProto]:
    """What follows the normalization: Reshape, Mul and Add where weight and bias are not 1 and 0, then its reader."""
    constants = initializers(graph)
    chain = [read[node.output[0]][0]]
    while len(following := read.get(chain[-1].output[0], [])) == 1:
        chain.append(following[0])
        if following[0].op_type not in ("Mul", "Add") or not any(name in constants for name in following[0].input):
            break
    return chain


def _store_constants(graph: GraphProto, name: str, chain: list[NodeProto], channels: int, epsilon: object) -> None:
    known = initializers(graph)
    for label, op_type, neutral in (("scale", "Mul", np.ones), ("shift", "Add", np.zeros)):
        found = [known[i] for node in chain if node.op_type == op_type for i in node.input if i in known]
        value = numpy_helper.to_array(found[0]).reshape(-1) if found else neutral(channels, np.float32)
        graph.initializer.append(constant(f"{name}.{label}", value))
    graph.initializer.append(constant(f"{name}.epsilon", np.array([epsilon], np.float32)))
    if "group_norm.channel" not in known:
        graph.initializer.append(constant("group_norm.channel", np.array([3], np.int64)))
        for label, axes in (("tokens", [1, 2]), ("rows", [1]), ("columns", [2])):
            graph.initializer.append(constant(f"group_norm.{label}", np.array(axes, np.int64)))


class _Float32Nodes:
    """Nodes of one GroupNorm, named after it and kept in FP32, as they are added."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.made: list[NodeProto] = []

    def add(self, op_type: str, label: str, *inputs: str, **options: Any) -> str:
        """The node's output."""
        (output,) = self.add_parts(op_type, label, (label,), *inputs, **options)
        return output

    def add_parts(self, op_type: str, label: str, parts: tuple[str, ...], *inputs: str, **options: Any) -> list[str]:
        """The node's outputs."""
        outputs = [f"{self.name}/{part}" for part in parts]
        node = helper.make_node(op_type, list(inputs), outputs, name=f"{self.name}/{label}", **options)
        self.made.append(mark_float32(node))
        return outputs


OverTokens = Callable[[_Float32Nodes, str, str], tuple[str, str]]
"""Adds the second level: from tokens' means and variances (B, N, 1, 1) or (B, H, W, 1) to the image's, (B, 1, 1, 1)."""


def _one_reduction(nodes: _Float32Nodes, token_mean: str, token_variance: str) -> tuple[str, str]:
    add = nodes.add
    token_power = add("Add", "token_power", token_variance, add("Mul", "token_mean_squared", token_mean, token_mean))
    both = add("Concat", "both", token_mean, token_power, axis=3)
    means = add("ReduceMean", "means", both, "group_norm.tokens", keepdims=1)
    mean, power = nodes.add_parts("Split", "split", ("mean", "power"), means, axis=3, num_outputs=2)
    return mean, add("Sub", "variance", power, add("Mul", "mean_squared", mean, mean))


def _row_by_row(nodes: _Float32Nodes, token_mean: str, token_variance: str) -> tuple[str, str]:
    def mean_of(label: str, numbers: str) -> str:
        rows = nodes.add("ReduceMean", f"{label}_of_rows", numbers, "group_norm.columns", keepdims=1)
        return nodes.add("ReduceMean", label, rows, "group_norm.rows", keepdims=1)

    mean = mean_of("mean", token_mean)
    moved = nodes.add("Sub", "token_mean_centred", token_mean, mean)
    squares = nodes.add("Mul", "token_mean_squared", moved, moved)
    return mean, mean_of("variance", nodes.add("Add", "token_power", token_variance, squares))


def _two_level(name: str, source: str, target: str, over_tokens: OverTokens) -> list[NodeProto]:
    """Nodes from the convolution's (B, C, H, W) to the normalized (B, H, W, C)."""
    nodes = _Float32Nodes(name)
    add = nodes.add
    x = f"{name}/channels_last"
    rows = f"{name}/rows"
    transpose = helper.make_node("Transpose", [source], [x], name=x, perm=TO_CHANNELS_LAST)
    reshape = helper.make_node("Reshape", [x, f"{name}.rows"], [rows], name=rows)
    token_mean = add("ReduceMean", "token_mean", rows, "group_norm.channel", keepdims=1)
    centred = add("Sub", "token_centred", rows, token_mean)
    squares = add("Mul", "token_squares", centred, centred)
    token_variance = add("ReduceMean", "token_variance", squares, "group_norm.channel", keepdims=1)
    mean, variance = over_tokens(nodes, token_mean, token_variance)
    deviation = add("Sqrt", "deviation", add("Add", "variance_eps", variance, f"{name}.epsilon"))
    normalized = add("Div", "normalized", add("Sub", "centred", x, mean), deviation)
    add("Add", "shifted", add("Mul", "scaled", normalized, f"{name}.scale"), f"{name}.shift")
    nodes.made[-1].output[0] = target
    return [transpose, reshape, *nodes.made]

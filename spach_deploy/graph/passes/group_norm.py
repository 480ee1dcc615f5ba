"""GroupNorm with one group as two levels of means: over a token's channels, then over tokens.

Why for TensorRT: statistics over (H, W, C) at once make it clear an accumulator and reduce with atomic additions, both
twice. In two levels the first is a reduction over rows, like LayerNorm's, and the second reads one number a token; the
whole takes two passes over memory. Why for a CPU: ONNX Runtime's GroupNorm adds up all of (C, H, W) one after the
other, which costs ms_conv_xxs a relative L2 of 1e-5 at 768 pixels. In two levels the error is FP32's rounding, in the
same time.

    m_t = mean_c x,  v_t = mean_c (x - m_t)^2        a token's own mean and variance
    m = mean_t m_t,  v = mean_t (v_t + m_t^2) - m^2  law of total variance
    y = (x - m) / sqrt(v + eps) * weight + bias

For TensorRT, m_t and v_t + m_t^2 are concatenated, so that one reduction makes both means over tokens. The subtraction
of m^2 cancels digits where m is large; m is the mean over all channels and tokens, which a convolution without bias
keeps small, and the comparison with the reference fails where it does not. The form without cancellation,
v = mean_t (v_t + (m_t - m)^2), needs m first, which costs TensorRT a kernel. On a CPU it costs nothing, so there it is
used, and each mean over tokens is a mean over a row's tokens and then over rows, to keep sums short.

Statistics are taken from a reshaped view, (B, N, 1, C). Of one tensor with two readers TensorRT would store the FP32
values; of a tensor and its view it stores the half-precision ones.

The normalization then fuses with the shifted depthwise products after it. All nodes are marked to stay in FP32, because
TensorRT keeps FP32 statistics only for a whole LayerNormalization.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from spach_deploy.graph.editing import (
    NodeWriter,
    array_of,
    constant,
    ints_of,
    is_transpose,
    maker,
    mark_float32,
    name_of,
    new_node,
    operand,
    owner,
    remove_unused_initializers,
    replace_nodes,
    shapes_at_batch_one,
)
from spach_deploy.graph.passes.block_boundaries import TO_CHANNELS_FIRST, TO_CHANNELS_LAST


def split_group_norm(model: ir.Model) -> tuple[str, ...]:
    """For TensorRT: rewrite every GroupNorm of images with one group, in place.

    Returns the paths of the changed modules. torch.onnx writes GroupNorm as Reshape, InstanceNormalization, Reshape,
    Mul, Add.
    """
    return _split(model, for_cpu=False)


def split_group_norm_for_cpu(model: ir.Model) -> tuple[str, ...]:
    """`split_group_norm` for a CPU: with the variance that cancels no digits, and short sums."""
    return _split(model, for_cpu=True)


def _split(model: ir.Model, *, for_cpu: bool) -> tuple[str, ...]:
    graph, shapes = model.graph, shapes_at_batch_one(model)
    changed: list[str] = []
    for norm in [node for node in graph if node.op_type == "InstanceNormalization"]:
        before, chain = _before(norm), _chain(norm)
        source, name = operand(before, 0), owner(name_of(norm))
        shape = shapes.get(name_of(source), ())
        if len(shape) == 4 and _groups(norm) == 1:
            _, channels, height, width = shape
            rows = [-1, height, width, channels] if for_cpu else [-1, height * width, 1, channels]
            stored = _constants(graph, norm, chain, rows)
            new = _two_level(name, source, stored, _row_by_row if for_cpu else _one_reduction)
            if not is_transpose(chain[-1], TO_CHANNELS_LAST):
                new.append(new_node("Transpose", new[-1].outputs, f"{name}/channels_first", perm=TO_CHANNELS_FIRST))
            replace_nodes([before, norm, *chain], new)
            changed.append(name)
    remove_unused_initializers(graph)
    return tuple(changed)


def _before(norm: ir.Node) -> ir.Node:
    """The Reshape in front of the normalization."""
    node = operand(norm, 0).producer()
    if node is None:
        raise LookupError(f"nothing makes the input of {norm.name}")
    return node


def _groups(norm: ir.Node) -> int:
    """Number of groups: torch.onnx normalizes each as one channel."""
    weight = array_of(norm.inputs[1])
    return 0 if weight is None else weight.size


def _chain(norm: ir.Node) -> list[ir.Node]:
    """The nodes after the normalization: Reshape, Mul (if the weight is not 1), Add (if the bias is not 0), and the
    reader if that transposes to channels-last.
    """
    chain = [norm.outputs[0].consumers()[0]]
    while len(following := chain[-1].outputs[0].consumers()) == 1:
        (node,) = following
        if is_transpose(node, TO_CHANNELS_LAST):
            return [*chain, node]
        if node.op_type not in ("Mul", "Add") or _constant_input(node) is None:
            break
        chain.append(node)
    return chain


def _constant_input(node: ir.Node) -> ir.Value | None:
    return next((value for value in node.inputs if array_of(value) is not None), None)


def _constants(graph: ir.Graph, norm: ir.Node, chain: list[ir.Node], rows: list[int]) -> dict[str, ir.Value]:
    """Initializers by label: shape of the view, scale, shift and epsilon of one GroupNorm, and the shared axes."""
    name = owner(name_of(norm))
    stored = {"view": constant(graph, f"{name}.rows", rows)}
    for label, op_type, neutral in (("scale", "Mul", np.ones), ("shift", "Add", np.zeros)):
        found = (array_of(_constant_input(node)) for node in chain if node.op_type == op_type)
        value = next((array.reshape(-1) for array in found if array is not None), None)
        value = neutral(rows[-1], np.float32) if value is None else value
        stored[label] = constant(graph, f"{name}.{label}", value)
    epsilon = np.array([norm.attributes.get_float("epsilon", 1e-5)], np.float32)
    stored["epsilon"] = constant(graph, f"{name}.epsilon", epsilon)
    for label, axes in (("channel", [3]), ("tokens", [1, 2]), ("rows", [1]), ("columns", [2])):
        stored[label] = constant(graph, f"group_norm.{label}", axes)
    return stored


Stored = Mapping[str, ir.Value]
OverTokens = Callable[[NodeWriter, Stored, ir.Value, ir.Value], tuple[ir.Value, ir.Value]]
"""Adds the second level: from tokens' means and variances, (B, N, 1, 1) or (B, H, W, 1), to an
image's, (B, 1, 1, 1).
"""


def _one_reduction(
    writer: NodeWriter, stored: Stored, token_mean: ir.Value, token_variance: ir.Value
) -> tuple[ir.Value, ir.Value]:
    add = writer.add
    token_power = add("Add", "token_power", token_variance, add("Mul", "token_mean_squared", token_mean, token_mean))
    both = add("Concat", "both", token_mean, token_power, axis=3)
    means = add("ReduceMean", "means", both, stored["tokens"], keepdims=1)
    mean, power = writer.add_parts("Split", "split", ("mean", "power"), means, axis=3, num_outputs=2)
    return mean, add("Sub", "variance", power, add("Mul", "mean_squared", mean, mean))


def _row_by_row(
    writer: NodeWriter, stored: Stored, token_mean: ir.Value, token_variance: ir.Value
) -> tuple[ir.Value, ir.Value]:
    def mean_of(label: str, numbers: ir.Value) -> ir.Value:
        rows = writer.add("ReduceMean", f"{label}_of_rows", numbers, stored["columns"], keepdims=1)
        return writer.add("ReduceMean", label, rows, stored["rows"], keepdims=1)

    mean = mean_of("mean", token_mean)
    moved = writer.add("Sub", "token_mean_centred", token_mean, mean)
    squares = writer.add("Mul", "token_mean_squared", moved, moved)
    return mean, mean_of("variance", writer.add("Add", "token_power", token_variance, squares))


def _two_level(name: str, source: ir.Value, stored: Stored, over_tokens: OverTokens) -> list[ir.Node]:
    """Nodes that make the normalized (B, H, W, C) of the convolution's (B, C, H, W)."""
    writer = NodeWriter(name)
    add = writer.add
    made = source.producer()
    x = (
        operand(made, 0)
        if made is not None and is_transpose(made, TO_CHANNELS_FIRST)
        else add("Transpose", "channels_last", source, perm=TO_CHANNELS_LAST)
    )
    views = len(writer.nodes) + 1
    rows = add("Reshape", "rows", x, stored["view"])
    token_mean = add("ReduceMean", "token_mean", rows, stored["channel"], keepdims=1)
    centred = add("Sub", "token_centred", rows, token_mean)
    squares = add("Mul", "token_squares", centred, centred)
    token_variance = add("ReduceMean", "token_variance", squares, stored["channel"], keepdims=1)
    mean, variance = over_tokens(writer, stored, token_mean, token_variance)
    deviation = add("Sqrt", "deviation", add("Add", "variance_eps", variance, stored["epsilon"]))
    normalized = add("Div", "normalized", add("Sub", "centred", x, mean), deviation)
    add("Add", "shifted", add("Mul", "scaled", normalized, stored["scale"]), stored["shift"])
    mark_float32(*writer.nodes[views:])
    return writer.nodes


def shorten_group_norm(model: ir.Model) -> tuple[str, ...]:
    """Give each GroupNorm that `split_group_norm` wrote the sums for a CPU, in place; paths of the changed modules."""
    graph, shapes = model.graph, shapes_at_batch_one(model)
    changed: list[str] = []
    for split in [node for node in graph if node.op_type == "Split"]:
        found = _second_level(split)
        shape = () if found is None else shapes.get(name_of(found.rows.inputs[0]), ())
        if found is not None and len(shape) == 4:
            _shorten(graph, found, shape)
            changed.append(owner(name_of(split)))
    remove_unused_initializers(graph)
    return tuple(changed)


@dataclasses.dataclass(frozen=True)
class _SecondLevel:
    """What `_one_reduction` wrote, and around it: `rows`, the view, and the values that enter and leave.

    `nodes`: in order, the first is the one behind which all that enters is there.
    """

    rows: ir.Node
    token_mean: ir.Value
    token_variance: ir.Value
    nodes: tuple[ir.Node, ...]
    mean: ir.Value
    variance: ir.Value


def _second_level(split: ir.Node) -> _SecondLevel | None:
    try:
        means = maker(split, 0, "ReduceMean")
        both = maker(means, 0, "Concat")
        token_mean, power = maker(both, 0, "ReduceMean"), maker(both, 1, "Add")
        token_variance, square = maker(power, 0, "ReduceMean"), maker(power, 1, "Mul")
        rows = maker(token_mean, 0, "Reshape")
        (variance,) = split.outputs[1].consumers()
        mean_square = maker(variance, 1, "Mul")
    except (LookupError, ValueError):
        return None
    is_whole = (
        square.inputs[0] is square.inputs[1] is token_mean.outputs[0]
        and mean_square.inputs[0] is mean_square.inputs[1] is split.outputs[0]
        and (variance.op_type, len(split.outputs), ints_of(means.inputs[1])) == ("Sub", 2, [1, 2])
    )
    nodes = (square, power, both, means, split, mean_square, variance)
    values = (token_mean.outputs[0], token_variance.outputs[0])
    return _SecondLevel(rows, *values, nodes, split.outputs[0], variance.outputs[0]) if is_whole else None


def _shorten(graph: ir.Graph, found: _SecondLevel, shape: tuple[int, ...]) -> None:
    _, height, width, channels = shape
    path = owner(name_of(found.nodes[0]))
    stored = {label: constant(graph, f"group_norm.{label}", axes) for label, axes in (("rows", [1]), ("columns", [2]))}
    view = constant(graph, f"{path}.rows/{height}x{width}", [-1, height, width, channels])
    found.rows.replace_input_with(1, view)
    writer = NodeWriter(path)
    made = _row_by_row(writer, stored, found.token_mean, found.token_variance)
    mark_float32(*writer.nodes)
    ir.convenience.replace_nodes_and_values(
        graph, found.nodes[0], found.nodes, writer.nodes, [found.mean, found.variance], made
    )

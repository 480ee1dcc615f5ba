"""QuantizeLinear to INT8 spelt out behind a product, so that TensorRT for RTX computes it in the product's epilogue.

In half precision the compiler computes bias and GELU in the kernel of the product before them. It leaves both out, as a
pass of its own over the widest tensor of the network, where QuantizeLinear follows: its rounding is an operator that no
epilogue has (RTX 1.7.1, sm80 to sm120; FP8, which is rounded by a cast, has no such trouble). Additions it has, and
they round as well. With c = 1.5 * 2^23, an FP32 number near c has no fraction, so that

    round(x / s) = (x / s + c) - c          clip(x / s + c, c - 128, c + 127) - c = clip(round(x / s), -128, 127)

which is QuantizeLinear bit for bit: to nearest, ties to even, saturated. The limits stand between the two additions, so
that nobody joins them to x + 0. One MLP of ms_hybrid_s takes 18 MB instead of 28 and a kernel less.

Weights keep their QuantizeLinear: they are constants. `join_quantizers` takes it all back.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.graph.editing import (
    array_of,
    maker,
    name_of,
    new_node,
    operand,
    product_of,
    remove_unused_initializers,
    replace_nodes,
    tensor_of,
)
from spach_deploy.graph.precision.formats import FLOAT, decode

SHIFT = 1.5 * 2.0**23
LOWEST, HIGHEST = -128, 127
_SCALED, _SHIFTED, _CLIPPED, _ROUNDED = "/scaled", "/shifted", "/clipped", "/rounded"


def spell_quantizers(model: ir.Model) -> tuple[str, ...]:
    """Spell out every QuantizeLinear that follows a product in floating point, in place; returns their names."""
    found = [node for node in model.graph if _is_spellable(node)]
    for node in found:
        _spell(model.graph, node)
    remove_unused_initializers(model.graph)
    return tuple(map(name_of, found))


def _is_spellable(node: ir.Node) -> bool:
    if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
        return False
    scale, zero = array_of(node.inputs[1]), operand(node, 2)
    if scale is None or scale.ndim or zero.dtype != ir.DataType.INT8:
        return False
    product = product_of(operand(node, 0))
    return product is not None and not any(
        value is not None and (source := value.producer()) is not None and source.op_type == "DequantizeLinear"
        for value in product.inputs
    )


def _spell(graph: ir.Graph, node: ir.Node) -> None:
    source, scale, name = operand(node, 0), operand(node, 1), name_of(node)
    nodes: list[ir.Node] = []
    if source.dtype != FLOAT:
        nodes.append(new_node("Cast", [source], f"{name}/to_fp32", to=FLOAT))
        source = nodes[-1].outputs[0]
        scale = _scalar(graph, f"{scale.name}/fp32", decode(tensor_of(scale)))
    shift, lowest, highest = (
        _scalar(graph, f"spelt_quantize.{what}", np.array(value, np.float32))
        for what, value in (("shift", SHIFT), ("lowest", SHIFT + LOWEST), ("highest", SHIFT + HIGHEST))
    )
    for op_type, ending, others in (
        ("Div", _SCALED, (scale,)),
        ("Add", _SHIFTED, (shift,)),
        ("Clip", _CLIPPED, (lowest, highest)),
        ("Sub", _ROUNDED, (shift,)),
    ):
        nodes.append(new_node(op_type, [source, *others], f"{name}{ending}"))
        source = nodes[-1].outputs[0]
    nodes.append(new_node("Cast", [source], f"{name}/to_int8", to=ir.DataType.INT8))
    replace_nodes([node], nodes)
    nodes[-1].name = name


def _scalar(graph: ir.Graph, name: str, value: NDArray[np.generic]) -> ir.Value:
    """The initializer called `name`, added with the number `value` where the graph has none yet."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.Tensor(value.reshape(()), name=name)))
    return graph.initializers[name]


def join_quantizers(model: ir.Model) -> tuple[str, ...]:
    """Write a QuantizeLinear again where `spell_quantizers` spelt one out, in place; returns their names."""
    found = [(node, nodes) for node in model.graph if (nodes := _spelt(node)) is not None]
    for last, nodes in found:
        first, name = nodes[0], name_of(last)
        zero = _scalar(model.graph, f"{name.removesuffix('/quantize')}/zero", np.array(0, np.int8))
        joined = new_node("QuantizeLinear", [first.inputs[0], first.inputs[1], zero], f"{name}/joined")
        replace_nodes(nodes, [joined])
        joined.name = name
    remove_unused_initializers(model.graph)
    return tuple(name_of(last) for last, _ in found)


def _spelt(last: ir.Node) -> list[ir.Node] | None:
    """The nodes that `_spell` made of a QuantizeLinear, whose last is `last`; None for any other node."""
    if last.op_type != "Cast" or last.attributes.get_int("to", 0) != ir.DataType.INT8:
        return None
    try:
        rounded = maker(last, 0, "Sub")
        clipped = maker(rounded, 0, "Clip")
        shifted = maker(clipped, 0, "Add")
        scaled = maker(shifted, 0, "Div")
    except LookupError:
        return None
    constants = [*clipped.inputs[1:], shifted.inputs[1], rounded.inputs[1]]
    expected = [SHIFT + LOWEST, SHIFT + HIGHEST, SHIFT, SHIFT]
    arrays = [array_of(value) for value in constants]
    if [None if array is None else array.item() for array in arrays] != expected or array_of(scaled.inputs[1]) is None:
        return None
    return [scaled, shifted, clipped, rounded, last]

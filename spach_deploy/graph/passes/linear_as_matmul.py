"""Write quantized linear layers (Gemm) as MatMul and Add, which ONNX Runtime computes in eight bits on CPUs.

    Gemm(x, W, b, transB=1), x (B*N, C)   =>   MatMul(x, W^T) + b, x (1, B*N, C)

ONNX Runtime fuses Q/DQ pairs and the MatMul after them into one integer product with float output; before a Gemm with a
float bias it does not. It also fuses MatMul and Add of two-dimensional rows back into a Gemm, so rows get a leading
axis of one. For TensorRT the Gemm is the better form, so this pass is for CPUs only.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from spach_deploy.graph.editing import (
    array_of,
    constant,
    is_marked_quantized,
    name_of,
    new_node,
    operand,
    remove_unused_initializers,
    replace_nodes,
    tensor_of,
)

NAME = "linear_as_matmul"


def linear_as_matmul(model: ir.Model) -> tuple[str, ...]:
    """Rewrite every Gemm that is marked as quantized, in place; returns their names, which the MatMuls keep."""
    graph = model.graph
    chosen = [node for node in graph if _is_candidate(node)]
    for node in chosen:
        _add_axis(graph, node)
    for node in chosen:
        replace_nodes([node], _product(graph, node))
    remove_unused_initializers(graph)
    return tuple(name_of(node) for node in chosen)


def _is_candidate(node: ir.Node) -> bool:
    """Whether `node` is a marked Gemm with a constant, transposed weight, whose rows a Reshape makes (see `_rows`)."""
    if node.op_type != "Gemm" or not is_marked_quantized(node):
        return False
    options = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    options |= {name: attribute.value for name, attribute in node.attributes.items()}
    plain = options == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    weight = node.inputs[1]
    return plain and weight is not None and weight.const_value is not None and _rows(node) is not None


def _rows(node: ir.Node) -> ir.Node | None:
    """The Reshape that made a Gemm's rows (B*N, C); activations and other Gemms may be between. None without one."""
    source = _maker(node)
    while source is not None and source.op_type in ("Gelu", "Relu", "Sigmoid", "Mul", "Gemm"):  # SiLU is x * Sigmoid(x)
        source = _maker(source)
    return source if source is not None and source.op_type == "Reshape" else None


def _maker(node: ir.Node) -> ir.Node | None:
    """The node that makes the first input of `node`."""
    return operand(node, 0).producer()


def _add_axis(graph: ir.Graph, node: ir.Node) -> None:
    """Change the Reshape that makes the rows of `node` from (-1, C) to (1, -1, C), unless that is done already."""
    reshape = _rows(node)
    shape = None if reshape is None else array_of(reshape.inputs[1])
    if reshape is not None and shape is not None and len(shape) == 2:
        reshape.replace_input_with(1, constant(graph, f"{reshape.name}/shape_rows", [1, -1, int(shape[1])]))


def _transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    name = f"{weight.name}/transposed"
    found = graph.initializers.get(name)
    return constant(graph, name, tensor_of(weight).numpy().T) if found is None else found


def _product(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """MatMul and Add for a Gemm; the MatMul has the Gemm's name.

    Without a bias zeros are added: the correction of a quantized layer's mean needs a place.
    """
    x, weight, bias = operand(node, 0), operand(node, 1), node.inputs[2] if len(node.inputs) > 2 else None
    product = new_node("MatMul", [x, _transposed(graph, weight)], name_of(node), [f"{node.name}/product"])
    return [product, new_node("Add", [product.outputs[0], bias or _zeros(graph, weight)], f"{node.name}/bias")]


def _zeros(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    return constant(graph, f"{weight.name}/no_bias", np.zeros(len(tensor_of(weight).numpy()), np.float32))

"""Quantized linear layers as MatMul and Add, which ONNX Runtime computes in eight bits on CPUs.

    Gemm(x, W, b, transB=1), x (B*N, C)   =>   MatMul(x, W^T) + b, x (1, B*N, C)

A pair in front of a MatMul becomes one integer product that hands out floats; in front of a Gemm with a floating-point
bias the product stays FP32. ONNX Runtime makes a Gemm of MatMul and Add on rows, so these get a leading axis of one. To
TensorRT the Gemm is the better form.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from spach_deploy.graph.edit import (
    attributes,
    constant,
    initializers,
    is_marked_quantized,
    producers,
    remove_unused_initializers,
    replace_nodes,
)

NAME = "linear_as_matmul"


def linear_as_matmul(model: ModelProto) -> tuple[str, ...]:
    """Rewrite every Gemm that is marked as quantized, in place; names of the changed nodes, which stay."""
    graph = model.graph
    chosen = {index: node for index, node in enumerate(graph.node) if _is_candidate(graph, node)}
    for node in chosen.values():
        _add_axis(graph, node.input[0])
    replacement = {index: _nodes(node, _transposed(graph, node.input[1])) for index, node in chosen.items()}
    names = tuple(node.name for node in chosen.values())
    replace_nodes(graph, replacement)
    remove_unused_initializers(graph)
    return names


def _is_candidate(graph: GraphProto, node: NodeProto) -> bool:
    """A marked Gemm of a constant, transposed weight whose rows come from a reshape, at most through pointwise work."""
    if node.op_type != "Gemm" or not is_marked_quantized(node):
        return False
    options = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0, **attributes(node)}
    plain = options == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    return plain and node.input[1] in initializers(graph) and (_rows(graph, node.input[0]) is not None)


def _rows(graph: GraphProto, tensor: str) -> NodeProto | None:
    """The Reshape that made rows (B*N, C) of `tensor`; an activation and the Gemm before it may stand between."""
    made = producers(graph)
    node = made.get(tensor)
    while node is not None and node.op_type in ("Gelu", "Relu", "Sigmoid", "Mul", "Gemm"):  # SiLU is x * Sigmoid(x)
        node = made.get(node.input[0])
    return node if node is not None and node.op_type == "Reshape" else None


def _add_axis(graph: GraphProto, tensor: str) -> None:
    """(-1, C) -> (1, -1, C), once."""
    reshape = _rows(graph, tensor)
    assert reshape is not None
    shape = numpy_helper.to_array(initializers(graph)[reshape.input[1]])
    if len(shape) != 2:
        return
    name = f"{reshape.name}/shape_rows"
    graph.initializer.append(constant(name, np.array([1, -1, shape[1]], np.int64)))
    reshape.input[1] = name


def _transposed(graph: GraphProto, weight: str) -> str:
    name = f"{weight}/transposed"
    known = initializers(graph)
    if name not in known:
        graph.initializer.append(constant(name, np.ascontiguousarray(numpy_helper.to_array(known[weight]).T)))
    return name


def _nodes(node: NodeProto, weight: str) -> list[NodeProto]:
    if len(node.input) < 3:
        return [helper.make_node("MatMul", [node.input[0], weight], list(node.output), name=node.name)]
    product = f"{node.name}/product"
    return [
        helper.make_node("MatMul", [node.input[0], weight], [product], name=node.name),
        helper.make_node("Add", [product, node.input[2]], list(node.output), name=f"{node.name}/bias"),
    ]

"""What the passes over `onnx_ir` graphs share: new nodes, constants, marks, and the way to onnx's own functions.

Values know the node that makes them and the nodes that read them, so nothing is looked up by name but shapes, which
onnx infers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto

from spach_deploy.runtime.onnxruntime_runner import message_of, tensor_proto

FLOAT32_KEY = "spach.precision"
"""metadata_props key of a node that half precision leaves in FP32 (value "fp32")."""

QUANTIZED_KEY = "spach.quantized"
"""metadata_props key of a node that passes leave whole, because it is quantized."""


def name_of(part: ir.Node | ir.Value | None) -> str:
    """Name of a node or a tensor, "" where it has none."""
    return "" if part is None or part.name is None else part.name


def operand(node: ir.Node, index: int) -> ir.Value:
    """An input that `node` has."""
    value = node.inputs[index]
    assert value is not None
    return value


def made_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """The tensors that nodes make, in order."""
    return (value for node in graph for value in node.outputs if value.name)


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """What an initializer holds."""
    assert value.const_value is not None
    return value.const_value


def weight_bytes(model: ir.Model) -> int:
    """Of all constants together."""
    return sum(tensor_of(value).nbytes for value in model.graph.initializers.values())


class NodeWriter:
    """New nodes of one module in their order, named `path/label`, as is what they make."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, label: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The output of a new node."""
        (output,) = self.add_parts(op_type, label, (label,), *inputs, **attributes)
        return output

    def add_parts(
        self, op_type: str, label: str, parts: Sequence[str], *inputs: ir.Value | None, **attributes: Any
    ) -> Sequence[ir.Value]:
        """The outputs of a new node, each named `path/part`."""
        outputs = [f"{self.path}/{part}" for part in parts]
        self.nodes.append(new_node(op_type, inputs, f"{self.path}/{label}", outputs, **attributes))
        return self.nodes[-1].outputs


def new_node(
    op_type: str, inputs: Sequence[ir.Value | None], name: str, outputs: Sequence[str] = (), **attributes: Any
) -> ir.Node:
    """A node that is in no graph yet; its only output has its name where `outputs` says nothing else."""
    values = [ir.val(output) for output in outputs or (name,)]
    return ir.node(op_type, inputs, dict(sorted(attributes.items())), outputs=values, name=name)


def replace_nodes(old: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
    """Put `new` in the place of the first of `old`. What the last of `new` makes takes the name and the readers of what
    the last of `old` makes.
    """
    graph = old[0].graph
    assert graph is not None
    ir.convenience.replace_nodes_and_values(graph, old[0], old, new, [old[-1].outputs[0]], [new[-1].outputs[0]])


def constant(graph: ir.Graph, name: str, value: NDArray[np.generic] | Sequence[int]) -> ir.Value:
    """The initializer of that name; made of `value` (integers as int64) where there is none yet."""
    if name not in graph.initializers:
        array = np.ascontiguousarray(value if isinstance(value, np.ndarray) else np.array(value, np.int64))
        graph.register_initializer(ir.val(name, const_value=ir.Tensor(array, name=name)))
    return graph.initializers[name]


def array_of(value: ir.Value | None) -> NDArray[Any] | None:
    """What an initializer holds; None for what a node makes or the caller sends."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def set_ints(node: ir.Node, attribute: str, values: Sequence[int]) -> None:
    """Give a node an attribute of integers, in the place of the one of that name."""
    node.attributes[attribute] = ir.AttrInt64s(attribute, values)


def is_transpose(node: ir.Node | None, perm: Sequence[int]) -> bool:
    """Whether `node` is a Transpose of exactly this permutation."""
    return node is not None and node.op_type == "Transpose" and list(permutation(node)) == list(perm)


def permutation(node: ir.Node) -> Sequence[int]:
    """That of a Transpose; empty where it is not written out."""
    return node.attributes.get_ints("perm", ())


def is_read(value: ir.Value) -> bool:
    """Whether a node or the caller reads `value`."""
    return bool(value.uses()) or value.is_graph_output()


def remove_unused_initializers(graph: ir.Graph) -> None:
    """Drop constants that nothing reads."""
    for name, value in list(graph.initializers.items()):
        if not is_read(value):
            del graph.initializers[name]


def mark_float32(*nodes: ir.Node) -> None:
    """Ask the precision step to leave these nodes in FP32."""
    for node in nodes:
        node.metadata_props[FLOAT32_KEY] = "fp32"


def is_marked_float32(node: ir.Node) -> bool:
    """Whether `mark_float32` was asked for this node."""
    return node.metadata_props.get(FLOAT32_KEY) == "fp32"


def mark_quantized(node: ir.Node) -> None:
    """Keep passes from taking this node apart: its inputs will go through eight bits."""
    node.metadata_props[QUANTIZED_KEY] = "yes"


def is_marked_quantized(node: ir.Node) -> bool:
    """Whether `mark_quantized` was asked for this node."""
    return QUANTIZED_KEY in node.metadata_props


def as_proto(model: ir.Model) -> ModelProto:
    """`model` as model.onnx holds it: with a copy of all weights, without shapes between the nodes."""
    proto = message_of(model, model.graph.inputs)
    for value in model.graph.initializers.values():
        proto.graph.initializer.append(tensor_proto(value))
    return proto


def without_weights(model: ir.Model) -> ModelProto:
    """The graph, its constants as inputs but for integers: types and shapes do not depend on weights' values."""
    constants = [value for value in model.graph.initializers.values() if not value.is_graph_input()]
    integers = [value for value in constants if value.dtype == ir.DataType.INT64]
    others = [value for value in constants if value.dtype != ir.DataType.INT64]
    return message_of(model, (*model.graph.inputs, *others), integers)


def shapes_at_batch_one(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor for one image, as far as ONNX can tell, by name."""
    light = without_weights(model)
    for value in (*light.graph.input, *light.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_param:
            dims[0].dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values}


def live_elements_at_batch_one(model: ir.Model) -> int:
    """Numbers that have to be in memory at once for one image, weights aside, in the order of the nodes."""
    shapes = shapes_at_batch_one(model)
    last = {value: index for index, node in enumerate(model.graph) for value in node.inputs}
    alive: dict[ir.Value | None, int] = {}
    most = 0
    for index, node in enumerate(model.graph):
        alive |= {value: math.prod(shapes[name_of(value)]) for value in node.outputs if value.name in shapes}
        most = max(most, sum(alive.values()))
        for value in (*node.inputs, *node.outputs):
            if last.get(value, index) == index:
                alive.pop(value, None)
    return most

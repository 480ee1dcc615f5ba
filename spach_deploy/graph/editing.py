"""Helpers for passes over `onnx_ir` graphs: make and replace nodes, add constants, mark nodes, infer shapes.

Throughout: a value's *maker* is the node whose output it is, its *readers* are the nodes whose input it is. Both are
known to `onnx_ir`. Only shapes are looked up by name, because onnx infers them on a protobuf.

`name_by_module` gives node and tensor names that begin with the PyTorch module path, such as
`layer3.5.spatial_func.qkv/Gemm`.

torch.onnx writes the stack of modules into each node's metadata, from which the node and its output get their name.
TensorRT makes layer names of node names, so profiles and errors of an engine name modules.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
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
"""metadata_props key of a node that will be quantized; passes do not take it apart."""


def name_of(part: ir.Node | ir.Value | None) -> str:
    """Name of a node or a tensor, "" where it has none."""
    return "" if part is None or part.name is None else part.name


def operand(node: ir.Node, index: int) -> ir.Value:
    """Input `index` of `node`, which must have it."""
    value = node.inputs[index]
    assert value is not None
    return value


def made_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """All outputs of all nodes, in order; not the graph's inputs and initializers."""
    return (value for node in graph for value in node.outputs if value.name)


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """The data of an initializer, which `value` must be."""
    assert value.const_value is not None
    return value.const_value


def weight_bytes(model: ir.Model) -> int:
    """Size of all initializers together, in bytes."""
    return sum(tensor_of(value).nbytes for value in model.graph.initializers.values())


class NodeWriter:
    """Collects new nodes of one module, in order. A node and its output are named `path/label`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, label: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a node with one output, which is returned. `attributes` are the node's."""
        (output,) = self.add_parts(op_type, label, (label,), *inputs, **attributes)
        return output

    def add_parts(
        self, op_type: str, label: str, parts: Sequence[str], *inputs: ir.Value | None, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs, named `path/part` for each of `parts`, and return them."""
        outputs = [f"{self.path}/{part}" for part in parts]
        self.nodes.append(new_node(op_type, inputs, f"{self.path}/{label}", outputs, **attributes))
        return self.nodes[-1].outputs


def new_node(
    op_type: str, inputs: Sequence[ir.Value | None], name: str, outputs: Sequence[str] = (), **attributes: Any
) -> ir.Node:
    """A node that is in no graph yet. Without names in `outputs` it has one output, called `name`."""
    values = [ir.val(output) for output in outputs or (name,)]
    return ir.node(op_type, inputs, dict(sorted(attributes.items())), outputs=values, name=name)


def replace_nodes(old: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
    """Replace the nodes `old` by the nodes `new`, which go where the first of `old` was.

    The output of the last new node takes the name and the readers of the output of the last old node.
    """
    graph = old[0].graph
    assert graph is not None
    ir.convenience.replace_nodes_and_values(graph, old[0], old, new, [old[-1].outputs[0]], [new[-1].outputs[0]])


def constant(graph: ir.Graph, name: str, value: NDArray[np.generic] | Sequence[int]) -> ir.Value:
    """The initializer called `name`, added with `value` (a list of integers as int64) where the graph has none yet."""
    if name not in graph.initializers:
        array = np.ascontiguousarray(value if isinstance(value, np.ndarray) else np.array(value, np.int64))
        graph.register_initializer(ir.val(name, const_value=ir.Tensor(array, name=name)))
    return graph.initializers[name]


def unused_name(graph: ir.Graph, name: str) -> str:
    """`name`, or a longer one where an initializer has it."""
    while name in graph.initializers:
        name += "/again"
    return name


def array_of(value: ir.Value | None) -> NDArray[Any] | None:
    """The data of an initializer; None for a node's output, a graph input and no value."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def ints_of(value: ir.Value | None) -> list[int]:
    """The integers of an initializer, such as axes or a shape; none for any other value."""
    array = array_of(value)
    return [] if array is None or array.dtype.kind not in "iu" else [int(number) for number in array.reshape(-1)]


def maker(node: ir.Node, index: int, op_type: str) -> ir.Node:
    """The node that makes input `index` of `node`; LookupError where that is no `op_type`."""
    value = node.inputs[index] if index < len(node.inputs) else None
    made = None if value is None else value.producer()
    if made is None or made.op_type != op_type:
        raise LookupError(f"no {op_type} makes input {index} of {node.name}")
    return made


def reader(node: ir.Node, op_type: str) -> ir.Node:
    """The only reader of what `node` makes; LookupError where there are others, or it is no `op_type`."""
    readers = node.outputs[0].consumers()
    if [found.op_type for found in readers] != [op_type] or node.outputs[0].is_graph_output():
        raise LookupError(f"not one {op_type} reads {node.name}")
    return readers[0]


_POINTWISE = frozenset(
    ("Add", "Cast", "Clip", "Div", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Mul", "Relu", "Sigmoid", "Sub", "Tanh")
)


def product_of(value: ir.Value) -> ir.Node | None:
    """The one product (Gemm, MatMul) that `value` follows from number by number, as by a bias and an activation; None
    where it is computed of anything else.
    """
    found: set[ir.Node] = set()
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        if current.is_initializer():
            continue
        node = current.producer()
        if node is not None and node.op_type in ("Gemm", "MatMul"):
            found.add(node)
        elif node is not None and node.op_type in _POINTWISE:
            following = {given for given in node.inputs if given is not None} - seen
            seen |= following
            pending.extend(following)
        else:
            return None
    return found.pop() if len(found) == 1 else None


def set_ints(node: ir.Node, attribute: str, values: Sequence[int]) -> None:
    """Set an attribute of integers on `node`."""
    node.attributes[attribute] = ir.AttrInt64s(attribute, values)


def is_transpose(node: ir.Node | None, perm: Sequence[int]) -> bool:
    """Whether `node` is a Transpose of exactly this permutation."""
    return node is not None and node.op_type == "Transpose" and list(permutation(node)) == list(perm)


def permutation(node: ir.Node) -> Sequence[int]:
    """The `perm` of a Transpose; empty where the attribute is missing."""
    return node.attributes.get_ints("perm", ())


def is_read(value: ir.Value) -> bool:
    """Whether a node reads `value`, or it is an output of the graph."""
    return bool(value.uses()) or value.is_graph_output()


def remove_unused_initializers(graph: ir.Graph) -> None:
    """Remove initializers that nothing reads, in place."""
    for name, value in list(graph.initializers.items()):
        if not is_read(value):
            del graph.initializers[name]


def mark_float32(*nodes: ir.Node) -> None:
    """Mark nodes, in place, that half precision leaves in FP32."""
    for node in nodes:
        node.metadata_props[FLOAT32_KEY] = "fp32"


def is_marked_float32(node: ir.Node) -> bool:
    """Whether `mark_float32` has marked this node."""
    return node.metadata_props.get(FLOAT32_KEY) == "fp32"


def mark_quantized(node: ir.Node) -> None:
    """Mark a node, in place, whose inputs will be quantized to eight bits, so that passes do not take it apart."""
    node.metadata_props[QUANTIZED_KEY] = "yes"


def is_marked_quantized(node: ir.Node) -> bool:
    """Whether `mark_quantized` has marked this node."""
    return QUANTIZED_KEY in node.metadata_props


def as_proto(model: ir.Model) -> ModelProto:
    """`model` as protobuf, as model.onnx holds it: with a copy of all weights, without shapes of inner tensors."""
    proto = message_of(model, model.graph.inputs)
    for value in model.graph.initializers.values():
        proto.graph.initializer.append(tensor_proto(value))
    return proto


def without_weights(model: ir.Model) -> ModelProto:
    """`model` as protobuf with inputs in the place of all initializers but integers.

    Enough to infer types and shapes, which do not depend on weights' values but do on integers (axes, extents).
    """
    constants = [value for value in model.graph.initializers.values() if not value.is_graph_input()]
    integers = [value for value in constants if value.dtype == ir.DataType.INT64]
    others = [value for value in constants if value.dtype != ir.DataType.INT64]
    return message_of(model, (*model.graph.inputs, *others), integers)


def shapes_at_batch_one(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor at batch 1, by name, as far as onnx infers it (0 for an extent that it does not)."""
    light = without_weights(model)
    for value in (*light.graph.input, *light.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_param:
            dims[0].dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values}


def live_elements(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Peak number of elements of activations in memory, if nodes run in order and each tensor is freed after its last
    reader. `shapes`: as `shapes_at_batch_one` gives them.
    """
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


def macs(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiply-adds of convolutions and matrix products. `shapes`: as `shapes_at_batch_one` gives them."""
    return sum(macs_of(node, shapes) for node in model.graph)


def macs_of(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiply-adds of one node; 0 for one that is neither a convolution nor a product."""
    if node.op_type not in ("Conv", "MatMul", "Gemm"):
        return 0
    left, weight = (() if value is None else _shape_of(value, shapes) for value in node.inputs[:2])
    inner = weight[1:] if node.op_type == "Conv" else left[:1] if node.attributes.get_int("transA", 0) else left[-1:]
    return math.prod(shapes.get(name_of(node.outputs[0]), (0,))) * math.prod(inner)


def _shape_of(value: ir.Value, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    constant = value.const_value
    return shapes.get(name_of(value), ()) if constant is None else tuple(constant.shape.numpy())


_SCOPES = "pkg.torch.onnx.name_scopes"


def module_path(node: ir.Node) -> str | None:
    """Path of the module that `node` came from, read from torch.onnx's metadata: "" for the model, None if unknown."""
    entry = node.metadata_props.get(_SCOPES)
    if entry is None:
        return None
    scopes: list[str] = ast.literal_eval(entry)
    return scopes[-2] if len(scopes) > 1 else ""


def name_by_module(model: ir.Model) -> None:
    """Rename nodes to `path/OpType` (numbered where one module has several) and tensors after their node, in place."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    seen: Counter[str] = Counter()
    path_of: dict[ir.Value | None, str] = {}
    for node in model.graph:
        path = module_path(node)
        if path is None:  # made by a decomposition: it gets the module of the node that makes its input
            path = next((path_of[value] for value in node.inputs if value in path_of), "")
        path_of.update(dict.fromkeys(node.outputs, path))
        node.name = _unique(f"{path or 'model'}/{node.op_type}", seen)
        node.metadata_props.clear()
        for index, output in enumerate(node.outputs):
            if output.name and output not in kept:
                output.name = node.name if len(node.outputs) == 1 else f"{node.name}.{index}"


def _unique(name: str, seen: Counter[str]) -> str:
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}_{seen[name]}"


def make_names_unique(graph: ir.Graph) -> None:
    """Number the names of nodes and tensors that an earlier one has, in place: those of a module that runs twice.

    Inputs, outputs and initializers keep their names.
    """
    kept = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    nodes, tensors = set[str](), {name_of(value) for value in kept}
    for node in graph:
        node.name = _numbered(name_of(node), nodes)
        for output in node.outputs:
            if output.name and output not in kept:
                output.name = _numbered(output.name, tensors)


def _numbered(name: str, taken: set[str]) -> str:
    """`name`, or with the first number from 2 that makes it none of `taken`, to which it is added."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    found = next(other for other in names if other not in taken)
    taken.add(found)
    return found


def owner(node_name: str) -> str:
    """Module path in a name that `name_by_module` gave: everything before the first slash."""
    return node_name.split("/", 1)[0]


def name_unowned(model: ir.Model, modules: Collection[str]) -> None:
    """Rename nodes that the simplifier made, in place, after the module of their weights, else of the node that reads
    them, else of the one that they read. `modules`: paths of all modules.
    """
    known = {*modules, "model"}
    nodes = list(model.graph)
    paths = {node: path for node in nodes if (path := owner(node.name or "")) in known}
    taken = {node.name for node in paths}
    unowned = [node for node in nodes if node not in paths]
    for node in unowned:
        read = (name_of(value) for value in node.inputs)
        weights = (name.rpartition(".")[0] for name in read if "/" not in name)  # other tensors are named after nodes
        if path := next((path for path in weights if path in known), ""):
            paths[node] = path
    for node in reversed(unowned):
        readers = [reader for reader in node.outputs[0].consumers() if reader in paths]
        if node not in paths and readers:
            paths[node] = paths[readers[0]]
    for node in unowned:
        made = (value.producer() for value in node.inputs if value is not None)
        path = paths.setdefault(node, next((paths[other] for other in made if other in paths), "model"))
        name, numbers = f"{path}/{node.op_type}", itertools.count(2)
        while name in taken:
            name = f"{path}/{node.op_type}_{next(numbers)}"
        node.name = name
        taken.add(name)

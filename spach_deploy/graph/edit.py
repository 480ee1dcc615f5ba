"""Small helpers over onnx.GraphProto that the passes share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from spach_deploy.common.errors import UsageError, printable

FLOAT32_KEY = "spach.precision"
"""metadata_props key of a node that half precision leaves in FP32 (value "fp32")."""

QUANTIZED_KEY = "spach.quantized"
"""metadata_props key of a convolution that passes leave whole, because it is quantized."""


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """Node that makes each tensor."""
    return {output: node for node in graph.node for output in node.output}


def consumers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Nodes that read each tensor."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            readers[name].append(node)
    return readers


def initializers(graph: GraphProto) -> dict[str, TensorProto]:
    """Constant tensors by name."""
    return {tensor.name: tensor for tensor in graph.initializer}


def attributes(node: NodeProto) -> dict[str, object]:
    """Attributes as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def constant(name: str, value: NDArray[np.generic]) -> TensorProto:
    """An initializer."""
    return numpy_helper.from_array(np.ascontiguousarray(value), name)


def replace_nodes(graph: GraphProto, replacement: Mapping[int, Iterable[NodeProto]]) -> None:
    """Put `replacement[i]` in the place of the i-th node; an empty list removes it."""
    nodes: list[NodeProto] = []
    for index, node in enumerate(graph.node):
        nodes.extend(replacement.get(index, (node,)))
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def remove_unused_initializers(graph: GraphProto) -> None:
    """Drop constants that no node reads."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    unused = [i for i, tensor in enumerate(graph.initializer) if tensor.name not in used]
    for index in reversed(unused):
        del graph.initializer[index]


def mark_float32(node: NodeProto) -> NodeProto:
    """Ask the precision step to leave this node in FP32."""
    entry = node.metadata_props.add()
    entry.key, entry.value = FLOAT32_KEY, "fp32"
    return node


def is_marked_float32(node: NodeProto) -> bool:
    """Whether `mark_float32` was asked for this node."""
    return any(p.key == FLOAT32_KEY and p.value == "fp32" for p in node.metadata_props)


def mark_quantized(node: NodeProto) -> NodeProto:
    """Keep passes from taking this node apart: its inputs will go through eight bits."""
    entry = node.metadata_props.add()
    entry.key, entry.value = QUANTIZED_KEY, "yes"
    return node


def is_marked_quantized(node: NodeProto) -> bool:
    """Whether `mark_quantized` was asked for this node."""
    return any(p.key == QUANTIZED_KEY for p in node.metadata_props)


def external_files(model: ModelProto) -> tuple[str, ...]:
    """The files, beside a graph's own, that its tensors are to be read from, as it names them."""
    entries = (entry for tensor in _tensors(model.graph) for entry in tensor.external_data)
    return tuple(dict.fromkeys(entry.value for entry in entries if entry.key == "location"))


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Those of a graph and of the graphs in it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            if inner.ByteSize():
                yield from _tensors(inner)


def missing_data(model: ModelProto, folder: Path) -> str:
    """The first file that holds weights of a graph from `folder` and is not there; empty where all are."""
    return next((name for name in external_files(model) if not (folder / name).is_file()), "")


def data_outside(model: ModelProto, folder: Path) -> str:
    """The first file of a graph's weights whose path leads out of `folder`, where no runtime reads it; or empty."""
    return next((name for name in external_files(model) if _is_outside(name, folder)), "")


def _is_outside(name: str, folder: Path) -> bool:
    return "\0" in name or not (folder / name).resolve().is_relative_to(folder.resolve())


def lacking_data(file: Path) -> str:
    """Which weights of a graph are not to be had, as a clause; empty where all are, and for what is no graph."""
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception:  # protobuf's own
        return ""
    if outside := printable(data_outside(model, file.parent)):
        return f"its weights are in {outside}, which leads outside of its directory"
    missing = printable(missing_data(model, file.parent))
    return f"its weights are in {missing}, which is not beside it" if missing else ""


def check_is_one_file(file: Path) -> None:
    """UsageError for a graph that keeps weights in other files, which a copy of it would not find. Others pass."""
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception:  # protobuf's own; what is no graph is refused by who reads it
        return
    if outside := printable(data_outside(model, file.parent)):
        what, fix = f"{outside}, which leads outside of its directory", "Give a graph with its weights."
    elif missing := printable(missing_data(model, file.parent)):
        fix = f"Put {missing} into {file.absolute().parent}, or give a graph with its weights."
        what = f"{missing}, which is not beside it"
    elif names := external_files(model):
        what, fix = f"{printable(names[0])}, which a copy of it would not find", "Give a graph with its weights."
    else:
        return
    raise UsageError(f"{file} keeps its weights in {what}.", fix)


def live_elements_at_batch_one(model: ModelProto) -> int:
    """Numbers that have to be in memory at once for one image, weights aside, in the order of the nodes."""
    shapes = shapes_at_batch_one(model)
    last = {name: index for index, node in enumerate(model.graph.node) for name in node.input}
    alive: dict[str, int] = {}
    most = 0
    for index, node in enumerate(model.graph.node):
        alive |= {name: math.prod(shapes[name]) for name in node.output if name in shapes}
        most = max(most, sum(alive.values()))
        for name in {name for name in (*node.input, *node.output) if last.get(name, index) == index}:
            alive.pop(name, None)
    return most


def shapes_at_batch_one(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor for one image, as far as ONNX can tell."""
    light = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = light.graph
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_param:
            dims[0].dim_value = 1
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT64:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values}

"""A graph opened at its tensors: any of them can be read, and any of them replaced by a value given from outside.

A graph in half precision is opened as its twin in FP32 that rounds every half tensor (`precision.rounding`), so that
tensors can be given in FP32 and overflow shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from spach_deploy.common.errors import SpachError, UnavailableError, UsageError
from spach_deploy.graph.precision.elements import without_weights
from spach_deploy.graph.precision.formats import FLOAT, HALF_FORMATS
from spach_deploy.graph.precision.ranges import open_session
from spach_deploy.graph.precision.rounding import check_runtime_rounds, rounded_graph

Arrays = dict[str, NDArray[np.generic]]
Values = dict[str, NDArray[np.floating]]

_ALTERING = frozenset(
    ("Cast", "Clip", "DequantizeLinear", "Identity", "Max", "Min", "QuantizeLinear", "Reshape", "Round", "Transpose")
)

MEMORY_BYTES = 1_000_000_000
"""Of tensors read in one pass; what does not fit is read in another."""


class OpenedGraph:
    """`graph`, run on `batch` images at once.

    `order`: position of what makes each tensor. Raises UsageError for a graph that cannot be taken apart.
    """

    def __init__(self, graph: ModelProto, batch: int) -> None:
        self.half = half_type(graph)
        self._graph = _twin(graph) if self.half is not None else graph
        self._nodes = list(self._graph.graph.node)
        read = {name for node in self._nodes for name in node.input} | {*_outputs(self._graph)}
        weights = (tensor for tensor in self._graph.graph.initializer if tensor.name in read)
        self._weights = ModelProto(graph=GraphProto(initializer=weights))
        self.outputs = _outputs(self._graph)
        self.makers = {name: node.name for node in self._nodes for name in node.output if name}
        self.order = {name: index for index, name in enumerate(self.makers)}
        self._elements = float_elements(self._graph, batch)

    def tensors(self, sizes: Iterable[int]) -> list[str]:
        """Tensors that hold floats and have one of `sizes` elements, in order; those of unknown size too."""
        wanted = {0, *sizes}
        return [name for name in self.order if self._elements.get(name, -1) in wanted]

    def passes(self, names: Iterable[str]) -> Iterator[list[str]]:
        """`names` in groups that fit in memory."""
        group: list[str] = []
        held = 0
        for name in names:
            size = 4 * self._elements[name]
            if group and held + size > MEMORY_BYTES:
                yield group
                group, held = [], 0
            group.append(name)
            held += size
        if group:
            yield group

    def computed_from(self, inputs: Iterable[str], given: Arrays, among: Iterable[str]) -> list[str]:
        """Those of `among` that are computed from tensors of `inputs` and no other given ones, in order.

        Without `inputs`: those that are computed from the images alone.
        """
        wanted = {*inputs}
        sources: dict[str, frozenset[str]] = {value.name: frozenset() for value in self._graph.graph.input}
        for node in self._nodes:
            read = (frozenset((name,)) if name in given else sources.get(name, frozenset()) for name in node.input)
            sources.update(dict.fromkeys(node.output, frozenset().union(*read)))
        chosen = {name for name in among if sources[name] <= wanted and (sources[name] or not wanted)}
        return [name for name in self.order if name in chosen]

    def altered(self, tensor: str) -> list[tuple[str, str]]:
        """What nodes that only round, limit or move a tensor make of it: (tensor, node's name), in order."""
        made: list[tuple[str, str]] = []
        behind = {tensor}
        for node in self._nodes:
            if node.op_type in _ALTERING and node.input[0] in behind:
                behind.update(node.output)
                made.extend((name, node.name) for name in node.output if self._elements.get(name, -1) >= 0)
        return made

    def run(self, feeds: Mapping[str, NDArray[np.generic]], names: list[str], given: Arrays) -> Values:
        """Values of the tensors `names`; whatever reads a tensor of `given` gets that value instead.

        UsageError where the graph does not run.
        """
        try:
            session = open_session(self._light(names, given), self._weights, plain=True)
            inputs = {value.name for value in session.get_inputs()}
            inside = {_given(name): value for name, value in given.items() if _given(name) in inputs}
            return dict(zip(names, session.run(names, {**feeds, **inside}), strict=True))
        except Exception as error:  # its exceptions share no base class of their own
            raise _does_not_run(error) from error

    def _light(self, names: list[str], given: Arrays) -> ModelProto:
        """The graph without weights, with other outputs and more inputs."""
        light = ModelProto(ir_version=self._graph.ir_version, functions=self._graph.functions)
        light.opset_import.extend(self._graph.opset_import)
        light.graph.name = self._graph.graph.name
        light.graph.input.extend(self._graph.graph.input)
        light.graph.node.extend(_reading(node, given) for node in self._nodes)
        light.graph.output.extend(ValueInfoProto(name=name) for name in names)
        for name, value in given.items():
            light.graph.input.append(helper.make_tensor_value_info(_given(name), TensorProto.FLOAT, value.shape))
        return light


def _outputs(graph: ModelProto) -> list[str]:
    return [value.name for value in graph.graph.output]


def half_type(graph: ModelProto) -> int | None:
    """ONNX element type of the half precision in which a graph has weights or casts tensors; None without."""
    weights = (tensor.data_type for tensor in graph.graph.initializer)
    casts = (attribute.i for node in graph.graph.node if node.op_type == "Cast" for attribute in node.attribute)
    return next((kind for kind in (*weights, *casts) if kind in HALF_FORMATS), None)


def _twin(graph: ModelProto) -> ModelProto:
    check_runtime_rounds()
    try:
        return rounded_graph(graph)
    except Exception as error:  # a foreign graph may hold anything
        raise _does_not_run(error) from error


def _does_not_run(error: Exception) -> SpachError:
    if isinstance(error, UnavailableError):  # this machine is at fault
        return error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UsageError(f"The graph cannot be taken apart at its tensors: {reason}", "Validate it without --bisect.")


def _given(name: str) -> str:
    return f"given/{name}"


def _reading(node: NodeProto, given: Arrays) -> NodeProto:
    if not any(name in given for name in node.input):
        return node
    changed = NodeProto()
    changed.CopyFrom(node)
    changed.input[:] = [_given(name) if name in given else name for name in node.input]
    return changed


def float_elements(graph: ModelProto, batch: int) -> dict[str, int]:
    """Elements of every float tensor that nodes make, at `batch`; 0 where they are not known."""
    light = without_weights(graph)
    weights = {tensor.name for tensor in graph.graph.initializer}
    for value in light.graph.input:
        if value.name not in weights and len(value.type.tensor_type.shape.dim):
            value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in light.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(light).graph
    types = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.output)}
    return {
        name: _count(types[name]) if name in types else 0
        for node in graph.graph.node
        for name in node.output
        if name and (name not in types or types[name].elem_type == FLOAT)
    }


def _count(tensor: onnx.TypeProto.Tensor) -> int:
    extents = [dim.dim_value for dim in tensor.shape.dim]
    return math.prod(extents) if tensor.HasField("shape") and all(extents) else 0

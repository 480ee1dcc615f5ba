"""A graph opened at its tensors: any of them can be read, and any of them replaced by a value given from outside.

A graph in half precision is opened as its twin in FP32 that rounds every half tensor (`precision.rounding`), so that
tensors can be given in FP32 and overflow shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.common.errors import SpachError, UnavailableError, UsageError
from spach_deploy.graph.editing import made_values, name_of, without_weights
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

    def __init__(self, graph: ir.Model, batch: int) -> None:
        self.half = half_type(graph)
        self._graph = _twin(graph) if self.half is not None else graph
        self._nodes = tuple(self._graph.graph)
        self.outputs = [name_of(value) for value in self._graph.graph.outputs]
        self.makers = {name_of(value): name_of(value.producer()) for value in made_values(self._graph.graph)}
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
        sources: dict[str, frozenset[str]] = {}
        for node in self._nodes:
            names = map(name_of, node.inputs)
            read = (frozenset((name,)) if name in given else sources.get(name, frozenset()) for name in names)
            sources.update(dict.fromkeys(map(name_of, node.outputs), frozenset().union(*read)))
        chosen = {name for name in among if sources[name] <= wanted and (sources[name] or not wanted)}
        return [name for name in self.order if name in chosen]

    def altered(self, tensor: str) -> list[tuple[str, str]]:
        """What nodes that only round, limit or move a tensor make of it: (tensor, node's name), in order."""
        made: list[tuple[str, str]] = []
        behind = {tensor}
        for node in self._nodes:
            if node.op_type in _ALTERING and name_of(node.inputs[0]) in behind:
                names = list(map(name_of, node.outputs))
                behind.update(names)
                made.extend((name, name_of(node)) for name in names if self._elements.get(name, -1) >= 0)
        return made

    def run(self, feeds: Mapping[str, NDArray[np.generic]], names: list[str], given: Arrays) -> Values:
        """Values of the tensors `names`; whatever reads a tensor of `given` gets that value instead.

        UsageError where the graph does not run.
        """
        try:
            session = open_session(self._with(names, given), plain=True)
            inputs = {value.name for value in session.get_inputs()}
            inside = {_given(name): value for name, value in given.items() if _given(name) in inputs}
            return dict(zip(names, session.run(names, {**feeds, **inside}), strict=True))
        except Exception as error:  # its exceptions share no base class of their own
            raise _does_not_run(error) from error

    def _with(self, names: list[str], given: Arrays) -> ir.Model:
        """The graph with other outputs and more inputs."""
        model = self._graph.clone()
        graph = model.graph
        values = {name_of(value): value for value in (*graph.inputs, *made_values(graph))}
        graph.outputs.clear()
        for name, value in given.items():
            replacement = ir.val(_given(name), FLOAT, value.shape)
            graph.inputs.append(replacement)
            values[name].replace_all_uses_with(replacement)
        graph.outputs.extend(values[name] for name in names)
        return model


def half_type(graph: ir.Model) -> ir.DataType | None:
    """Element type of the half precision in which a graph has weights or casts tensors; None without."""
    weights = (value.dtype for value in graph.graph.initializers.values())
    casts = (ir.DataType(node.attributes.get_int("to", 0)) for node in graph.graph if node.op_type == "Cast")
    return next((kind for kind in (*weights, *casts) if kind in HALF_FORMATS), None)


def _twin(graph: ir.Model) -> ir.Model:
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


def float_elements(graph: ir.Model, batch: int) -> dict[str, int]:
    """Elements of every float tensor that nodes make, at `batch`; 0 where they are not known."""
    light = without_weights(graph)
    weights = graph.graph.initializers
    for value in light.graph.input:
        if value.name not in weights and len(value.type.tensor_type.shape.dim):
            value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in light.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(light).graph
    types = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.output)}
    return {
        name: _count(types[name]) if name in types else 0
        for name in map(name_of, made_values(graph.graph))
        if (name not in types or types[name].elem_type == FLOAT)
    }


def _count(tensor: onnx.TypeProto.Tensor) -> int:
    extents = [dim.dim_value for dim in tensor.shape.dim]
    return math.prod(extents) if tensor.HasField("shape") and all(extents) else 0

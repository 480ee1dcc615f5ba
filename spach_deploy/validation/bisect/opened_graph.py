"""Run a graph so that any of its tensors can be read, and any replaced by a given value.

A graph in half precision runs as an FP32 graph that rounds every half tensor (`precision.rounding`). So tensors can be
given in FP32, and overflow shows.
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
"""Bytes of tensors that are read in one run; the rest is read in further runs."""


class OpenedGraph:
    """A graph whose tensors can be read and replaced, run at a batch size of `batch`.

    `makers`: for each tensor the name of its node's output; `order`: position of each tensor in the graph. Raises
    UsageError where its tensors cannot be read.
    """

    def __init__(self, graph: ir.Model, batch: int) -> None:
        self.half = half_type(graph)
        self._graph = _rounded_graph(graph) if self.half is not None else graph
        self._nodes = tuple(self._graph.graph)
        self.outputs = [name_of(value) for value in self._graph.graph.outputs]
        self.makers = {name_of(value): name_of(value.producer()) for value in made_values(self._graph.graph)}
        self.order = {name: index for index, name in enumerate(self.makers)}
        self._elements = float_elements(self._graph, batch)

    def tensors(self, sizes: Iterable[int]) -> list[str]:
        """Float tensors that have one of `sizes` elements, or an unknown number, in the order of the graph."""
        wanted = {0, *sizes}
        return [name for name in self.order if self._elements.get(name, -1) in wanted]

    def groups(self, names: Iterable[str]) -> Iterator[list[str]]:
        """`names` in groups of at most `MEMORY_BYTES`."""
        group: list[str] = []
        held_bytes = 0
        for name in names:
            size = 4 * self._elements[name]
            if group and held_bytes + size > MEMORY_BYTES:
                yield group
                group, held_bytes = [], 0
            group.append(name)
            held_bytes += size
        if group:
            yield group

    def computed_from(self, inputs: Iterable[str], overrides: Arrays, among: Iterable[str]) -> list[str]:
        """Tensors of `among` that are computed from `inputs` and no other overridden tensor, in the order of the graph.

        Without `inputs`: those that are computed from the images alone.
        """
        wanted = {*inputs}
        sources: dict[str, frozenset[str]] = {}
        for node in self._nodes:
            names = map(name_of, node.inputs)
            read = (frozenset((name,)) if name in overrides else sources.get(name, frozenset()) for name in names)
            sources.update(dict.fromkeys(map(name_of, node.outputs), frozenset().union(*read)))
        chosen = {name for name in among if sources[name] <= wanted and (sources[name] or not wanted)}
        return [name for name in self.order if name in chosen]

    def altered(self, tensor: str) -> list[tuple[str, str]]:
        """Tensors that nodes which only round, clip or move data make of `tensor`: (tensor, node's name), in order."""
        made: list[tuple[str, str]] = []
        behind = {tensor}
        for node in self._nodes:
            if node.op_type in _ALTERING and name_of(node.inputs[0]) in behind:
                names = list(map(name_of, node.outputs))
                behind.update(names)
                made.extend((name, name_of(node)) for name in names if self._elements.get(name, -1) >= 0)
        return made

    def run(self, feeds: Mapping[str, NDArray[np.generic]], names: list[str], overrides: Arrays) -> Values:
        """Run the graph; returns the tensors `names`. Readers of a tensor in `overrides` get that value instead.

        UsageError where the graph does not run.
        """
        try:
            session = open_session(self._with(names, overrides), plain=True)
            inputs = {value.name for value in session.get_inputs()}
            inside = {
                _override_name(name): value for name, value in overrides.items() if _override_name(name) in inputs
            }
            return dict(zip(names, session.run(names, {**feeds, **inside}), strict=True))
        except Exception as error:  # its exceptions share no base class of their own
            raise _does_not_run(error) from error

    def _with(self, names: list[str], overrides: Arrays) -> ir.Model:
        """The graph with `names` as outputs and an input for each override."""
        model = self._graph.clone()
        graph = model.graph
        values = {name_of(value): value for value in (*graph.inputs, *made_values(graph))}
        graph.outputs.clear()
        for name, value in overrides.items():
            replacement = ir.val(_override_name(name), FLOAT, value.shape)
            graph.inputs.append(replacement)
            values[name].replace_all_uses_with(replacement)
        graph.outputs.extend(values[name] for name in names)
        return model


def half_type(graph: ir.Model) -> ir.DataType | None:
    """The half precision element type of the graph's weights or casts; None without."""
    weights = (value.dtype for value in graph.graph.initializers.values())
    casts = (ir.DataType(node.attributes.get_int("to", 0)) for node in graph.graph if node.op_type == "Cast")
    return next((kind for kind in (*weights, *casts) if kind in HALF_FORMATS), None)


def _rounded_graph(graph: ir.Model) -> ir.Model:
    check_runtime_rounds()
    try:
        return rounded_graph(graph)
    except Exception as error:  # an external graph may hold anything
        raise _does_not_run(error) from error


def _does_not_run(error: Exception) -> SpachError:
    if isinstance(error, UnavailableError):  # this machine is at fault
        return error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UsageError(f"The graph cannot be taken apart at its tensors: {reason}", "Validate it without --bisect.")


def _override_name(name: str) -> str:
    return f"given/{name}"


def float_elements(graph: ir.Model, batch: int) -> dict[str, int]:
    """Number of elements of every float tensor that nodes make, at this batch size; 0 where it is unknown."""
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

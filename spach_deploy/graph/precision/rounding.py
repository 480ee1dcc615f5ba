"""The rounded graph: an FP32 graph that computes on any CPU what a typed graph computes on a GPU.

Every tensor that is half in the typed graph is cast to half and back to FP32; weights are rounded beforehand. So the
graph overflows where the typed graph overflows. Its inputs and outputs are the typed graph's. Sums inside one operator
are FP32, as those of tensor cores are.

The typed graph itself does not show this in ONNX Runtime's CPU provider. That has half kernels for some operators only;
for others it inserts casts and then removes pairs of them, so numbers that overflow on a GPU do not overflow there. For
bfloat16 it has only moves and LayerNormalization (1.32) and refuses the graph. Casts that the graph itself holds are
not removed (seen in 1.20 and 1.32; `check_runtime_rounds` tests it).
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from spach_deploy.common.errors import UnavailableError
from spach_deploy.graph.editing import made_values, name_of, tensor_of
from spach_deploy.graph.precision.formats import FLOAT, FP16, HALF_FORMATS, decode, infer_all_types, is_view, type_name
from spach_deploy.graph.precision.ranges import open_session


def rounded_graph(typed: ir.Model) -> ir.Model:
    """An FP32 copy of `typed` that rounds every tensor that is half there, with the same inputs and outputs.

    Tensors keep their names, and are infinite beyond the half format's limit. ONNX Runtime runs it on any CPU, also
    where `typed` is bfloat16. The nodes of `typed` are put in order, which other tools leave them out of. Raises
    PrecisionError for a tensor whose type cannot be inferred.
    """
    typed.graph.sort()
    rounded = typed.clone()
    infer_all_types(rounded)
    _RoundedGraph(rounded.graph).write()
    return rounded


_TO_HALF, _EXACT = "/round", "/exact"


class _RoundedGraph:
    """Turns a typed graph into its rounded graph, in place. `_half`: by tensor, its half type in the typed graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        values = (*graph.inputs, *graph.initializers.values(), *made_values(graph))
        self._half = {value: value.dtype for value in values if value.dtype in HALF_FORMATS}

    def write(self) -> None:
        nodes = tuple(self._graph)
        for value in self._graph.initializers.values():
            if value in self._half:
                value.const_value = ir.Tensor(decode(tensor_of(value)), name=value.name)
                value.type = ir.TensorType(FLOAT)
        self._graph.insert_before(
            nodes[0], [self._inside(value) for value in self._graph.inputs if value in self._half]
        )
        for index, value in enumerate(self._graph.outputs):
            if value in self._half:
                self._graph.append(self._outside(index, value))
        for node in nodes:
            self._round(node)

    def _inside(self, value: ir.Value) -> ir.Node:
        """A Cast of a half input to FP32, which all readers of the input read instead."""
        inner = ir.val(f"{value.name}/twin", FLOAT, value.shape)
        value.replace_all_uses_with(inner)
        self._half[inner] = self._half[value]
        return _cast(value, inner, f"io/{value.name}/twin")

    def _outside(self, index: int, value: ir.Value) -> ir.Node:
        """A Cast of an FP32 tensor to half, which becomes output `index` of the graph."""
        outer = ir.val(name_of(value), self._half[value], value.shape)
        value.name = f"{value.name}/twin"
        self._graph.outputs[index] = outer
        return _cast(value, outer, f"io/{outer.name}/twin")

    def _round(self, node: ir.Node) -> None:
        rounds = not is_view(node)
        if node.op_type == "Cast" and (node.inputs[0] in self._half or node.outputs[0] in self._half):
            rounds = node.outputs[0] in self._half
            node.op_type = "Identity"
            node.attributes.clear()
        roundings = [step for value in node.outputs if value in self._half for step in self._made(value, rounds)]
        self._graph.insert_after(node, roundings)

    def _made(self, value: ir.Value, rounds: bool) -> tuple[ir.Node, ...]:
        """The two Casts that round a tensor; none where its maker only moves rounded numbers."""
        kind, name = self._half[value], name_of(value)
        value.type = ir.TensorType(FLOAT)
        if not rounds:
            return ()
        back = ir.val(name, FLOAT, value.shape)
        half = ir.val(f"{name}/{type_name(kind)}", kind, value.shape)
        value.replace_all_uses_with(back)
        value.name = name + _EXACT
        self._half[back] = kind
        return _cast(value, half, name + _TO_HALF), _cast(half, back, f"{name}/back")


def _cast(source: ir.Value, target: ir.Value, name: str) -> ir.Node:
    return ir.node("Cast", [source], {"to": target.dtype or FLOAT}, outputs=[target], name=name)


@functools.cache
def check_runtime_rounds() -> None:
    """UnavailableError when the installed ONNX Runtime removes a Cast to half and back: then nothing is rounded."""
    x, y, half, z = (
        ir.val("x", FLOAT, [2]),
        ir.val("y", FLOAT, [2]),
        ir.val("h", FP16.dtype, [2]),
        ir.val("z", FLOAT, [2]),
    )
    nodes = [
        ir.node("Add", [x, x], outputs=[y], name="canary/Add"),
        _cast(y, half, "canary/round"),
        _cast(half, z, "canary/back"),
    ]
    model = ir.Model(ir.Graph([x], [z], nodes=nodes, opset_imports={"": 20}, name="canary"), ir_version=10)
    result = open_session(model, threads=1).run(None, {"x": np.array([5e4, 1e-9], np.float32)})[0]
    if not (np.isinf(result[0]) and result[1] == 0.0):
        raise UnavailableError(
            "The ONNX Runtime installed here removes roundings, so it cannot prove a half-precision policy.",
            "Install another version of onnxruntime.",
        )

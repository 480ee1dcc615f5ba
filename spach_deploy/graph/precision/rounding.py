"""A typed graph's numbers on any CPU: FP32 arithmetic, every half tensor rounded to its half type.

ONNX Runtime's CPU has half kernels for some operators only. For the others it inserts casts and drops the pairs between
neighbours, so what overflows on a GPU survives there; of bfloat16 it knows moves and LayerNormalization only (1.32) and
refuses the graph. The twin made here is an FP32 graph in which everything that would be half is cast there and back,
and weights are rounded already. Casts that a graph holds are not dropped (seen in 1.20 and 1.32;
`check_runtime_rounds` asks). So it runs anywhere, overflows where the typed graph overflows, and takes and gives what
the typed graph does. Sums inside one operator are FP32, as tensor cores' are.
"""

from __future__ import annotations

import functools

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from spach_deploy.common.errors import UnavailableError
from spach_deploy.graph.precision.elements import element_types, is_view
from spach_deploy.graph.precision.formats import FLOAT, HALF_FORMATS, decode, type_name
from spach_deploy.graph.precision.ranges import open_session


def rounded_graph(typed: ModelProto) -> ModelProto:
    """FP32 graph that computes what `typed` computes and rounds what is half there, with the same inputs and outputs.

    Tensors keep their names; beyond a half format's limit they are infinite. ONNX Runtime runs it on any CPU, so it is
    also the way to evaluate a bfloat16 graph.
    """
    return _RoundedGraph(typed).build()


_TO_HALF, _EXACT = "/round", "/exact"


class _RoundedGraph:
    def __init__(self, typed: ModelProto) -> None:
        self._typed = typed
        self._types = element_types(typed)
        self._constants = {tensor.name: tensor for tensor in typed.graph.initializer}
        interface = (*typed.graph.input, *typed.graph.output)
        self._foreign = {value.name for value in interface if self._types[value.name] in HALF_FORMATS}
        self._nodes: list[NodeProto] = []

    def build(self) -> ModelProto:
        graph = self._typed.graph
        for value in graph.input:
            if value.name in self._foreign:
                self._cast(value.name, self._inner(value.name), FLOAT, f"io/{value.name}/twin")
        for node in graph.node:
            self._add(node)
        for value in graph.output:
            if value.name in self._foreign:
                kind = self._types[value.name]
                self._cast(self._inner(value.name), value.name, kind, f"io/{value.name}/twin")
        return self._assembled()

    def _inner(self, name: str) -> str:
        """Name of the FP32 tensor that stands for `name`: inputs and outputs keep theirs for the caller's type."""
        return f"{name}/twin" if name in self._foreign else name

    def _add(self, node: NodeProto) -> None:
        twin = NodeProto()
        twin.CopyFrom(node)
        twin.input[:] = [self._inner(name) for name in node.input]
        rounds = not is_view(node, self._constants)
        if node.op_type == "Cast" and self._types[node.output[0]] in HALF_FORMATS:
            twin = helper.make_node("Identity", [twin.input[0]], list(node.output), name=node.name)
        elif node.op_type == "Cast" and self._types[node.input[0]] in HALF_FORMATS:
            twin.op_type, rounds = "Identity", False
            del twin.attribute[:]
        self._nodes.append(twin)
        for index, name in enumerate(node.output):
            inner = self._inner(name)
            twin.output[index] = inner
            if rounds and self._types.get(name) in HALF_FORMATS:
                twin.output[index] = inner + _EXACT
                self._round(inner, self._types[name])

    def _round(self, name: str, kind: int) -> None:
        half = f"{name}/{type_name(kind)}"
        self._cast(name + _EXACT, half, kind, name + _TO_HALF)
        self._cast(half, name, FLOAT, f"{name}/back")

    def _cast(self, source: str, target: str, kind: int, name: str) -> None:
        self._nodes.append(helper.make_node("Cast", [source], [target], name=name, to=kind))

    def _assembled(self) -> ModelProto:
        model = ModelProto(ir_version=self._typed.ir_version)
        model.opset_import.extend(self._typed.opset_import)
        graph = model.graph
        graph.name = self._typed.graph.name
        graph.node.extend(self._nodes)
        graph.initializer.extend(map(_as_float, self._typed.graph.initializer))
        graph.input.extend(self._typed.graph.input)
        graph.output.extend(self._typed.graph.output)
        return model


def _as_float(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(decode(tensor), tensor.name) if tensor.data_type in HALF_FORMATS else tensor


@functools.cache
def check_runtime_rounds() -> None:
    """UnavailableError when the ONNX Runtime here drops a Cast to half and back: then a twin would prove nothing."""
    node = helper.make_node("Add", ["x", "x"], ["y"], name="canary/Add")
    graph = helper.make_graph([node], "canary", [_vector("x")], [_vector("z")])
    graph.node.append(helper.make_node("Cast", ["y"], ["h"], name="canary/round", to=TensorProto.FLOAT16))
    graph.node.append(helper.make_node("Cast", ["h"], ["z"], name="canary/back", to=TensorProto.FLOAT))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    result = open_session(model, threads=1).run(None, {"x": np.array([5e4, 1e-9], np.float32)})[0]
    if not (np.isinf(result[0]) and result[1] == 0.0):
        raise UnavailableError(
            "The ONNX Runtime installed here removes roundings, so it cannot prove a half-precision policy.",
            "Install another version of onnxruntime.",
        )


def _vector(name: str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])

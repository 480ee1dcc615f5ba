"""A typed graph's numbers on any CPU: FP32 arithmetic, every half tensor rounded to its half type.

ONNX Runtime's CPU has half kernels for some operators only. For the others it inserts casts and drops the pairs between
neighbours, so what overflows on a GPU survives there; of bfloat16 it knows moves and LayerNormalization only (1.32) and
refuses the graph. The twin made here is an FP32 graph in which everything that would be half is cast there and back,
and weights are rounded already. Casts that a graph holds are not dropped (seen in 1.20 and 1.32; `prove_policy` asks).
So it runs anywhere, overflows where the typed graph overflows, and takes and gives what the typed graph does. Sums
inside one operator are FP32, as tensor cores' are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from spach_deploy.common.errors import ImageError, UnavailableError
from spach_deploy.graph.edit import producers
from spach_deploy.graph.names import owner
from spach_deploy.graph.precision.elements import element_types, is_view
from spach_deploy.graph.precision.formats import FLOAT, HALF_FORMATS, decode, type_name
from spach_deploy.graph.precision.ranges import Arrays, RangeMeter, open_session


@dataclasses.dataclass(frozen=True)
class RoundingProof:
    """What rounding every tensor did. `finite`: no tensor overflowed; else `first_bad` is the first that did, made in
    `module`. `relative_l2`: of each float output, against FP32, over all images.
    """

    finite: bool
    first_bad: str | None
    module: str | None
    relative_l2: Mapping[str, float]
    images: int

    @property
    def worst(self) -> float:
        """Largest relative L2 of all outputs; NaN when one is not finite."""
        return float(np.max(list(self.relative_l2.values())))


def prove_policy(
    canonical: ModelProto, typed: ModelProto, feeds: Iterable[Arrays], *, threads: int | None = None
) -> RoundingProof:
    """Run `typed` with every half tensor rounded, and the FP32 graph it was made from, on `feeds` (batches, FP32).

    Every tensor is looked at, not only outputs: an infinity that a softmax turns into a zero counts. Raises ImageError
    without feeds, MissingPackageError without onnxruntime, UnavailableError when this ONNX Runtime drops the rounding.
    """
    check_runtime_rounds()
    twin = rounded_graph(typed)
    inputs = {value.name: int(value.type.tensor_type.elem_type) for value in typed.graph.input}
    exact = open_session(canonical, threads=threads)
    meter = RangeMeter(twin, tensors=rounded_tensors(twin), threads=threads)
    names = [value.name for value in canonical.graph.output]
    errors = {name: _Error() for name in names}
    for batch in feeds:
        expected = dict(zip(names, exact.run(None, dict(batch)), strict=True))
        results = meter.run({name: _as_input(value, inputs[name]) for name, value in batch.items()})
        for name in names:
            errors[name].add(results[name], expected[name])
    ranges = meter.ranges()
    if not ranges.images:
        raise ImageError("No images were given to prove the precision on.", "Give a folder of images.")
    bad = _first_overflow(typed, ranges.max_abs)
    relative = {name: error.relative_l2 for name, error in errors.items() if error.counts}
    return RoundingProof(bad is None, bad, None if bad is None else _module(typed, bad), relative, ranges.images)


class _Error:
    """Relative L2 of one output, summed batch by batch in float64."""

    def __init__(self) -> None:
        self._difference, self._reference, self.counts = 0.0, 0.0, False

    def add(self, value: NDArray[Any], expected: NDArray[Any]) -> None:
        if expected.dtype.kind == "f":
            reference = expected.astype(np.float64)
            self._difference += float(np.square(value.astype(np.float64) - reference).sum())
            self._reference += float(np.square(reference).sum())
            self.counts = True

    @property
    def relative_l2(self) -> float:
        return float(np.sqrt(self._difference / self._reference)) if self._reference else float("nan")


def _as_input(value: NDArray[Any], element_type: int) -> NDArray[Any]:
    wanted = helper.tensor_dtype_to_np_dtype(element_type)
    with np.errstate(over="ignore"):
        return value.astype(wanted, copy=False)


def _first_overflow(typed: ModelProto, max_abs: Mapping[str, float]) -> str | None:
    """The first weight or tensor that is not finite, weights first; names are those of the typed graph."""
    half = (tensor for tensor in typed.graph.initializer if tensor.data_type in HALF_FORMATS)
    weights = (tensor.name for tensor in half if not np.isfinite(decode(tensor)).all())
    made = producers(typed.graph)
    tensors = (name for name in made if not np.isfinite(max_abs.get(name, 0.0)))
    return next(weights, None) or next(tensors, None)


def _module(typed: ModelProto, tensor: str) -> str:
    made = producers(typed.graph).get(tensor)
    if made is not None:
        return owner(made.name)
    return owner(next(node.name for node in typed.graph.node if tensor in node.input))


def rounded_graph(typed: ModelProto) -> ModelProto:
    """FP32 graph that computes what `typed` computes and rounds what is half there, with the same inputs and outputs.

    Tensors keep their names; beyond a half format's limit they are infinite. ONNX Runtime runs it on any CPU, so it is
    also the way to evaluate a bfloat16 graph.
    """
    return _RoundedGraph(typed).build()


def rounded_tensors(twin: ModelProto) -> tuple[str, ...]:
    """The tensors of a twin that a range meter has to look at: all that are rounded, and all FP32 computations."""
    types = element_types(twin)
    exact = {node.input[0] for node in twin.graph.node if node.name.endswith(_TO_HALF)}
    constants = {tensor.name: tensor for tensor in twin.graph.initializer}
    return tuple(
        name
        for node in twin.graph.node
        if not is_view(node, constants)
        for name in node.output
        if types.get(name) == FLOAT and name not in exact
    )


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

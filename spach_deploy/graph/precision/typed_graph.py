"""FP32 graph -> strongly typed graph: every tensor has the type that the policy gives it.

TensorRT 10 and later, and TensorRT for RTX, take types from the graph, and ONNX Runtime runs the same file. Where a
tensor is needed in another type than it is made in, one Cast stands, named after the tensor: `layer3.0/Add/to_fp16`.
Weights are stored in the type in which they are read; in both, where both are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from spach_deploy.common.errors import PrecisionError
from spach_deploy.graph.edit import initializers, producers
from spach_deploy.graph.opset import raise_opset_of_proto
from spach_deploy.graph.precision.decision import Decision, PrecisionPolicy, TypingOptions, WeightCounts
from spach_deploy.graph.precision.elements import element_types
from spach_deploy.graph.precision.formats import BF16, FLOAT, FP16, half_format, is_float, type_name
from spach_deploy.graph.precision.ranges import Ranges
from spach_deploy.graph.precision.weights import EncodedWeights
from spach_deploy.options.specs import IODtype, Precision

_CLOSEST = 5
_BF16_OPSET = 22
"""Conv takes bfloat16 from this opset on."""


@dataclasses.dataclass(frozen=True)
class TypedGraph:
    """A strongly typed graph, and why its types are what they are. `weights`: those that were encoded for it."""

    model: ModelProto = dataclasses.field(repr=False)
    policy: PrecisionPolicy
    weights: EncodedWeights | None = dataclasses.field(default=None, repr=False, compare=False)


def type_graph(
    model: ModelProto,
    precision: Precision,
    ranges: Ranges | None = None,
    options: TypingOptions | None = None,
    guess: TypedGraph | None = None,
) -> TypedGraph:
    """Type the FP32 graph `model` for `precision`; `model` itself is not changed.

    `ranges` None: nothing is kept for its range, which FP16 may not survive. FP32 with FP32 inputs and outputs gives
    `model` itself back. `guess`: the same `model`, typed with the same precision and options before there were ranges;
    where these change nothing, its graph is the result's. Raises PrecisionError, naming the tensor, for what is not
    finite in FP32, for damaged weights, and for inputs or outputs that fp16 cannot hold; UsageError for a pattern in
    `options.keep` that matches nothing.
    """
    options = options or TypingOptions()
    form = half_format(precision)
    types = element_types(model)
    floating = [node for node in model.graph.node if _computes_floats(node, types)]
    policy = PrecisionPolicy(precision, options.io_dtype, len(floating))
    if form is None and options.io_dtype is not IODtype.FP16:
        return TypedGraph(model, policy)
    completed = None if ranges is None else _checked(model, ranges, options)
    weights = None if guess is None else guess.weights
    decision = None if form is None else Decision(model, types, form, completed, options, weights)
    if guess is not None and _is_as_guessed(decision, guess.policy):
        typed, casts = guess.model, guess.policy.casts
    else:
        writer = _Writer(model, types, decision, options.io_dtype)
        typed, casts = writer.write(), writer.casts
    policy = dataclasses.replace(policy, casts=casts)
    if decision is None:
        return TypedGraph(typed, policy)
    return TypedGraph(typed, _explained(policy, decision, floating, completed), decision.weights)


def _is_as_guessed(decision: Decision | None, guessed: PrecisionPolicy) -> bool:
    return decision is None or list(decision.kept) == [kept.node for kept in guessed.kept]


def _explained(
    policy: PrecisionPolicy, decision: Decision, floating: list[NodeProto], ranges: Ranges | None
) -> PrecisionPolicy:
    half = [node for node in floating if not decision.is_fp32(node)]
    return dataclasses.replace(
        policy,
        half_nodes=len(half),
        margin=decision.options.margin,
        limit=decision.form.limit,
        ranges_source=None if ranges is None else ranges.source,
        images=0 if ranges is None else ranges.images,
        kept=tuple(decision.kept.values()),
        weights=WeightCounts.of(tuple(decision.weights.reports.values())),
        closest=_closest(half, ranges),
    )


def _computes_floats(node: NodeProto, types: Mapping[str, int]) -> bool:
    return any(types.get(name) == FLOAT for name in node.output)


def _closest(half: list[NodeProto], ranges: Ranges | None) -> tuple[tuple[str, float], ...]:
    known = {} if ranges is None else ranges.max_abs
    made = {name: known[name] for node in half for name in node.output if name in known}
    return tuple(sorted(made.items(), key=lambda item: -item[1])[:_CLOSEST])


def _checked(model: ModelProto, ranges: Ranges, options: TypingOptions) -> Ranges:
    """Ranges of all of `model`'s tensors, refused where no typing can help."""
    completed = ranges.completed(model)
    bad = completed.first_non_finite
    if bad is not None:
        raise PrecisionError(
            f"{bad} is not finite in FP32 already, so no precision can hold it.",
            "Check the checkpoint and the images: the model itself gives NaN or infinity.",
        )
    if options.io_dtype is IODtype.FP16:
        _check_interface(model, completed, options.margin)
    return completed


def _check_interface(model: ModelProto, ranges: Ranges, margin: float) -> None:
    for value in (*model.graph.input, *model.graph.output):
        largest = ranges.max_abs.get(value.name, 0.0)
        if value.type.tensor_type.elem_type == FLOAT and largest * margin > FP16.limit:
            raise PrecisionError(
                f"{value.name} reaches {largest:.4g}; times the margin of {margin:g} that is beyond fp16's limit of"
                f" {FP16.limit:g}.",
                "Use --io-dtype fp32.",
            )


class _Writer:
    """Writes the typed graph, node by node. Tensors are known here by their names in the FP32 graph."""

    def __init__(
        self, model: ModelProto, types: Mapping[str, int], decision: Decision | None, io_dtype: IODtype
    ) -> None:
        self._source = model
        self._types = types
        self._decision = decision
        self._io_type = FP16.onnx_type if io_dtype is IODtype.FP16 else FLOAT
        self._constants = initializers(model.graph)
        self._producers = producers(model.graph)
        self._inputs = {value.name for value in model.graph.input}
        self._outputs = {value.name for value in model.graph.output}
        self._made: dict[str, int] = {
            value.name: self._io_type for value in model.graph.input if self._is_float(value.name)
        }
        self._half_weights = {
            name for node in model.graph.node if self._type_of(node) != FLOAT for name in node.input
        } & self._constants.keys()
        self._used: dict[str, TensorProto] = {}
        self._cast: set[tuple[str, int]] = set()
        self._nodes: list[NodeProto] = []

    @property
    def casts(self) -> int:
        """Casts that were written."""
        return len(self._cast)

    def write(self) -> ModelProto:
        """The typed graph."""
        for node in self._source.graph.node:
            self._write_node(node)
        for name in self._outputs:
            if self._is_float(name):
                self._read(name, self._io_type)
        return self._assembled()

    def _is_float(self, name: str) -> bool:
        return is_float(self._types.get(name, 0))

    def _type_of(self, node: NodeProto) -> int:
        """Element type in which `node` computes."""
        if self._decision is None or self._decision.is_fp32(node):
            return FLOAT
        return self._decision.form.onnx_type

    def _write_node(self, node: NodeProto) -> None:
        twin = NodeProto()
        twin.CopyFrom(node)
        kind = self._type_of(node)
        twin.input[:] = [self._read(name, kind) if name else name for name in node.input]
        for index, name in enumerate(node.output):
            if self._is_float(name):
                self._made[name] = kind
                twin.output[index] = self._name_as_made(name)
        self._nodes.append(twin)

    def _name_as_made(self, name: str) -> str:
        """An output of the graph keeps its name for the type that the caller sees."""
        kind = self._made[name]
        foreign = name in self._outputs and kind != self._io_type
        return f"{name}/{type_name(kind)}" if foreign else name

    def _read(self, name: str, kind: int) -> str:
        """Name under which the tensor `name` can be read as `kind`; writes a Cast when there is none yet."""
        if name in self._constants:
            return self._read_constant(name, kind)
        if not self._is_float(name) or self._made[name] == kind:
            return self._name_as_made(name) if self._is_float(name) else name
        node_name = f"{self._cast_prefix(name)}/to_{type_name(kind)}"
        output = name if name in self._outputs and kind == self._io_type else node_name
        if (name, kind) not in self._cast:
            self._cast.add((name, kind))
            cast = helper.make_node("Cast", [self._name_as_made(name)], [output], name=node_name, to=kind)
            self._nodes.append(cast)
        return output

    def _cast_prefix(self, name: str) -> str:
        """Tensors are named after their nodes, but for the graph's inputs and outputs."""
        if name in self._inputs:
            return f"io/{name}"
        return self._producers[name].name if name in self._outputs else name

    def _read_constant(self, name: str, kind: int) -> str:
        tensor = self._constants[name]
        if tensor.data_type != FLOAT:
            self._used[name] = tensor
            return name
        if kind != FLOAT:
            assert self._decision is not None
            self._used[name] = self._decision.weights.tensor(name)
            return name
        stored = f"{name}/fp32" if name in self._half_weights else name
        if stored not in self._used:
            self._used[stored] = _renamed(tensor, stored)
        return stored

    def _assembled(self) -> ModelProto:
        model = ModelProto()
        for field, value in self._source.ListFields():
            if field.name != "graph":
                _set_field(model, field.name, value)
        graph = model.graph
        graph.name = self._source.graph.name
        graph.node.extend(self._nodes)
        graph.initializer.extend(self._used.values())
        graph.input.extend(self._value(value) for value in self._source.graph.input)
        graph.output.extend(self._value(value) for value in self._source.graph.output)
        if self._decision is not None and self._decision.form is BF16:
            raise_opset_of_proto(model, _BF16_OPSET)
        return model

    def _value(self, value: ValueInfoProto) -> ValueInfoProto:
        twin = ValueInfoProto()
        twin.CopyFrom(value)
        if self._is_float(value.name):
            twin.type.tensor_type.elem_type = self._io_type
        return twin


def _renamed(tensor: TensorProto, name: str) -> TensorProto:
    if tensor.name == name:
        return tensor
    twin = TensorProto()
    twin.CopyFrom(tensor)
    twin.name = name
    return twin


def _set_field(model: ModelProto, name: str, value: object) -> None:
    """Copy one field, single or repeated, of plain values or messages."""
    if isinstance(value, (int, str)):
        setattr(model, name, value)
    else:
        getattr(model, name).extend(value)

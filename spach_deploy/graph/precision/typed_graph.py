"""FP32 graph -> typed graph: every tensor gets the type that `decision.py` decided, with casts between types.

"Strongly typed" networks of TensorRT 10 and later, and of TensorRT for RTX, take their types from the graph; ONNX
Runtime runs the same file. A tensor that is read in another type than it is made in gets one Cast, named after it:
`layer3.0/Add/to_fp16`. Weights are stored in the type in which they are read; in both types, where both are read.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from spach_deploy.common.errors import PrecisionError
from spach_deploy.graph.editing import name_of, tensor_of
from spach_deploy.graph.opset import raise_opset
from spach_deploy.graph.precision.decision import Decision, EncodedWeights, PrecisionPolicy, TypingOptions, WeightCounts
from spach_deploy.graph.precision.formats import BF16, FLOAT, FP16, half_format, infer_all_types, is_float, type_name
from spach_deploy.graph.precision.ranges import Ranges
from spach_deploy.options.specs import IODtype, Precision

_CLOSEST = 5
_BF16_OPSET = 22
"""Conv takes bfloat16 from this opset on."""


@dataclasses.dataclass(frozen=True)
class TypedGraph:
    """A typed graph, and the record of its types with their reasons."""

    model: ir.Model = dataclasses.field(repr=False)
    policy: PrecisionPolicy


def type_graph(
    model: ir.Model, precision: Precision, ranges: Ranges | None = None, options: TypingOptions | None = None
) -> TypedGraph:
    """Type the FP32 graph `model` for `precision`; `model` itself is not changed.

    `ranges` None: no node is kept in FP32 for its range, so FP16 may overflow. For FP32 with FP32 inputs and outputs
    the result holds `model` itself. Raises PrecisionError, naming the tensor, for what is not finite in FP32, for
    damaged weights, and for inputs or outputs that fp16 cannot hold; UsageError for a pattern in `options.keep` that
    matches nothing.
    """
    options = options or TypingOptions()
    form = half_format(precision)
    infer_all_types(model)
    floating = [node for node in model.graph if any(value.dtype == FLOAT for value in node.outputs)]
    policy = PrecisionPolicy(precision, options.io_dtype, len(floating))
    if form is None and options.io_dtype is not IODtype.FP16:
        return TypedGraph(model, policy)
    completed = None if ranges is None else _checked(model, ranges, options)
    decision = None if form is None else Decision(model, form, completed, options)
    typed = SetTypes(decision, options.io_dtype)(model).model
    policy = dataclasses.replace(policy, casts=len(typed.graph) - len(model.graph))
    if decision is not None:
        policy = _explained(policy, decision, floating, completed)
    return TypedGraph(typed, policy)


def _explained(
    policy: PrecisionPolicy, decision: Decision, floating: list[ir.Node], ranges: Ranges | None
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


def _closest(half: list[ir.Node], ranges: Ranges | None) -> tuple[tuple[str, float], ...]:
    known = {} if ranges is None else ranges.max_abs
    made = {name: known[name] for node in half for name in map(name_of, node.outputs) if name in known}
    return tuple(sorted(made.items(), key=lambda item: -item[1])[:_CLOSEST])


def _checked(model: ir.Model, ranges: Ranges, options: TypingOptions) -> Ranges:
    """Ranges of all tensors of `model`. Raises PrecisionError for one that is not finite, or an input or output that
    fp16 cannot hold.
    """
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


def _check_interface(model: ir.Model, ranges: Ranges, margin: float) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        largest = ranges.max_abs.get(name_of(value), 0.0)
        if value.dtype == FLOAT and largest * margin > FP16.limit:
            raise PrecisionError(
                f"{value.name} reaches {largest:.4g}; times the margin of {margin:g} that is beyond fp16's limit of"
                f" {FP16.limit:g}.",
                "Use --io-dtype fp32.",
            )


class SetTypes(ir.passes.FunctionalPass):
    """Types an FP32 graph: nodes that `decision` does not keep in FP32 are computed in half.

    Without a decision all nodes stay in FP32. `io_dtype` FP16: float inputs and outputs are fp16.
    """

    def __init__(self, decision: Decision | None, io_dtype: IODtype) -> None:
        self._decision = decision
        self._io_type = FP16.dtype if io_dtype is IODtype.FP16 else FLOAT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """A typed copy of `model`; weights that stay FP32 are shared."""
        typed = model.clone()
        kinds = [self._type_of(node) for node in model.graph]
        _Typing(typed.graph, dict(zip(typed.graph, kinds, strict=True)), self._io_type, self._weights()).write()
        if self._decision is not None and self._decision.form is BF16:
            raise_opset(typed, _BF16_OPSET)
        return ir.passes.PassResult(typed, modified=True)

    def _type_of(self, node: ir.Node) -> ir.DataType:
        """The element type in which `node` computes."""
        if self._decision is None or self._decision.is_fp32(node):
            return FLOAT
        return self._decision.form.dtype

    def _weights(self) -> EncodedWeights | None:
        return None if self._decision is None else self._decision.weights


class _Typing:
    """Types a graph in place, node by node; a Cast is put before its first reader. `kinds`: the type of each node."""

    def __init__(
        self,
        graph: ir.Graph,
        kinds: dict[ir.Node, ir.DataType],
        io_type: ir.DataType,
        weights: EncodedWeights | None,
    ) -> None:
        self._graph, self._kinds, self._io_type, self._weights = graph, kinds, io_type, weights
        self._in_half = {value for node, kind in kinds.items() if kind != FLOAT for value in node.inputs}
        self._read: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._outer = {value: name_of(value) for value in graph.outputs}

    def write(self) -> None:
        for given in self._graph.inputs:
            _set_type(given, self._io_type)
        for node, kind in self._kinds.items():
            for index, value in enumerate(node.inputs):
                if value is not None:
                    node.replace_input_with(index, self._as_read(value, kind, node))
            for made in node.outputs:
                self._make(made, kind)
        for output in self._outer:
            self._as_read(output, self._io_type)
        self._keep_constants_that_are_read()

    def _make(self, value: ir.Value, kind: ir.DataType) -> None:
        """Set the type of a node's output. An output of the graph that needs a Cast leaves its name to the Cast."""
        if is_float(value.dtype) and value in self._outer and kind != self._io_type:
            value.name = f"{value.name}/{type_name(kind)}"
        _set_type(value, kind)

    def _as_read(self, value: ir.Value, kind: ir.DataType, reader: ir.Node | None = None) -> ir.Value:
        """`value` in the type `kind`; a Cast that does not exist yet is added before `reader`, or at the end."""
        if not is_float(value.dtype):
            kind = ir.DataType.UNDEFINED
        if (value, kind) not in self._read:
            self._read[value, kind] = self._cast(value, kind, reader)
        return self._read[value, kind]

    def _cast(self, value: ir.Value, kind: ir.DataType, reader: ir.Node | None) -> ir.Value:
        if value.is_initializer():
            return self._constant(value, kind)
        if kind in (value.dtype, ir.DataType.UNDEFINED):
            return value
        name = f"{self._cast_prefix(value)}/to_{type_name(kind)}"
        is_outer = value in self._outer and kind == self._io_type
        result = ir.val(self._outer[value] if is_outer else name, kind, value.shape)
        cast = ir.node("Cast", [value], {"to": kind}, outputs=[result], name=name)
        if reader is None:
            self._graph.append(cast)
        else:
            self._graph.insert_before(reader, cast)
        if is_outer:
            self._graph.outputs[self._graph.outputs.index(value)] = result
        return result

    def _cast_prefix(self, value: ir.Value) -> str:
        """The name that a Cast's name begins with: the tensor's, or its maker's for an output of the graph."""
        if value.is_graph_input():
            return f"io/{value.name}"
        return name_of(value.producer()) if value in self._outer else name_of(value)

    def _constant(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """An initializer in the type `kind`. One that is read in both types gets a second, FP32 one, `NAME/fp32`."""
        if value.dtype == FLOAT == kind and value in self._in_half:
            return ir.val(f"{value.name}/fp32", const_value=tensor_of(value))
        if value.dtype != FLOAT or kind == FLOAT:
            return value
        assert self._weights is not None
        return ir.val(name_of(value), const_value=self._weights.tensor(name_of(value)))

    def _keep_constants_that_are_read(self) -> None:
        """Register the initializers that nodes read, in the order of first use."""
        self._graph.initializers.clear()
        for value in self._read.values():
            if value.producer() is None and value.const_value is not None:
                self._graph.register_initializer(value)


def _set_type(value: ir.Value, kind: ir.DataType) -> None:
    if is_float(value.dtype):
        value.type = ir.TensorType(kind)

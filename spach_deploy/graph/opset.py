"""Opset and IR version of a graph: what its operators need, and no more.

A runtime refuses a file whose IR version or opset is newer than it knows, whatever the file holds. So a graph gets the
lowest IR version that its opset has. Another opset than the export's (`--opset`) is written by exact conversions:

    operator     below   becomes
    Gelu         20      0.5 x (1 + Erf(x / sqrt 2)), marked to stay in FP32
    ReduceMean   18      the same, its axes as an attribute
    Split        18      the same, without the number of its parts, which its outputs tell

All else stays as it is, where the other opset's own schema takes it: inputs, attributes and types. The converted graph
is proven like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.defs import OpSchema

from spach_deploy.common.errors import UnavailableError, UsageError
from spach_deploy.graph.edit import (
    attributes,
    constant,
    initializers,
    mark_float32,
    remove_unused_initializers,
    replace_nodes,
)
from spach_deploy.options.specs import ExportOptions, Precision

Convert = Callable[[GraphProto, NodeProto], list[NodeProto]]

_OWN = ("", "ai.onnx")
"""Spellings of ONNX's own domain."""

FP8_OPSET = 21
"""ONNX Runtime has FP8 from 1.20 on at this opset, at 20 from 1.32 on."""

_OTHER_MEANINGS = {"GroupNormalization": 21}
"""Operators whose meaning changed with an opset, their form staying: scale and bias by channel, which were by group."""


def opset_of(model: ModelProto) -> int:
    """Version of ONNX's own operators."""
    return int(next(entry.version for entry in model.opset_import if entry.domain in _OWN))


def set_opset(model: ModelProto, opset: int) -> None:
    """Write the header for `opset`, in place, with the lowest IR version that it has; nodes stay as they are."""
    for entry in model.opset_import:
        if entry.domain in _OWN:
            entry.version = opset
    model.ir_version = helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)


def raise_opset(model: ModelProto, opset: int) -> None:
    """`opset` at least. Raises UsageError for an operator that means something else from there on."""
    before = opset_of(model)
    for node in model.graph.node:
        if before < _OTHER_MEANINGS.get(node.op_type, 0) <= opset:
            raise UsageError(f"{node.op_type} ({node.name}) means something else in opset {opset}.", "Use --fp16.")
    set_opset(model, max(before, opset))


def convert_opset(model: ModelProto, opset: int, types: Mapping[str, int]) -> None:
    """Write `model` in another opset, in place. `types`: the element type of every tensor, as ONNX numbers them.

    Raises UsageError that names an operator which that opset does not have.
    """
    graph = model.graph
    if opset > opset_of(model):
        raise_opset(model, opset)
    rules = {name: rule for name, (since, rule) in _RULES.items() if opset < since}
    changed = {index: node for index, node in enumerate(graph.node) if node.op_type in rules}
    replace_nodes(graph, {index: rules[node.op_type](graph, node) for index, node in changed.items()})
    remove_unused_initializers(graph)
    set_opset(model, opset)
    check_operators(model, types)


def check_operators(model: ModelProto, types: Mapping[str, int]) -> None:
    """UsageError that names the first operator which the graph's opset does not have, or not with such types.

    Tensors that `types` does not know are float.
    """
    opset = opset_of(model)
    for node in model.graph.node:
        if not _is_in(opset, node, types):
            raise _refusal(node, types, opset)


def _refusal(node: NodeProto, types: Mapping[str, int], opset: int) -> UsageError:
    later = range(opset + 1, onnx.defs.onnx_opset_version() + 1)
    needed = next((version for version in later if _is_in(version, node, types)), None)
    said = f"{node.op_type} ({node.name}) is not in opset {opset} as this graph has it"
    if needed is None:
        return UsageError(f"{said}.", "Leave --opset out.")
    return UsageError(f"{said}: it needs opset {needed}.", f"Give --opset {needed} or more, or leave it out.")


def _is_in(opset: int, node: NodeProto, types: Mapping[str, int]) -> bool:
    """Whether the operator of that opset takes the node's attributes, and its inputs with their types."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return False
    known = all(attribute.name in schema.attributes for attribute in node.attribute)
    counted = schema.min_input <= len(node.input) <= schema.max_input
    return known and counted and not schema.deprecated and all(_types_fit(schema, node, types))


def _types_fit(schema: OpSchema, node: NodeProto, types: Mapping[str, int]) -> Iterator[bool]:
    for index, name in enumerate(node.input):
        if name:
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            yield _spelt(types.get(name, TensorProto.FLOAT)) in formal.types


def _spelt(kind: int) -> str:
    """As schemas name types: `tensor(float16)`."""
    return f"tensor({TensorProto.DataType.Name(kind).lower()})"


def check_opset(options: ExportOptions) -> None:
    """Refuse, before any work, an opset in which no such graph can be written, or verified here.

    Raises UsageError with the operator that needs a newer one, UnavailableError for one that ONNX Runtime here does not
    know.
    """
    if options.opset is None:
        return
    lowest, reason = _lowest(options)
    if options.opset < lowest:
        raise UsageError(f"--opset {options.opset} is too low: {reason}.", f"Give {lowest} or more, or leave it out.")
    newest = onnx.defs.onnx_opset_version()
    if options.opset > newest:
        raise UsageError(f"--opset {options.opset} is unknown to onnx {onnx.__version__}.", f"Give {newest} or less.")
    _check_runtime(options.opset)


def _lowest(options: ExportOptions) -> tuple[int, str]:
    """The lowest opset for such options, and what needs it."""
    found = [(_since("LayerNormalization"), "LayerNormalization")]
    if Precision.BF16 in (options.precision, options.rest):
        found.append((_since("Conv", "tensor(bfloat16)"), "Conv in bfloat16"))
    if options.precision.is_quantized and options.rest is Precision.FP16:
        found.append((_since("QuantizeLinear", "tensor(float16)"), "QuantizeLinear of float16"))
    if options.precision is Precision.FP8:
        found.append((FP8_OPSET, "QuantizeLinear to FP8, as most runtimes have it,"))
    lowest, what = max(found)
    return lowest, f"{what} needs opset {lowest}"


def _since(operator: str, kind: str = "tensor(float)") -> int:
    """The first opset whose operator reads tensors of that type."""
    for opset in range(1, onnx.defs.onnx_opset_version() + 1):
        try:
            schema = onnx.defs.get_schema(operator, opset)
        except onnx.defs.SchemaError:
            continue
        if kind in schema.inputs[0].types:
            return opset
    raise UsageError(f"onnx {onnx.__version__} has no {operator} of {kind}.", "pip install --upgrade onnx")


def _check_runtime(opset: int) -> None:
    """Whether ONNX Runtime here takes graphs of that opset: it says so by loading one."""
    import onnxruntime

    from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "smallest", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    set_opset(model, opset)
    try:
        with OnnxRuntimeRunner(model.SerializeToString()):
            return
    except UsageError as error:
        raise UnavailableError(
            f"ONNX Runtime {onnxruntime.__version__} here does not load opset {opset}, so nothing could be verified.",
            "Give a lower --opset, or: pip install --upgrade onnxruntime",
        ) from error


def _gelu(graph: GraphProto, node: NodeProto) -> list[NodeProto]:
    """0.5 x (1 + Erf(x / sqrt 2)): Gelu's own definition. Gelu by tanh stays, and is refused."""
    if attributes(node).get("approximate", b"none") != b"none":
        return [node]
    known = initializers(graph)
    for name, value in (("gelu.scale", np.sqrt(0.5)), ("gelu.one", 1.0), ("gelu.half", 0.5)):
        if name not in known:
            graph.initializer.append(constant(name, np.array(value, np.float32)))
    x, stem = node.input[0], node.name
    steps = (
        ("Mul", "scaled", x, "gelu.scale"),
        ("Erf", "erf", f"{stem}/scaled"),
        ("Add", "shifted", f"{stem}/erf", "gelu.one"),
        ("Mul", "doubled", x, f"{stem}/shifted"),
        ("Mul", "halved", f"{stem}/doubled", "gelu.half"),
    )
    nodes = [
        mark_float32(helper.make_node(operator, inputs, [f"{stem}/{label}"], name=f"{stem}/{label}"))
        for operator, label, *inputs in steps
    ]
    nodes[-1].output[0] = node.output[0]
    return nodes


def _reduce_mean(graph: GraphProto, node: NodeProto) -> list[NodeProto]:
    """Without constant axes it stays, and is refused."""
    axes = initializers(graph).get(node.input[1]) if len(node.input) == 2 else None
    if axes is None:
        return [node]
    twin = _without(node, "noop_with_empty_axes")
    del twin.input[1:]
    twin.attribute.append(helper.make_attribute("axes", numpy_helper.to_array(axes).tolist()))
    return [twin]


def _split(graph: GraphProto, node: NodeProto) -> list[NodeProto]:
    return [_without(node, "num_outputs")]


def _without(node: NodeProto, attribute: str) -> NodeProto:
    twin = NodeProto()
    twin.CopyFrom(node)
    del twin.attribute[:]
    twin.attribute.extend(entry for entry in node.attribute if entry.name != attribute)
    return twin


_RULES: dict[str, tuple[int, Convert]] = {"Gelu": (20, _gelu), "ReduceMean": (18, _reduce_mean), "Split": (18, _split)}
"""By operator: the opset below which it is converted, and how."""

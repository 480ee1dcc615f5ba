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

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper
from onnx.defs import OpSchema

from spach_deploy.common.errors import UnavailableError, UsageError
from spach_deploy.graph.editing import (
    NodeWriter,
    array_of,
    constant,
    mark_float32,
    name_of,
    remove_unused_initializers,
    replace_nodes,
)
from spach_deploy.options.specs import ExportOptions, Precision

Convert = Callable[[ir.Graph, ir.Node], None]

FP8_OPSET = 21
"""ONNX Runtime has FP8 from 1.20 on at this opset, at 20 from 1.32 on."""

_OTHER_MEANINGS = {"GroupNormalization": 21}
"""Operators whose meaning changed with an opset, their form staying: scale and bias by channel, which were by group."""


def opset_of(model: ir.Model) -> int:
    """Version of ONNX's own operators."""
    return model.opset_imports[""]


def set_opset(model: ir.Model, opset: int) -> None:
    """Write the header for `opset`, in place, with the lowest IR version that it has; nodes stay as they are."""
    model.opset_imports[""] = opset
    entries = [helper.make_opsetid(*entry) for entry in model.opset_imports.items()]
    model.ir_version = helper.find_min_ir_version_for(entries, ignore_unknown=True)


def raise_opset(model: ir.Model, opset: int) -> None:
    """`opset` at least. Raises UsageError for an operator that means something else from there on."""
    before = opset_of(model)
    for node in model.graph:
        if before < _OTHER_MEANINGS.get(node.op_type, 0) <= opset:
            raise UsageError(f"{node.op_type} ({node.name}) means something else in opset {opset}.", "Use --fp16.")
    set_opset(model, max(before, opset))


def convert_opset(model: ir.Model, opset: int) -> None:
    """Write `model`, whose types are known (`elements.infer_all_types`), in another opset, in place.

    Raises UsageError that names an operator which that opset does not have.
    """
    if opset > opset_of(model):
        raise_opset(model, opset)
    rules = {name: rule for name, (since, rule) in _RULES.items() if opset < since}
    for node in [node for node in model.graph if node.op_type in rules]:
        rules[node.op_type](model.graph, node)
    remove_unused_initializers(model.graph)
    set_opset(model, opset)
    check_operators(model)


def check_operators(model: ir.Model) -> None:
    """UsageError that names the first operator which the graph's opset does not have, or not with such types.

    Tensors whose type is not known count as float.
    """
    opset = opset_of(model)
    for node in model.graph:
        if not _is_in(opset, node):
            raise _refusal(node, opset)


def _refusal(node: ir.Node, opset: int) -> UsageError:
    later = range(opset + 1, onnx.defs.onnx_opset_version() + 1)
    needed = next((version for version in later if _is_in(version, node)), None)
    said = f"{node.op_type} ({node.name}) is not in opset {opset} as this graph has it"
    if needed is None:
        return UsageError(f"{said}.", "Leave --opset out.")
    return UsageError(f"{said}: it needs opset {needed}.", f"Give --opset {needed} or more, or leave it out.")


def _is_in(opset: int, node: ir.Node) -> bool:
    """Whether the operator of that opset takes the node's attributes, and its inputs with their types."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return False
    known = all(name in schema.attributes for name in node.attributes)
    counted = schema.min_input <= len(node.inputs) <= schema.max_input
    return known and counted and not schema.deprecated and all(_types_fit(schema, node))


def _types_fit(schema: OpSchema, node: ir.Node) -> Iterator[bool]:
    for index, value in enumerate(node.inputs):
        if value is not None:
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            yield _spelt(value.dtype or ir.DataType.FLOAT) in formal.types


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
    model = ir.from_proto(helper.make_model(graph))
    set_opset(model, opset)
    try:
        with OnnxRuntimeRunner(ir.to_proto(model).SerializeToString()):
            return
    except UsageError as error:
        raise UnavailableError(
            f"ONNX Runtime {onnxruntime.__version__} here does not load opset {opset}, so nothing could be verified.",
            "Give a lower --opset, or: pip install --upgrade onnxruntime",
        ) from error


def _gelu(graph: ir.Graph, node: ir.Node) -> None:
    """0.5 x (1 + Erf(x / sqrt 2)): Gelu's own definition. Gelu by tanh stays, and is refused."""
    if node.attributes.get_string("approximate", "none") != "none":
        return
    values = {"scale": np.sqrt(0.5), "one": 1.0, "half": 0.5}
    scale, one, half = (
        constant(graph, f"gelu.{label}", np.array([value], np.float32)) for label, value in values.items()
    )
    x, writer = node.inputs[0], NodeWriter(name_of(node))
    erf = writer.add("Erf", "erf", writer.add("Mul", "scaled", x, scale))
    doubled = writer.add("Mul", "doubled", x, writer.add("Add", "shifted", erf, one))
    writer.add("Mul", "halved", doubled, half)
    mark_float32(*writer.nodes)
    replace_nodes([node], writer.nodes)


def _reduce_mean(_graph: ir.Graph, node: ir.Node) -> None:
    """Without constant axes it stays, and is refused."""
    axes = array_of(node.inputs[1]) if len(node.inputs) == 2 else None
    if axes is not None:
        node.resize_inputs(1)
        node.attributes.pop("noop_with_empty_axes", None)
        node.attributes.add(ir.AttrInt64s("axes", axes.tolist()))


def _split(_graph: ir.Graph, node: ir.Node) -> None:
    node.attributes.pop("num_outputs", None)


_RULES: dict[str, tuple[int, Convert]] = {"Gelu": (20, _gelu), "ReduceMean": (18, _reduce_mean), "Split": (18, _split)}
"""By operator: the opset below which it is converted, and how."""

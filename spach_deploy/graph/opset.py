"""Opset and IR version of a graph: set, raised, or lowered by converting operators (`--opset`).

A runtime refuses a file whose IR version or opset is newer than it knows, whichever operators the file holds. So a
graph gets the lowest IR version that its opset has. Three operators are converted for an older opset, exactly:

    operator     below   becomes
    Gelu         20      0.5 x (1 + Erf(x / sqrt 2)), marked to stay in FP32
    ReduceMean   18      the same, its axes as an attribute
    Split        18      the same, without `num_outputs`

All other nodes stay, if the schema of the older opset takes their inputs, attributes and types. The converted graph is
compared with the reference like any other.
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
"""Opset of graphs with FP8: ONNX Runtime 1.20 and later load FP8 at opset 21, only 1.32 and later at opset 20."""

_OTHER_MEANINGS = {"GroupNormalization": 21}
"""Operators that compute something else from an opset on, with the same inputs and attributes.

GroupNormalization: scale and bias were one a group before opset 21, and are one a channel since.
"""


def opset_of(model: ir.Model) -> int:
    """The opset of ONNX's default domain."""
    return model.opset_imports[""]


def set_opset(model: ir.Model, opset: int) -> None:
    """Set the opset, and the lowest IR version that has it, in place; nodes stay as they are."""
    model.opset_imports[""] = opset
    entries = [helper.make_opsetid(*entry) for entry in model.opset_imports.items()]
    model.ir_version = helper.find_min_ir_version_for(entries, ignore_unknown=True)


def raise_opset(model: ir.Model, opset: int) -> None:
    """Set the opset to at least `opset`, in place. Raises UsageError for an operator that would change its meaning."""
    before = opset_of(model)
    for node in model.graph:
        if before < _OTHER_MEANINGS.get(node.op_type, 0) <= opset:
            raise UsageError(f"{node.op_type} ({node.name}) means something else in opset {opset}.", "Use --fp16.")
    set_opset(model, max(before, opset))


def convert_opset(model: ir.Model, opset: int) -> None:
    """Convert `model` to another opset, in place. Its tensors' types must be known (`formats.infer_all_types`).

    Raises UsageError that names a node which cannot be written in that opset.
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
    """UsageError for the first node whose operator, attributes or input types the graph's opset does not have.

    Tensors whose type is not known count as float32.
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
    """Whether the operator's schema in `opset` takes the node's attributes, and its inputs with their types."""
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
    """Name of an element type in an operator's schema: `tensor(float16)`."""
    return f"tensor({TensorProto.DataType.Name(kind).lower()})"


def check_opset(options: ExportOptions) -> None:
    """Check `--opset` before any work is done.

    Raises UsageError for an opset that is too low for the precision, or that the installed onnx does not know;
    UnavailableError for one that the installed ONNX Runtime does not load, so that no graph could be verified.
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
    """The lowest opset in which an export with these options can be written, and a clause that says why."""
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
    """The first opset in which the operator's first input may have the type `kind`."""
    for opset in range(1, onnx.defs.onnx_opset_version() + 1):
        try:
            schema = onnx.defs.get_schema(operator, opset)
        except onnx.defs.SchemaError:
            continue
        if kind in schema.inputs[0].types:
            return opset
    raise UsageError(f"onnx {onnx.__version__} has no {operator} of {kind}.", "pip install --upgrade onnx")


def _check_runtime(opset: int) -> None:
    """UnavailableError unless the installed ONNX Runtime loads a graph of this opset; one node is tried."""
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
    """Write Gelu as 0.5 x (1 + Erf(x / sqrt 2)), its definition. Gelu by tanh stays, and `check_operators`
    refuses it.
    """
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
    """Turn constant axes into an attribute. Axes that are not constant stay, and `check_operators` refuses them."""
    axes = array_of(node.inputs[1]) if len(node.inputs) == 2 else None
    if axes is not None:
        node.resize_inputs(1)
        node.attributes.pop("noop_with_empty_axes", None)
        node.attributes.add(ir.AttrInt64s("axes", axes.tolist()))


def _split(_graph: ir.Graph, node: ir.Node) -> None:
    node.attributes.pop("num_outputs", None)


_RULES: dict[str, tuple[int, Convert]] = {"Gelu": (20, _gelu), "ReduceMean": (18, _reduce_mean), "Split": (18, _split)}
"""By operator: the opset below which it is converted, and the function that does so."""

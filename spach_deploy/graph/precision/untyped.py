"""The FP32 graph in a typed graph: what `typed_graph.py` did, taken back, so that passes on FP32 graphs apply again.

Weights are widened, which loses nothing: typed again in the same format, they have the same bits.
"""

from __future__ import annotations

import onnx_ir as ir

from spach_deploy.graph.editing import (
    made_values,
    mark_float32,
    name_of,
    operand,
    remove_unused_initializers,
    tensor_of,
)
from spach_deploy.graph.precision.decision import STATISTICS
from spach_deploy.graph.precision.formats import FLOAT, HALF_FORMATS, decode, infer_all_types, is_float, is_view

_BOTH = "/fp32"
"""Ends the name of the FP32 copy of weights that are read in FP32 and in half."""


def untyped_graph(typed: ir.Model) -> ir.Model:
    """An FP32 copy of a typed graph. Nodes that compute in FP32 in `typed` are marked to stay so.

    Casts between floats are gone; inputs and outputs of half type are FP32. Tensors keep their names. Raises
    PrecisionError for a tensor whose type cannot be inferred.
    """
    model = typed.clone()
    infer_all_types(model)
    graph = model.graph
    for node in graph:
        is_wide = any(value.dtype == FLOAT for value in node.outputs)
        if (
            is_wide and node.op_type not in ("Cast", *STATISTICS) and not is_view(node)
        ):  # others stay by their own rules
            mark_float32(node)
    for node in list(graph):
        if node.op_type == "Cast" and is_float(node.outputs[0].dtype) and is_float(operand(node, 0).dtype):
            _remove_cast(graph, node)
    for value in (*graph.inputs, *made_values(graph), *graph.initializers.values()):
        if value.dtype in HALF_FORMATS:
            value.type = ir.TensorType(FLOAT)
            if value.const_value is not None:
                value.const_value = ir.Tensor(decode(tensor_of(value)), name=value.name)
    _join_copies(graph)
    remove_unused_initializers(graph)
    infer_all_types(model)
    return model


def _remove_cast(graph: ir.Graph, cast: ir.Node) -> None:
    source, made = operand(cast, 0), cast.outputs[0]
    if made.is_graph_output():
        if source.is_graph_input() or source.is_graph_output():  # one tensor cannot have both names
            cast.op_type = "Identity"
            cast.attributes.clear()
            return
        name, shape = name_of(made), made.shape
        graph.outputs[graph.outputs.index(made)] = source
        made.name, source.name = f"{name}/cast", name
        source.shape = shape
    made.replace_all_uses_with(source)
    graph.remove(cast, safe=True)


def _join_copies(graph: ir.Graph) -> None:
    """Let all readers of weights that are stored in both types read the FP32 ones, under the weights' own name."""
    for name, exact in list(graph.initializers.items()):
        rounded = graph.initializers.get(name.removesuffix(_BOTH))
        if name.endswith(_BOTH) and rounded is not None:
            rounded.const_value = ir.Tensor(tensor_of(exact).numpy(), name=rounded.name)
            exact.replace_all_uses_with(rounded)

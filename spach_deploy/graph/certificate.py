"""The certificate: properties that every exported graph has, checked here and stored in the manifest.

- The graph is valid ONNX.
- It has no shape arithmetic, so every shape but the batch is known when the engine is built.
- At most one dimension is symbolic, the batch, and every other extent of every tensor is known.
- No initializer is unused.
- Every node's name begins with the path of a PyTorch module, or with `model` or `io`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection

import onnx
import onnx_ir as ir
from onnx import ModelProto, TypeProto

from spach_deploy.common.errors import CertificateError
from spach_deploy.graph.editing import name_of, owner, without_weights
from spach_deploy.graph.opset import opset_of
from spach_deploy.runtime.onnxruntime_runner import tensor_proto

FORBIDDEN = (
    "Shape",
    "Size",
    "Gather",
    "GatherND",
    "Expand",
    "Where",
    "ConstantOfShape",
    "ScatterND",
    "Range",
    "NonZero",
)
"""Operators of shape arithmetic and data-dependent indexing."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Facts of a graph that passed all checks. `operators`: nodes by operator. `symbolic`: name of the symbolic
    dimension. `modules_named`: how many module paths its nodes' names begin with. `broken`: promises that the graph of
    a user's own module does not keep.
    """

    opset: int
    ir_version: int
    nodes: int
    operators: dict[str, int]
    symbolic: str | None
    modules_named: int
    broken: tuple[str, ...] = ()


def certify(model: ir.Model, modules: Collection[str], *, is_own: bool = False) -> Certificate:
    """Check `model`; `modules` are the module paths that node names may begin with. `is_own`: it is of a user's own
    module, whose shapes may be computed when it runs; what does not hold then is in `broken`.

    Raises CertificateError that lists every failed check with the first nodes concerned.
    """
    light = without_weights(model)
    _check_form(model, light)
    symbolic = _symbolic_dimensions(light)
    promised = [*_forbidden(model), *_unknown_shapes(infer_shapes(light))]
    problems = [
        *([] if is_own else promised),
        *([f"more than one symbolic dimension: {', '.join(sorted(symbolic))}"] if len(symbolic) > 1 else []),
        *_unused(model),
        *_unnamed(model, modules),
    ]
    if problems:
        raise CertificateError(f"The exported graph cannot be certified: {'; '.join(problems)}.")
    operators = dict(Counter(node.op_type for node in model.graph).most_common())
    named = len({owner(name_of(node)) for node in model.graph})
    return Certificate(
        *(opset_of(model), model.ir_version, len(model.graph), operators, next(iter(symbolic), None), named),
        broken=tuple(promised),
    )


def _check_form(model: ir.Model, light: ModelProto) -> None:
    """Run onnx.checker on the graph without weights and on each weight: on both at once it would copy all weights."""
    try:
        onnx.checker.check_model(light)
        for value in model.graph.initializers.values():
            onnx.checker.check_tensor(tensor_proto(value))
    except onnx.checker.ValidationError as error:
        raise CertificateError(f"The exported graph is not valid ONNX: {error}") from error


def infer_shapes(light: ModelProto) -> ModelProto:
    """`light` with the shape of every tensor that onnx can infer. Weights may be inputs instead of initializers: shapes
    do not depend on their values. Raises CertificateError where shapes contradict each other.
    """
    try:
        return onnx.shape_inference.infer_shapes(light, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise CertificateError(f"Shapes of the exported graph contradict each other: {error}") from error


def _forbidden(model: ir.Model) -> list[str]:
    found = [f"{node.op_type} at {node.name}" for node in model.graph if node.op_type in FORBIDDEN]
    return [f"shape arithmetic: {', '.join(found[:5])}{' and more' if len(found) > 5 else ''}"] if found else []


def _symbolic_dimensions(light: ModelProto) -> set[str]:
    values = (*light.graph.input, *light.graph.output)
    return {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param}


def _unknown_shapes(inferred: ModelProto) -> list[str]:
    known = {value.name for value in inferred.graph.value_info if _is_known(value.type)}
    known |= {value.name for value in (*inferred.graph.output, *inferred.graph.input) if _is_known(value.type)}
    unknown = [name for node in inferred.graph.node for name in node.output if name and name not in known]
    return [f"shapes unknown: {', '.join(unknown[:5])}"] if unknown else []


def _is_known(value: TypeProto) -> bool:
    """Whether every dimension but one, the batch, has a number."""
    if not value.tensor_type.HasField("shape"):
        return False
    dims = list(value.tensor_type.shape.dim)
    return sum(not dim.HasField("dim_value") for dim in dims) <= 1


def _unused(model: ir.Model) -> list[str]:
    unused = [name for name, value in model.graph.initializers.items() if not value.uses()]
    return [f"unused initializers: {', '.join(unused[:5])}"] if unused else []


def _unnamed(model: ir.Model, modules: Collection[str]) -> list[str]:
    allowed = {*modules, "model", "io"}
    strange = [name_of(node) for node in model.graph if owner(name_of(node)) not in allowed]
    return [f"nodes without a module path: {', '.join(strange[:5])}"] if strange else []

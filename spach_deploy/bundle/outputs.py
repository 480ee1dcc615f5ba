"""A graph's outputs as data: what the model computes, what follows from its logits, and the expected values of both.

    tensors = graph_outputs(model.outputs, options.outputs)      # TensorInfo: name, shape, dtype, role
    expected = expected_outputs(reference, tensors)              # arrays by name

The role decides what an output is good for: classes are ranked, named, counted and compared for logits alone, and any
output is compared by its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.options.specs import IODtype, OutputSpec, Role

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Float32Array = npt.NDArray[np.float32]

INPUT = "input"
"""The name of every graph's input."""

LOGITS, PROBABILITIES = Role.LOGITS.value, Role.PROBABILITIES.value
TOP_VALUES, TOP_INDICES = Role.TOP_VALUES.value, Role.TOP_INDICES.value

CLASS_SCORES = (Role.LOGITS, Role.PROBABILITIES)
"""Roles of outputs with a number for each class."""

DERIVED = (Role.PROBABILITIES, Role.TOP_VALUES, Role.TOP_INDICES)
"""Roles of outputs that follow from the logits."""


def model_outputs(tensors: Iterable[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Those of a graph's outputs that its model computes."""
    return tuple(tensor for tensor in tensors if tensor.role not in DERIVED)


def of_role(tensors: Iterable[TensorInfo], role: Role) -> TensorInfo | None:
    """The first output of a role; None without one."""
    return next((tensor for tensor in tensors if tensor.role is role), None)


def roles_of(tensors: Iterable[TensorInfo]) -> dict[str, Role]:
    """Roles by name."""
    return {tensor.name: tensor.role or Role.OTHER for tensor in tensors}


def graph_outputs(model: Sequence[TensorInfo], spec: OutputSpec) -> tuple[TensorInfo, ...]:
    """The outputs of a graph whose model computes `model`, with those that `spec` adds, in its dtypes and names."""
    floats = "float16" if spec.io_dtype is IODtype.FP16 else "float32"
    names = renamed(spec.names)
    tensors = [_with(tensor, tensor.name, floats) for tensor in model]
    if (logits := of_role(model, Role.LOGITS)) is not None:
        if spec.softmax:
            tensors.append(_derived(Role.PROBABILITIES, names, floats, logits.shape))
        if spec.top_k is not None:
            shape = (*logits.shape[:1], spec.top_k)
            tensors.append(_derived(Role.TOP_VALUES, names, floats, shape))
            tensors.append(_derived(Role.TOP_INDICES, names, "int64", shape))
    return tuple(tensors)


def _with(tensor: TensorInfo, name: str, dtype: str) -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=tensor.shape, layout=tensor.layout, role=tensor.role)


def _derived(role: Role, names: Mapping[str, str], dtype: str, shape: tuple[int | None, ...]) -> TensorInfo:
    return TensorInfo(name=names.get(role.value, role.value), dtype=dtype, shape=shape, layout="NC", role=role)


def renamed(names: Iterable[str]) -> dict[str, str]:
    """New names by old ones, from OLD=NEW."""
    pairs = (name.partition("=") for name in names)
    return {old: new for old, _, new in pairs}


def expected_outputs(reference: Mapping[str, Float32Array], tensors: Sequence[TensorInfo]) -> dict[str, Array]:
    """The expected value of every one of `tensors`, from what the reference computed, float32 by name.

    Probabilities: float32 (N, classes); top values: float32 (N, K); top indices: int64 (N, K). Among equal logits the
    lower index comes first, as in ONNX's TopK.
    """
    expected: dict[str, Array] = {tensor.name: reference[tensor.name] for tensor in model_outputs(tensors)}
    logits = of_role(tensors, Role.LOGITS)
    for tensor in tensors:
        if logits is not None and tensor.role in DERIVED:
            expected[tensor.name] = _of_logits(reference[logits.name], tensor)
    return expected


def _of_logits(logits: Float32Array, tensor: TensorInfo) -> Array:
    import numpy as np

    if tensor.role is Role.PROBABILITIES:
        return softmax(logits).astype(np.float32)
    indices = np.argsort(-logits, axis=1, kind="stable")[:, : tensor.shape[-1]].astype(np.int64)
    return indices if tensor.role is Role.TOP_INDICES else np.take_along_axis(logits, indices, axis=1)


def softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Probabilities, float64 (N, classes)."""
    import numpy as np

    exact = logits.astype(np.float64)
    powers = np.exp(exact - exact.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float64)


def promised_dtypes(tensors: Iterable[TensorInfo]) -> dict[str, str]:
    """The dtype of each output, as NumPy names it."""
    return {tensor.name: tensor.dtype for tensor in tensors}

"""A graph's outputs as data: what the model computes, what follows from its logits, and the expected values of both.

    tensors = graph_outputs(model.outputs, options.outputs)      # TensorInfo: name, shape, dtype, role
    expected = expected_outputs(reference, tensors)              # arrays by name

The role decides what an output is good for: classes are ranked, named, counted and compared for logits alone, and any
output is compared by its numbers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.common.errors import UsageError
from spach_deploy.options.specs import FeatureLayout, IODtype, OutputSpec, Role

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Float32Array = npt.NDArray[np.float32]

StageShape = tuple[int, int, int]
"""Channels, height and width of what a network stage gives."""

INPUT = "input"
"""The name of every graph's input."""

LOGITS, PROBABILITIES = Role.LOGITS.value, Role.PROBABILITIES.value
TOP_VALUES, TOP_INDICES = Role.TOP_VALUES.value, Role.TOP_INDICES.value

CLASS_SCORES = (Role.LOGITS, Role.PROBABILITIES)
"""Roles of outputs with a number for each class."""

DERIVED = (Role.PROBABILITIES, Role.TOP_VALUES, Role.TOP_INDICES)
"""Roles of outputs that follow from the logits."""


_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
TAKEN = ("input", "names", "batches", "file", "allow_pickle")
"""The input's name, and those that an npz of golden data cannot have."""

NCHW, TOKENS = "NCHW", "NLC"
"""Layouts of feature maps: (B, C, H, W), and tokens (B, H W, C)."""


def model_outputs(tensors: Iterable[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Those of a graph's outputs that its model computes."""
    return tuple(tensor for tensor in tensors if tensor.role not in DERIVED)


def of_role(tensors: Iterable[TensorInfo], role: Role) -> TensorInfo | None:
    """The first output of a role; None without one."""
    return next((tensor for tensor in tensors if tensor.role is role), None)


def roles_of(tensors: Iterable[TensorInfo]) -> dict[str, Role]:
    """Roles by name."""
    return {tensor.name: tensor.role or Role.OTHER for tensor in tensors}


def usual_outputs(classes: int, width: int) -> tuple[TensorInfo, ...]:
    """Logits; of a model without classes the embedding, `width` channels."""
    return (vector(Role.LOGITS, classes) if classes else vector(Role.EMBEDDING, width),)


def chosen_outputs(spec: OutputSpec, classes: int, stages: Sequence[StageShape]) -> tuple[TensorInfo, ...]:
    """The outputs that `spec` asks of a model with these classes and stages (channels, height, width).

    UsageError for logits of a model without a head, what follows from logits without them, a role that is named twice,
    and names that are unknown, not usable or not unique.
    """
    tensors: list[TensorInfo] = []
    for role in spec.outputs or [tensor.role for tensor in usual_outputs(classes, stages[-1][0])]:
        if role is Role.LOGITS and not classes:
            raise UsageError(
                "The model has no head, so it has no logits.", "Give --outputs embedding, or leave it out."
            )
        tensors += _of_role(role, spec, classes, stages)
    return named(spec, tensors)


def named(spec: OutputSpec, tensors: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """What a model computes, under the names that `spec` gives. UsageError for what follows from logits without them,
    and for names that are unknown, not usable or not unique.
    """
    _check_derived(spec, tensors)
    given = graph_outputs(tensors, dataclasses.replace(spec, names=()))
    _check_names(spec.names, [tensor.name for tensor in given])
    new = renamed(spec.names)
    return tuple(
        TensorInfo(name=new.get(t.name, t.name), dtype=t.dtype, shape=t.shape, layout=t.layout, role=t.role)
        for t in tensors
    )


def _of_role(role: Role | None, spec: OutputSpec, classes: int, stages: Sequence[StageShape]) -> tuple[TensorInfo, ...]:
    if role is Role.FEATURES:
        return tuple(_feature(index, shape, spec.feature_layout) for index, shape in enumerate(stages, 1))
    return (vector(Role.LOGITS, classes) if role is Role.LOGITS else vector(Role.EMBEDDING, stages[-1][0]),)


def vector(role: Role, width: int) -> TensorInfo:
    """An output (B, width) of a model."""
    return TensorInfo(name=role.value, dtype="float32", shape=(None, width), layout="NC", role=role)


def _feature(stage: int, shape: StageShape, layout: FeatureLayout) -> TensorInfo:
    channels, height, width = shape
    is_map = layout is FeatureLayout.NCHW
    return TensorInfo(
        name=f"features{stage}",
        dtype="float32",
        shape=(None, channels, height, width) if is_map else (None, height * width, channels),
        layout=NCHW if is_map else TOKENS,
        role=Role.FEATURES,
    )


def _check_derived(spec: OutputSpec, tensors: Sequence[TensorInfo]) -> None:
    flags = [flag for flag, value in (("--top-k", spec.top_k), ("--softmax", spec.softmax)) if value]
    if flags and all(tensor.role is not Role.LOGITS for tensor in tensors):
        given = ", ".join(tensor.name for tensor in tensors)
        hint = f"Leave {' and '.join(flags)} out, or add logits to --outputs where the model has them."
        raise UsageError(f"{flags[0]} is made of logits, and this graph gives {given} alone.", hint)


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    new = renamed(names)
    for old, name in new.items():
        if old not in known:
            raise UsageError(f"--output-name {old}={name}: there is no output {old}.", f"One of {', '.join(known)}.")
        if not _NAME.fullmatch(name) or name in TAKEN:
            raise UsageError(
                f"--output-name {old}={name}: {name!r} cannot name an output.",
                "Use letters, digits, hyphens and underscores, and begin with a letter.",
            )
    final = [new.get(name, name) for name in known]
    if twice := [name for name in final if final.count(name) > 1]:
        raise UsageError(f"Two outputs would be called {twice[0]}.", "Give each --output-name another name.")


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

    from spach_deploy.common.metrics import best_indices

    if tensor.role is Role.PROBABILITIES:
        return softmax(logits).astype(np.float32)
    indices = best_indices(logits, tensor.shape[-1] or logits.shape[1])
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

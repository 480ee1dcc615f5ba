"""What a model gives: logits, an embedding, maps of its network stages, in the order and under the names asked for.

The embedding is what the head reads: the mean over tokens of the last stage, normalized. Feature maps are what each
stage gives, before any normalization: what the published models give a detector (`downstream`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from spach_deploy.bundle.outputs import graph_outputs, renamed
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.common.errors import UsageError
from spach_deploy.options.specs import FeatureLayout, OutputSpec, Role

if TYPE_CHECKING:
    StageShape = tuple[int, int, int]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_TAKEN = ("input", "names", "batches", "file", "allow_pickle")
"""The input's name, and those that an npz of golden data cannot have."""

NCHW, TOKENS = "NCHW", "NLC"
"""Layouts of feature maps: (B, C, H, W), and tokens (B, H W, C)."""


class SelectableOutputs(nn.Module):
    """A model whose outputs are chosen before it runs, by setting `outputs`.

    `stage_shapes`: (channels, height, width) of what each network stage gives.
    """

    stage_shapes: tuple[StageShape, ...]

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """The outputs, in order."""
        return self._outputs

    @outputs.setter
    def outputs(self, chosen: Sequence[TensorInfo]) -> None:
        self._outputs = tuple(chosen)
        self._roles = tuple((tensor.role or Role.OTHER).value for tensor in chosen)
        self._layout = next((tensor.layout for tensor in chosen if tensor.role is Role.FEATURES), NCHW)

    def arranged(
        self, maps: Callable[[], Iterable[Tensor]], embedding: Callable[[], Tensor], head: Callable[[Tensor], Tensor]
    ) -> Tensor | tuple[Tensor, ...]:
        """The chosen outputs in order; one alone as it is.

        `maps`: of all stages, in `self.layout`. `embedding` (B, C), and logits that `head` makes of it, are computed
        where they are asked for.
        """
        features = iter(maps()) if "features" in self._roles else iter(())
        vector = embedding() if "embedding" in self._roles or "logits" in self._roles else None
        made = tuple(self._made(role, features, vector, head) for role in self._roles)
        return made[0] if len(made) == 1 else made

    def _made(
        self, role: str, features: Iterator[Tensor], vector: Tensor | None, head: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if role == "features":
            return next(features)
        assert vector is not None
        return head(vector) if role == "logits" else vector

    @property
    def layout(self) -> str:
        """Layout of feature maps, `NCHW` or `TOKENS`."""
        return self._layout


def usual_outputs(classes: int, width: int) -> tuple[TensorInfo, ...]:
    """Logits; of a model without classes the embedding, `width` channels."""
    return (_vector(Role.LOGITS, classes) if classes else _vector(Role.EMBEDDING, width),)


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
    _check_derived(spec, tensors, classes)
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
    return (_vector(Role.LOGITS, classes) if role is Role.LOGITS else _vector(Role.EMBEDDING, stages[-1][0]),)


def _vector(role: Role, width: int) -> TensorInfo:
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


def _check_derived(spec: OutputSpec, tensors: Sequence[TensorInfo], classes: int) -> None:
    flags = [flag for flag, value in (("--top-k", spec.top_k), ("--softmax", spec.softmax)) if value]
    if flags and all(tensor.role is not Role.LOGITS for tensor in tensors):
        given = ", ".join(tensor.name for tensor in tensors)
        hint = f"Leave {' and '.join(flags)} out{', or add logits to --outputs' if classes else ''}."
        raise UsageError(f"{flags[0]} is made of logits, and this graph gives {given} alone.", hint)


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    new = renamed(names)
    for old, name in new.items():
        if old not in known:
            raise UsageError(f"--output-name {old}={name}: there is no output {old}.", f"One of {', '.join(known)}.")
        if not _NAME.fullmatch(name) or name in _TAKEN:
            raise UsageError(
                f"--output-name {old}={name}: {name!r} cannot name an output.",
                "Use letters, digits, hyphens and underscores, and begin with a letter.",
            )
    final = [new.get(name, name) for name in known]
    if twice := [name for name in final if final.count(name) > 1]:
        raise UsageError(f"Two outputs would be called {twice[0]}.", "Give each --output-name another name.")

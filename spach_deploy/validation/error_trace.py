"""The error trace: relative L2 of every network part's output, from stem to head, with the FP32 error and what is
allowed.

A part's error includes the errors of all parts before it. The fault is where the curve first exceeds what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.schema import TraceEntry, TracePartEntry
from spach_deploy.common.metrics import relative_l2
from spach_deploy.graph.editing import owner
from spach_deploy.validation.rounding_error import ActivationTrace, Outputs
from spach_deploy.validation.tolerance import FP32_FACTOR, ROUNDING_FACTOR

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from spach_deploy.validation.runs import RunResult


@dataclasses.dataclass(frozen=True)
class ExpectedActivations:
    """The reference's output of every part, for the first image.

    `exact`: outputs in FP32. `fp32_errors`: their relative L2 against FP64. `rounding_errors`: relative L2 of the
    rounded model against FP32; empty where nothing is rounded.
    """

    exact: Outputs
    fp32_errors: Mapping[str, float]
    rounding_errors: Mapping[str, float]

    @classmethod
    def of(cls, activations: ActivationTrace) -> ExpectedActivations:
        """From a trace; its rounded outputs are those of the fake-quantized model, where there is one."""
        return cls(
            activations.exact,
            _errors(activations.double, activations.exact),
            _errors(activations.rounded, activations.exact),
        )


class ActivationTracer:
    """Traces a graph's errors: chooses the tensors to read, then compares them with the outputs of `model`."""

    def __init__(self, model: nn.Module, expected: ExpectedActivations) -> None:
        self._expected = expected
        self._kinds = {path: _kind(model.get_submodule(path), exact) for path, exact in expected.exact.items()}
        self._tensors: dict[str, str] = {}

    def watch(self, graph: ir.Model) -> list[str]:
        """Names of the tensors that are the parts' outputs, in the graph as it will run (a `runs.Watch`)."""
        blocks = {path for path, kind in self._kinds.items() if kind == "block"}
        self._tensors = _tensors_of_parts(graph, self._expected.exact, blocks)
        return list(self._tensors.values())

    def trace(self, evidence: RunResult, image: str) -> TraceEntry | None:
        """The error trace of a run, on the image of this name. None where the graph did not run."""
        if not evidence.outputs:
            return None
        first = {name: array[:1] for name, array in evidence.outputs.items()}
        exact, values = self._expected.exact, {**first, **evidence.activations}
        seen = {path: values[tensor] for path, tensor in self._tensors.items() if tensor in values}
        ours = _errors(seen, exact)
        noise, rounding = self._expected.fp32_errors, self._expected.rounding_errors
        parts = tuple(
            TracePartEntry(
                module=path,
                kind=kind,
                error=_finite(ours.get(path)),
                noise=noise[path],
                allowed=FP32_FACTOR * noise[path] + ROUNDING_FACTOR * rounding.get(path, 0.0),
                peak=float(np.abs(exact[path]).max()),
            )
            for path, kind in self._kinds.items()
        )
        return TraceEntry(
            what="typed graph in ONNX Runtime (CPU), half tensors rounded", images=(image,), modules=parts
        )


def _kind(part: nn.Module, output: npt.NDArray[np.floating]) -> str:
    """What a part of the model is, by its class; a head where it gives a vector."""
    from torch import nn

    from spach_deploy.models.shiftvit import PatchEmbedding
    from spach_deploy.models.spach import ConvStem, Downsampling, PatchStem

    if output.ndim == 2:
        return "head"
    kinds = {
        "stem": (ConvStem, PatchStem, PatchEmbedding),
        "norm": (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d),
        "downsampling": (Downsampling,),
    }
    return next((kind for kind, classes in kinds.items() if isinstance(part, classes)), "block")


def _finite(error: float | None) -> float | None:
    return error if error is not None and math.isfinite(error) else None


def _tensors_of_parts(graph: ir.Model, exact: Outputs, blocks: set[str]) -> dict[str, str]:
    """For each part the last tensor of its size that its nodes make; for a block, that of its own sum only."""
    from spach_deploy.validation.bisect.opened_graph import float_elements

    elements = float_elements(graph, batch=1)
    found: dict[str, str] = {}
    for node in graph.graph:
        module = owner(node.name or "")
        path = next((path for path in exact if module == path or module.startswith(f"{path}.")), "")
        for tensor in (value.name or "" for value in node.outputs):
            fits = path and elements.get(tensor, -1) in (0, exact[path].size)
            if fits and not (path in blocks and module != path):
                found[path] = tensor
    return found


def _errors(outputs: Mapping[str, npt.NDArray[Any]], exact: Outputs) -> dict[str, float]:
    return {path: _error(value, exact[path]) for path, value in outputs.items()}


def _error(value: npt.NDArray[np.floating], exact: npt.NDArray[np.floating]) -> float:
    """Relative L2, where the value may have its tokens first or last."""
    errors = [relative_l2(value.reshape(exact.shape), exact)]
    if exact.ndim == 3:  # (B, N, C), which may come as (B, C, N)
        batch, tokens, channels = exact.shape
        errors.append(relative_l2(value.reshape(batch, channels, tokens).swapaxes(1, 2), exact))
    return min(errors)

"""Errors along the depth of a network: of every part's output, with the reference's own noise and what is allowed.

A part's error is that of all before it too: where a curve leaves its bound is where to look.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spach_deploy.errors import UsageError
from spach_deploy.onnx_graph.names import owner
from spach_deploy.validation.depth import Depth, Outputs
from spach_deploy.validation.tolerance import LOSS_FACTOR, NOISE_FACTOR

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

    from spach_deploy.validation.bisect.opened import OpenedGraph


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the network. All but `peak` are relative L2 of its output against PyTorch in FP32.

    `error`: of the graph, None where it has no tensor for it. `noise`: of FP32, against FP64. `allowed`: what the noise
    and the loss of PyTorch in the graph's precision allow here. `peak`: the output's largest magnitude in FP32.
    """

    module: str
    kind: str
    error: float | None
    noise: float
    allowed: float
    peak: float


@dataclasses.dataclass(frozen=True)
class Trace:
    """A network's parts in order. `what` ran, in words; `images` by name."""

    what: str
    images: tuple[str, ...]
    parts: tuple[Part, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        parts = [dataclasses.asdict(part) for part in self.parts]
        return {"what": self.what, "images": list(self.images), "modules": parts}

    @classmethod
    def from_dict(cls, content: Any) -> Trace | None:
        """What `to_dict` wrote; None for anything else, which an older manifest may hold."""
        try:
            parts = tuple(Part(**part) for part in content["modules"])
            return cls(str(content["what"]), tuple(map(str, content["images"])), parts)
        except (KeyError, TypeError):
            return None


def trace(
    graph: ModelProto, model: nn.Module, feed: npt.NDArray[np.generic], depth: Depth, *, name: str
) -> Trace | None:
    """The errors of a graph of ours, on one image, which the graph takes as `feed`.

    `depth`: what the parts of `model` answer to the image in FP32, in FP64 and rounded; rounded are those of its twin
    in eight bits, where there is one. None where the graph cannot be taken apart.
    """
    exact = depth.exact
    try:
        ours = _of_graph(graph, feed, exact, {path for path in exact if _kind(path, model) == "block"})
    except UsageError:
        return None
    noise, loss = _errors(depth.double, exact), _errors(depth.rounded, exact)
    parts = tuple(
        Part(
            module=path,
            kind=_kind(path, model),
            error=_finite(ours.get(path)),
            noise=noise[path],
            allowed=NOISE_FACTOR * noise[path] + LOSS_FACTOR * loss.get(path, 0.0),
            peak=float(np.abs(exact[path]).max()),
        )
        for path in exact
    )
    return Trace("typed graph in ONNX Runtime (CPU), half tensors rounded", (name,), parts)


def _kind(path: str, model: nn.Module) -> str:
    if path in ("stem", "head"):
        return path
    kind = type(model.get_submodule(path)).__name__
    return {"LayerNorm": "norm", "Downsampling": "downsampling"}.get(kind, "block")


def _finite(error: float | None) -> float | None:
    return error if error is not None and math.isfinite(error) else None


def _of_graph(graph: ModelProto, feed: npt.NDArray[np.generic], exact: Outputs, blocks: set[str]) -> dict[str, float]:
    """Errors of the tensors that a graph has for the parts, by the names of the nodes that make them."""
    from spach_deploy.validation.bisect.opened import OpenedGraph

    opened = OpenedGraph(graph, len(feed))
    named = _tensors_of_parts(opened, exact, blocks)
    values = opened.run({graph.graph.input[0].name: feed}, list(named.values()), {})
    return {path: _error(values[tensor], exact[path]) for path, tensor in named.items()}


def _tensors_of_parts(opened: OpenedGraph, exact: Outputs, blocks: set[str]) -> dict[str, str]:
    """The last tensor of a part's size that the part makes; a block's is its own sum, not a module's inside it."""
    found: dict[str, str] = {}
    sizes = {path: set(opened.tensors([value.size])) for path, value in exact.items()}
    for tensor, node in opened.makers.items():
        module = owner(node)
        path = next((path for path in exact if module == path or module.startswith(f"{path}.")), "")
        if tensor in sizes.get(path, ()) and not (path in blocks and module != path):
            found[path] = tensor
    return found


def _errors(outputs: Outputs, exact: Outputs) -> dict[str, float]:
    return {path: _error(value, exact[path]) for path, value in outputs.items()}


def _error(value: npt.NDArray[np.floating], exact: npt.NDArray[np.floating]) -> float:
    """Relative L2, tokens first or last."""
    from spach_deploy.validation.bisect.losses import relative_l2

    errors = [relative_l2(value.reshape(exact.shape), exact)]
    if exact.ndim == 3:  # (B, N, C), which may come as (B, C, N)
        batch, tokens, channels = exact.shape
        errors.append(relative_l2(value.reshape(batch, channels, tokens).swapaxes(1, 2), exact))
    return min(errors)

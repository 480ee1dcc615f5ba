"""The reference's values at all probe points, in every form of the model that a graph may follow.

Rewrites move numbers between neighbouring modules without changing what the model computes: LayerScale into a
projection, the residual into a depthwise convolution. So a probe point has up to three values: of the model as
published, of the static model, and of the static model with a quantized bundle's channel ranges equalized. At each
point a graph follows one of these forms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from spach_deploy.blocks import rewrite
from spach_deploy.common.metrics import relative_l2
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.quantization.fake_quantization import QuantizedAttention, equalized_model, fake_quantized
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.validation.bisect.probe_points import (
    CORE,
    AttentionCore,
    Float32Array,
    ProbePoint,
    ProbeRecord,
    Rounding,
    RoundingErrors,
    measure_rounding,
    points_of_graph,
    recompute,
    record,
)
from spach_deploy.validation.bisect.tensor_matching import EQUALIZED, PUBLISHED, STATIC, ReferenceTensor
from spach_deploy.validation.rounding_error import StorageFormat

BATCH = 2
"""Images that a bisection runs, unless the graph's batch size is fixed."""


@dataclasses.dataclass(frozen=True)
class ProbeView:
    """The reference at one batch size. `points`: in the order of computation. `candidates`: the values of each point,
    by form.
    """

    images: Float32Array
    points: Mapping[str, ProbePoint]
    candidates: Mapping[str, tuple[ReferenceTensor, ...]]

    def of_graph(self, tensors: Collection[str]) -> ProbeView:
        """Only the points that a graph with these `tensors` can have."""
        points = points_of_graph(self.points, tensors)
        return ProbeView(self.images, points, {name: self.candidates[name] for name in points})

    def is_expected(self, name: str) -> bool:
        """Whether an exported graph has a tensor for this point, rather than folding it into a neighbour."""
        return any(candidate.form != PUBLISHED for candidate in self.candidates[name])


class ProbedReference:
    """A reference model and its images. Made once, it serves any number of graphs.

    `pixels` uint8 (N, S, S, 3): for graphs that take them. `plan`: the quantization plan of a quantized bundle.
    """

    def __init__(
        self,
        model: SelectableOutputs,
        images: Float32Array,
        *,
        static: nn.Module | None = None,
        plan: QuantizationPlan | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> None:
        self.model = model
        self.static = rewrite(model).model if static is None else static
        self.plan = plan
        self._images = images
        self._pixels = pixels
        self._views: dict[int, ProbeView] = {}
        self._rounding_errors: dict[tuple[str, str, StorageFormat], RoundingErrors] = {}
        self._quantized: Mapping[str, nn.Module] = {}
        if plan is not None:
            quantized = dict(fake_quantized(self.static, plan).named_modules(remove_duplicate=False))
            self._quantized = dict(_quantized_point(site.module, quantized[site.module]) for site in plan.sites)

    @classmethod
    def of(cls, model: SelectableOutputs, images: Float32Array) -> ProbedReference:
        """The reference for graphs of `model` (float32, evaluation mode) on `images` (N, 3, S, S)."""
        return cls(model, images)

    def inputs(self, dtype: str, batch: int) -> NDArray[np.generic]:
        """The images in a graph's input dtype."""
        if dtype == "uint8" and self._pixels is not None:
            return np.resize(self._pixels, (batch, *self._pixels.shape[1:]))
        return self.view(batch).images.astype(dtype)

    def view(self, batch: int) -> ProbeView:
        """Values at all probe points for this batch size; images are repeated where there are fewer."""
        if batch not in self._views:
            self._views[batch] = self._record_forms(np.resize(self._images, (batch, *self._images.shape[1:])))
        return self._views[batch]

    def _record_forms(self, images: Float32Array) -> ProbeView:
        forms: dict[str, nn.Module] = {STATIC: self.static, PUBLISHED: self.model}
        if self.plan is not None:
            forms = {EQUALIZED: equalized_model(self.static, self.plan), **forms}
        recorded: dict[str, dict[str, ProbeRecord]] = {}
        for form, model in forms.items():
            first = next(iter(recorded.values()), None)
            recorded[form] = record(model, images, first)
        points = {name: entry.point for name, entry in recorded[PUBLISHED].items()}
        candidates = {
            name: _distinct(
                ReferenceTensor(form, entries[name]) for form, entries in recorded.items() if name in entries
            )
            for name in points
        }
        return ProbeView(images, points, candidates)

    def form_of(self, name: str, form: str) -> ReferenceTensor:
        """A point's value in `form`, or in its first form without it; at any batch size that was viewed."""
        candidates = next(iter(self._views.values())).candidates[name]
        return next((candidate for candidate in candidates if candidate.form == form), candidates[0])

    def rounding_errors(self, name: str, candidate: ReferenceTensor, arithmetic: StorageFormat) -> RoundingErrors:
        """The rounding errors at a point, given right inputs."""
        key = (name, candidate.form, arithmetic)
        if key not in self._rounding_errors:
            self._rounding_errors[key] = measure_rounding(candidate.recorded, arithmetic)
        return self._rounding_errors[key]

    def local_error(self, name: str, candidate: ReferenceTensor, value: NDArray[np.floating]) -> tuple[float, float]:
        """Relative L2 of a graph's `value` (B, N, C), computed from right inputs; and the rounding error of eight bits
        there.

        A quantized layer is compared with the same layer quantized in PyTorch.
        """
        exact = candidate.recorded.value
        module = self._quantized.get(name) if candidate.form == EQUALIZED else None
        if module is None:
            return relative_l2(value, exact), 0.0
        computation = dataclasses.replace(candidate.recorded.computation, module=module)
        rounded = recompute(computation)
        return relative_l2(value, rounded), relative_l2(rounded, exact)


class _QuantizedCore(AttentionCore):
    """Attention between qkv and proj in eight bits."""

    def __init__(self, attention: QuantizedAttention) -> None:
        super().__init__(attention.num_heads, attention.scale)
        self._attention = attention

    def compute(self, packed: Tensor, rounding: Rounding) -> Tensor:
        """Compute it with the attention's own roundings; ignores `rounding`."""
        return self._attention.mixed(packed)


def _quantized_point(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The point at which a quantized module is compared. For attention: between qkv and proj, whose input is packed."""
    return (f"{name}{CORE}", _QuantizedCore(module)) if isinstance(module, QuantizedAttention) else (name, module)


def _distinct(candidates: Iterable[ReferenceTensor]) -> tuple[ReferenceTensor, ...]:
    """Candidates with different values; of equal ones the first."""
    first: dict[int, ReferenceTensor] = {}
    for candidate in candidates:
        first.setdefault(id(candidate.recorded.value), candidate)
    return tuple(first.values())

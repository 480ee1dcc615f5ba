"""The reference as a bisection needs it: its values at all places, in every form that a graph may have them.

Algebra moves numbers between neighbouring modules without changing what the model computes (LayerScale into a
projection, the residual into a depthwise convolution), so a place has up to three values: of the model as published, of
its static form, and of the static form with a quantized bundle's ranges exchanged. A graph follows one of them at each
place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from spach_deploy.common.metrics import relative_l2
from spach_deploy.models.spach import Spach
from spach_deploy.quantization.fake_quantization import QuantizedAttention, equalized_model, fake_quantized
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.rewrites import rewrite
from spach_deploy.rewrites.static_modules import StaticSpach
from spach_deploy.validation.bisect.error_metrics import RoundingErrors, evaluate, measure
from spach_deploy.validation.bisect.probe_points import (
    CORE,
    AttentionCore,
    Float32Array,
    ProbePoint,
    ProbeRecord,
    Rounding,
    only_made,
    record,
)
from spach_deploy.validation.bisect.tensor_matching import EQUALIZED, PUBLISHED, STATIC, ReferenceTensor
from spach_deploy.validation.rounding_error import StorageFormat

BATCH = 2
"""Images that a bisection looks at, unless the graph's batch is fixed."""


@dataclasses.dataclass(frozen=True)
class ProbeView:
    """The reference at one batch size. `places` in the order in which they are computed."""

    images: Float32Array
    places: Mapping[str, ProbePoint]
    candidates: Mapping[str, tuple[ReferenceTensor, ...]]

    def of_graph(self, tensors: Collection[str]) -> ProbeView:
        """The places that a graph of these `tensors` may have."""
        places = only_made(self.places, tensors)
        return ProbeView(self.images, places, {name: self.candidates[name] for name in places})

    def is_expected(self, name: str) -> bool:
        """Whether a graph of ours has this place as a tensor; others are folded into their neighbours."""
        return any(candidate.form != PUBLISHED for candidate in self.candidates[name])


class ProbedReference:
    """A reference model and images; made once, it serves any number of graphs.

    `pixels` uint8 (N, S, S, 3) are for graphs that take them; `plan` is a quantized bundle's.
    """

    def __init__(
        self,
        model: Spach,
        images: Float32Array,
        *,
        static: StaticSpach | None = None,
        plan: QuantizationPlan | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> None:
        self.model = model
        self.static = rewrite(model).model if static is None else static
        self.plan = plan
        self._images = images
        self._pixels = pixels
        self._views: dict[int, ProbeView] = {}
        self._losses: dict[tuple[str, str, StorageFormat], RoundingErrors] = {}
        self._quantized: Mapping[str, nn.Module] = {}
        if plan is not None:
            twin = dict(fake_quantized(self.static, plan).named_modules(remove_duplicate=False))
            self._quantized = dict(_places(site.module, twin[site.module]) for site in plan.sites)

    @classmethod
    def of(cls, model: Spach, images: Float32Array) -> ProbedReference:
        """The reference for graphs of `model` (float32, evaluation mode) on `images` (N, 3, S, S)."""
        return cls(model, images)

    def inputs(self, dtype: str, batch: int) -> NDArray[np.generic]:
        """The images as a graph takes them."""
        if dtype == "uint8" and self._pixels is not None:
            return np.resize(self._pixels, (batch, *self._pixels.shape[1:]))
        return self.view(batch).images.astype(dtype)

    def view(self, batch: int) -> ProbeView:
        """Values at all places for a batch of this size; images are repeated where there are fewer."""
        if batch not in self._views:
            self._views[batch] = self._looked_at(np.resize(self._images, (batch, *self._images.shape[1:])))
        return self._views[batch]

    def _looked_at(self, images: Float32Array) -> ProbeView:
        forms: dict[str, Spach | StaticSpach] = {STATIC: self.static, PUBLISHED: self.model}
        if self.plan is not None:
            forms = {EQUALIZED: equalized_model(self.static, self.plan), **forms}
        recorded: dict[str, dict[str, ProbeRecord]] = {}
        for form, model in forms.items():
            first = next(iter(recorded.values()), None)
            recorded[form] = record(model, images, first)
        places = {name: entry.place for name, entry in recorded[PUBLISHED].items()}
        candidates = {
            name: _distinct(
                ReferenceTensor(form, entries[name]) for form, entries in recorded.items() if name in entries
            )
            for name in places
        }
        return ProbeView(images, places, candidates)

    def form_of(self, name: str, form: str) -> ReferenceTensor:
        """A place's value in a form, or in the first that there is; at any batch."""
        candidates = next(iter(self._views.values())).candidates[name]
        return next((candidate for candidate in candidates if candidate.form == form), candidates[0])

    def loss(self, name: str, candidate: ReferenceTensor, arithmetic: StorageFormat) -> RoundingErrors:
        """What rounding costs at a place, given right inputs."""
        key = (name, candidate.form, arithmetic)
        if key not in self._losses:
            self._losses[key] = measure(candidate.recorded, arithmetic)
        return self._losses[key]

    def local_error(self, name: str, candidate: ReferenceTensor, value: NDArray[np.floating]) -> tuple[float, float]:
        """Relative L2 of a graph's `value` (B, N, C), made from right inputs, and what eight bits alone cost there.

        A quantized layer is compared with the same layer quantized in PyTorch.
        """
        exact = candidate.recorded.value
        module = self._quantized.get(name) if candidate.form == EQUALIZED else None
        if module is None:
            return relative_l2(value, exact), 0.0
        computation = dataclasses.replace(candidate.recorded.computation, module=module)
        rounded = evaluate(computation, lambda tensor: tensor, lambda tensor: tensor)
        return relative_l2(value, rounded), relative_l2(rounded, exact)


class _QuantizedCore(AttentionCore):
    """An attention's core in eight bits, as `AttentionCore` is evaluated."""

    def __init__(self, attention: QuantizedAttention) -> None:
        super().__init__(attention.num_heads, attention.scale)
        self._attention = attention

    def compute(self, packed: Tensor, rounding: Rounding) -> Tensor:
        """The attention's own roundings, whatever `rounding` is."""
        return self._attention.mixed(packed)


def _places(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The place where a quantized module is compared; of an attention that is its core, whose inputs are packed."""
    return (f"{name}{CORE}", _QuantizedCore(module)) if isinstance(module, QuantizedAttention) else (name, module)


def _distinct(candidates: Iterable[ReferenceTensor]) -> tuple[ReferenceTensor, ...]:
    """Each value once: the first form's where several have the same."""
    first: dict[int, ReferenceTensor] = {}
    for candidate in candidates:
        first.setdefault(id(candidate.recorded.value), candidate)
    return tuple(first.values())

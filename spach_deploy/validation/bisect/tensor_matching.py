"""Match the tensors of a graph with the reference's probe points by their values, whatever their names and layouts.

A tensor may hold (B, N, C) with channels last, channels first, or tokens before images. Pairs that agree best are
matched first, and each tensor is matched once. Of tensors that agree alike the earliest is taken, so that all readers
of the value can be given the reference's.

`ProbedReference` has the reference's values at all probe points, in every form of the model that a graph may follow.
Rewrites move numbers between neighbouring modules without changing what the model computes: LayerScale into a
projection, the residual into a depthwise convolution. So a probe point has up to three values: of the model as
published, of the static model, and of the static model with a quantized bundle's channel ranges equalized. At each
point a graph follows one of these forms.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from spach_deploy.blocks import rewrite
from spach_deploy.common.metrics import relative_l2
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.models.own_module import OwnForward
from spach_deploy.quantization.fake_quantization import QuantizedAttention, equalized_model, fake_quantized
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.validation.bisect.probe_points import (
    CORE,
    SAME,
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
from spach_deploy.validation.rounding_error import StorageFormat

Array = NDArray[np.floating]

STATIC, PUBLISHED, EQUALIZED = "static", "published", "equalized"
"""Forms of the reference; see `reference`."""

MATCH_LIMIT = 0.02
"""Relative L2 up to which a tensor is a probe point's for certain, so that its readers may get the reference's
value.
"""

MATCH_LIMIT_EIGHT_BITS = 0.12
"""The same in graphs that compute in eight bits, whose errors are larger."""

ALIKE = 2.0
"""Tensors whose errors differ by less than this factor hold one value, moved or rounded."""

ALIKE_EIGHT_BITS = 1.05
"""The same in eight bits, where inherited errors are most of every error: without its bias a value has hardly twice
that.
"""

_SAMPLES = 256
_FLOOR = 1e-6
_ROOM = 4.0


@dataclasses.dataclass(frozen=True)
class ReferenceTensor:
    """A probe point's value in one form of the reference."""

    form: str
    recorded: ProbeRecord


class Order(enum.Enum):
    """How (B, N, C) lies in memory: the axes in order."""

    ROWS = (0, 1, 2)
    CHANNELS_FIRST = (0, 2, 1)
    TOKENS_FIRST = (1, 0, 2)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor holds (B, N, C): its shape and its axis order."""

    shape: tuple[int, ...]
    order: Order

    def to_rows(self, array: Array, shape: tuple[int, ...]) -> Array:
        """The tensor as (B, N, C) of this `shape`."""
        axes = self.order.value  # each exchanges two axes, so it is its own inverse
        return array.reshape([shape[axis] for axis in axes]).transpose(axes)

    def from_rows(self, rows: Float32Array) -> Array:
        """(B, N, C) in the tensor's layout."""
        return np.ascontiguousarray(rows.transpose(self.order.value)).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Match:
    """A tensor matched with a probe point. `error`: relative L2 of their values."""

    point: str
    candidate: ReferenceTensor
    tensor: str
    layout: Layout
    error: float


@dataclasses.dataclass(frozen=True)
class GraphForms:
    """The form of the reference that a graph follows: by role of the probe point in its block, and `overall` for other
    roles.
    """

    by_role: Mapping[str, str]
    overall: str

    def follows(self, point: ProbePoint, form: str) -> bool:
        """Whether the graph follows this form at a point."""
        return form == self.by_role.get(point.role, self.overall)


def _winner(votes: Counter[str]) -> str:
    return votes.most_common(1)[0][0] if votes else STATIC


class Matcher:
    """Compares tensors with probe points as they come; then `matches` assigns them.

    `order`: position of each tensor in the graph. `only`: for points whose possible tensors are known, these. `orders`:
    axis orders to look for.
    """

    def __init__(
        self,
        points: Mapping[str, tuple[ReferenceTensor, ...]],
        order: Mapping[str, int],
        limit: float = MATCH_LIMIT,
        only: Mapping[str, Collection[str]] | None = None,
        orders: Collection[Order] = (Order.ROWS, Order.CHANNELS_FIRST),
    ) -> None:
        self._order = order
        self._limit = limit
        self._alike = ALIKE if limit <= MATCH_LIMIT else ALIKE_EIGHT_BITS
        self._only = only or {}
        self._found: list[Match] = []
        self._fingerprints: dict[int, list[_Fingerprint]] = {}
        self._folded = {name for name, candidates in points.items() if _is_folded(candidates)}
        self._roles = {name: candidates[0].recorded.point.role for name, candidates in points.items()}
        self._varied = {
            name: [candidate.form for candidate in candidates]
            for name, candidates in points.items()
            if len(candidates) > 1
        }
        for name, candidates in points.items():
            for candidate in candidates:
                fingerprint = _Fingerprint.of(name, candidate, orders)
                if fingerprint is not None:
                    self._fingerprints.setdefault(candidate.recorded.value.size, []).append(fingerprint)

    @property
    def sizes(self) -> Iterable[int]:
        """Numbers of elements of tensors that are worth comparing."""
        return self._fingerprints.keys()

    def add(self, tensor: str, value: Array) -> None:
        """Compare one tensor with all points of its size."""
        if value.dtype.kind != "f" or value.size not in self._fingerprints:
            return
        flat = value.reshape(-1)
        for fingerprint in self._fingerprints[value.size]:
            if tensor not in self._only.get(fingerprint.point, (tensor,)):
                continue
            for order, samples in fingerprint.samples:
                if order is Order.CHANNELS_FIRST and value.ndim < 3:
                    continue  # rows of tokens: (B * N, C)
                if relative_l2(flat[fingerprint.index], samples) < _ROOM * self._limit:
                    self._compare(tensor, value, fingerprint, Layout(value.shape, order))

    def _compare(self, tensor: str, value: Array, fingerprint: _Fingerprint, layout: Layout) -> None:
        expected = fingerprint.candidate.recorded.value
        error = relative_l2(layout.to_rows(value, expected.shape), expected)
        if error <= self._limit:
            self._found.append(Match(fingerprint.point, fingerprint.candidate, tensor, layout, error))

    def forms(self) -> GraphForms:
        """The forms that the graph follows: for each role the one in which most points have their best match."""
        found: dict[str, dict[str, float]] = {}
        for match in self._found:
            errors = found.setdefault(match.point, {})
            errors[match.candidate.form] = min(match.error, errors.get(match.candidate.form, match.error))
        by_role: dict[str, Counter[str]] = {}
        for point in self._varied.keys() & found.keys():
            errors = found[point]
            best = self._alike * min(errors.values()) + _FLOOR
            # The last: with LayerScale outside of it, a projection's folded value is there too, as LayerScale's.
            form = [form for form in self._varied[point] if errors.get(form, np.inf) <= best][-1]
            by_role.setdefault(self._roles[point], Counter())[form] += 1
        overall = sum(by_role.values(), Counter())
        return GraphForms({name: _winner(votes) for name, votes in by_role.items()}, _winner(overall))

    def matches(self, forms: GraphForms, known: Iterable[Match] = ()) -> dict[str, Match]:
        """Assign a tensor to each point, best pairs first. `known` matches are taken.

        Points that some forms fold into a neighbour come last, and only with a value that no other match has: where
        LayerScale is folded into the projection, it is no point of its own.
        """
        result: dict[str, Match] = {}
        taken = list(known)
        self._assign([match for match in self._found if self._is_own(match, forms)], result, taken)
        values = [match.candidate.recorded.value for match in taken]
        folded = (match for match in self._found if match.point in self._folded)
        self._assign([match for match in folded if not _is_known(match, values)], result, taken)
        return result

    def _is_own(self, match: Match, forms: GraphForms) -> bool:
        if match.point in self._folded:
            return False
        return match.point not in self._varied or forms.follows(match.candidate.recorded.point, match.candidate.form)

    def _assign(self, found: list[Match], result: dict[str, Match], taken: list[Match]) -> None:
        used = {match.tensor for match in taken}
        by_point: dict[str, list[Match]] = {}
        for match in found:
            by_point.setdefault(match.point, []).append(match)
        for match in sorted(found, key=lambda match: match.error):
            if match.point in result or match.tensor in used:
                continue
            alike = (other for other in by_point[match.point] if other.error <= self._alike * match.error + _FLOOR)
            free = (other for other in alike if other.tensor not in used)
            result[match.point] = min(free, key=lambda other: self._order[other.tensor])
            used.add(result[match.point].tensor)
            taken.append(result[match.point])


def _is_folded(candidates: tuple[ReferenceTensor, ...]) -> bool:
    return candidates[0].form == PUBLISHED


def _is_known(match: Match, values: list[Float32Array]) -> bool:
    own = match.candidate.recorded.value
    return any(value.shape == own.shape and relative_l2(value, own) < SAME for value in values)


@dataclasses.dataclass(frozen=True)
class _Fingerprint:
    """A point's value at random positions, for each axis order: a quick test before the full comparison."""

    point: str
    candidate: ReferenceTensor
    index: NDArray[np.int64]
    samples: tuple[tuple[Order, Array], ...]

    @classmethod
    def of(cls, point: str, candidate: ReferenceTensor, orders: Collection[Order]) -> _Fingerprint | None:
        value = candidate.recorded.value
        if not value.any():
            return None
        index = np.random.default_rng(value.size).integers(0, value.size, _SAMPLES)
        samples = ((order, value.transpose(order.value).reshape(-1)[index]) for order in distinct(orders, value.shape))
        return cls(point, candidate, index, tuple(samples))


def distinct(orders: Collection[Order], shape: tuple[int, ...]) -> list[Order]:
    """Of `orders` those in which (B, N, C) of this shape differs from rows in memory, and rows itself."""
    batch, tokens, channels = shape
    moved = {
        Order.ROWS: True,
        Order.CHANNELS_FIRST: tokens > 1 and channels > 1,
        Order.TOKENS_FIRST: batch > 1 and tokens > 1,
    }
    return [order for order in orders if moved[order]]


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

    def blaming_together(self) -> ProbeView:
        """The same, where a point that follows points of no static form is blamed by the module that has them all: a
        known block's parts have other values and names in its static form.
        """
        points = dict(self.points)
        for name, point in self.points.items():
            inner = [parent for parent in point.parents if not self.is_expected(parent)]
            if inner and (owner := _common_path([name, *inner])):
                points[name] = dataclasses.replace(point, module=owner)
        return dataclasses.replace(self, points=points)

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
        if isinstance(self.model, OwnForward):
            recorded = {form: _under_names_of(recorded[PUBLISHED], entries) for form, entries in recorded.items()}
        points = {name: entry.point for name, entry in recorded[PUBLISHED].items()}
        candidates = {
            name: _distinct(
                ReferenceTensor(form, entries[name]) for form, entries in recorded.items() if name in entries
            )
            for name in points
        }
        view = ProbeView(images, points, candidates)
        return view.blaming_together() if isinstance(self.model, OwnForward) else view

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


def _common_path(names: Sequence[str]) -> str:
    """The path of the module that has all these parts: `blocks.0` for `blocks.0.fc1` and `blocks.0.fc2`."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(same[0] for same in itertools.takewhile(lambda parts: len(set(parts)) == 1, parts))


def _under_names_of(published: Mapping[str, ProbeRecord], entries: Mapping[str, ProbeRecord]) -> dict[str, ProbeRecord]:
    """`entries` of a user's module with its known blocks replaced, whose parts may have other names: under the name
    of the point of the user's own that has the same value.
    """
    free = {name: entry.value for name, entry in published.items() if name not in entries}
    renamed: dict[str, ProbeRecord] = {}
    for name, entry in entries.items():
        own, value = name, entry.value
        if name not in published:
            alike = (free_name for free_name, other in free.items() if other.shape == value.shape)
            own = next((free_name for free_name in alike if relative_l2(value, free[free_name]) < SAME), name)
            free.pop(own, None)
        renamed[own] = entry if own == name else dataclasses.replace(entry, point=published[own].point)
    return renamed


def _distinct(candidates: Iterable[ReferenceTensor]) -> tuple[ReferenceTensor, ...]:
    """Candidates with different values; of equal ones the first."""
    first: dict[int, ReferenceTensor] = {}
    for candidate in candidates:
        first.setdefault(id(candidate.recorded.value), candidate)
    return tuple(first.values())

"""Which tensor of a graph is which place of the reference, told by values: names and layouts may be any.

A tensor is a place's when its numbers are the place's, channels last or first, or images behind tokens. Pairs that
agree best are made first, and a tensor is one place's only; among tensors that agree alike the earliest is taken, so
that what reads any of them can be given the reference's value.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from spach_deploy.common.metrics import relative_l2
from spach_deploy.validation.bisect.probe_points import SAME, Float32Array, ProbeRecord

Array = NDArray[np.floating]

STATIC, PUBLISHED, EQUALIZED = "static", "published", "equalized"
"""Forms of the reference; see `reference`."""

FIRM = 0.02
"""Relative L2 up to which a tensor is surely a place's, so that its readers may be given the reference's value."""

FIRM_EIGHT_BITS = 0.12
"""The same in graphs that compute in eight bits, whose errors are larger."""

ALIKE = 2.0
"""Tensors whose errors differ by less than this factor are one value, moved or rounded."""

ALIKE_EIGHT_BITS = 1.05
"""The same where what eight bits cost before is most of every error: a value without its bias has hardly twice that."""

_SAMPLES = 256
_FLOOR = 1e-6
_ROOM = 4.0


@dataclasses.dataclass(frozen=True)
class ReferenceTensor:
    """A place's value as one form of the reference has it."""

    form: str
    recorded: ProbeRecord


class Order(enum.Enum):
    """How (B, N, C) lies in memory: which axis stands where."""

    ROWS = (0, 1, 2)
    CHANNELS_FIRST = (0, 2, 1)
    TOKENS_FIRST = (1, 0, 2)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor holds (B, N, C): its shape, and the order of what it holds."""

    shape: tuple[int, ...]
    order: Order

    def to_rows(self, array: Array, shape: tuple[int, ...]) -> Array:
        """The tensor as (B, N, C) `shape`."""
        axes = self.order.value  # each exchanges two axes, so it is its own inverse
        return array.reshape([shape[axis] for axis in axes]).transpose(axes)

    def from_rows(self, rows: Float32Array) -> Array:
        """(B, N, C) as the tensor has it."""
        return np.ascontiguousarray(rows.transpose(self.order.value)).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Match:
    """A tensor taken for a place's: relative L2 of its value, and how it lies."""

    place: str
    candidate: ReferenceTensor
    tensor: str
    layout: Layout
    error: float


@dataclasses.dataclass(frozen=True)
class GraphForms:
    """The form that a graph follows, for each role that places have in their blocks; `overall` for other roles."""

    by_role: Mapping[str, str]
    overall: str

    def follows(self, place: str, form: str) -> bool:
        """Whether the graph has this form's value at a place."""
        return form == self.by_role.get(role(place), self.overall)


def role(place: str) -> str:
    """What a place is in its block, whichever block that is: `spatial_func.qkv` of `layer3.2.spatial_func.qkv`."""
    block = re.match(r"(blocks|layer\d+)\.\d+", place)
    return place if block is None else place[block.end() :]


def _winner(votes: Counter[str]) -> str:
    return votes.most_common(1)[0][0] if votes else STATIC


class Matcher:
    """Compares tensors with places as they come; `matches` assigns them.

    `only`: the tensors that a place may be, for places of which that is known. `orders`: those that tensors may have.
    """

    def __init__(
        self,
        places: Mapping[str, tuple[ReferenceTensor, ...]],
        order: Mapping[str, int],
        limit: float = FIRM,
        only: Mapping[str, Collection[str]] | None = None,
        orders: Collection[Order] = (Order.ROWS, Order.CHANNELS_FIRST),
    ) -> None:
        self._order = order
        self._limit = limit
        self._alike = ALIKE if limit <= FIRM else ALIKE_EIGHT_BITS
        self._only = only or {}
        self._found: list[Match] = []
        self._sought: dict[int, list[_Sought]] = {}
        self._folded = {name for name, candidates in places.items() if _is_folded(candidates)}
        self._varied = {
            name: [candidate.form for candidate in candidates]
            for name, candidates in places.items()
            if len(candidates) > 1
        }
        for name, candidates in places.items():
            for candidate in candidates:
                sought = _Sought.of(name, candidate, orders)
                if sought is not None:
                    self._sought.setdefault(candidate.recorded.value.size, []).append(sought)

    @property
    def sizes(self) -> Iterable[int]:
        """Elements of the tensors that are worth comparing."""
        return self._sought.keys()

    def see(self, tensor: str, value: Array) -> None:
        """Compare one tensor with all places of its size."""
        if value.dtype.kind != "f" or value.size not in self._sought:
            return
        flat = value.reshape(-1)
        for sought in self._sought[value.size]:
            if tensor not in self._only.get(sought.place, (tensor,)):
                continue
            for order, samples in sought.samples:
                if order is Order.CHANNELS_FIRST and value.ndim < 3:
                    continue  # rows of tokens: (B * N, C)
                if relative_l2(flat[sought.index], samples) < _ROOM * self._limit:
                    self._compare(tensor, value, sought, Layout(value.shape, order))

    def _compare(self, tensor: str, value: Array, sought: _Sought, layout: Layout) -> None:
        expected = sought.candidate.recorded.value
        error = relative_l2(layout.to_rows(value, expected.shape), expected)
        if error <= self._limit:
            self._found.append(Match(sought.place, sought.candidate, tensor, layout, error))

    def forms(self) -> GraphForms:
        """Which form the graph follows where forms differ: that in which most places of one role are found best."""
        found: dict[str, dict[str, float]] = {}
        for match in self._found:
            errors = found.setdefault(match.place, {})
            errors[match.candidate.form] = min(match.error, errors.get(match.candidate.form, match.error))
        by_role: dict[str, Counter[str]] = {}
        for place in self._varied.keys() & found.keys():
            errors = found[place]
            best = self._alike * min(errors.values()) + _FLOOR
            # The last: with LayerScale outside of it, a projection's folded value is there too, as LayerScale's.
            form = [form for form in self._varied[place] if errors.get(form, np.inf) <= best][-1]
            by_role.setdefault(role(place), Counter())[form] += 1
        overall = sum(by_role.values(), Counter())
        return GraphForms({name: _winner(votes) for name, votes in by_role.items()}, _winner(overall))

    def matches(self, forms: GraphForms, known: Iterable[Match] = ()) -> dict[str, Match]:
        """The tensor of each place that has one, best pairs first, `known` ones being taken.

        Places that other forms have folded into a neighbour come last, and not where they would be a second name for
        what is found already: LayerScale in the projection is no place of its own.
        """
        result: dict[str, Match] = {}
        taken = list(known)
        self._assign([match for match in self._found if self._is_own(match, forms)], result, taken)
        values = [match.candidate.recorded.value for match in taken]
        folded = (match for match in self._found if match.place in self._folded)
        self._assign([match for match in folded if not _is_known(match, values)], result, taken)
        return result

    def _is_own(self, match: Match, forms: GraphForms) -> bool:
        if match.place in self._folded:
            return False
        return match.place not in self._varied or forms.follows(match.place, match.candidate.form)

    def _assign(self, found: list[Match], result: dict[str, Match], taken: list[Match]) -> None:
        used = {match.tensor for match in taken}
        by_place: dict[str, list[Match]] = {}
        for match in found:
            by_place.setdefault(match.place, []).append(match)
        for match in sorted(found, key=lambda match: match.error):
            if match.place in result or match.tensor in used:
                continue
            alike = (other for other in by_place[match.place] if other.error <= self._alike * match.error + _FLOOR)
            free = (other for other in alike if other.tensor not in used)
            result[match.place] = min(free, key=lambda other: self._order[other.tensor])
            used.add(result[match.place].tensor)
            taken.append(result[match.place])


def _is_folded(candidates: tuple[ReferenceTensor, ...]) -> bool:
    return candidates[0].form == PUBLISHED


def _is_known(match: Match, values: list[Float32Array]) -> bool:
    own = match.candidate.recorded.value
    return any(value.shape == own.shape and relative_l2(value, own) < SAME for value in values)


@dataclasses.dataclass(frozen=True)
class _Sought:
    """A place's value at some positions, as a tensor has them in each order."""

    place: str
    candidate: ReferenceTensor
    index: NDArray[np.int64]
    samples: tuple[tuple[Order, Array], ...]

    @classmethod
    def of(cls, place: str, candidate: ReferenceTensor, orders: Collection[Order]) -> _Sought | None:
        value = candidate.recorded.value
        if not value.any():
            return None
        index = np.random.default_rng(value.size).integers(0, value.size, _SAMPLES)
        samples = ((order, value.transpose(order.value).reshape(-1)[index]) for order in distinct(orders, value.shape))
        return cls(place, candidate, index, tuple(samples))


def distinct(orders: Collection[Order], shape: tuple[int, ...]) -> list[Order]:
    """Those `orders` in which (B, N, C) of this shape lies otherwise than in rows, and rows."""
    batch, tokens, channels = shape
    moved = {
        Order.ROWS: True,
        Order.CHANNELS_FIRST: tokens > 1 and channels > 1,
        Order.TOKENS_FIRST: batch > 1 and tokens > 1,
    }
    return [order for order in orders if moved[order]]

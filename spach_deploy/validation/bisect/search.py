"""The search for the tensors of all places in a graph, wrong ones too.

What a graph makes of the images is compared with the reference's places, and whatever agrees is settled: its readers
get the reference's value from then on. So each round computes more of the graph from right inputs, and finds more.
Where a round finds nothing new, the first place whose inputs are all settled, and which nothing right is computed from,
is wrong: the tensor that stands where its own should is settled as its, and the search goes on behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from spach_deploy.common.metrics import relative_l2
from spach_deploy.graph.names import owner
from spach_deploy.graph.passes.tokens_first import NAME as TOKENS_FIRST
from spach_deploy.validation.bisect.fault_diagnosis import diagnose
from spach_deploy.validation.bisect.opened_graph import Arrays, OpenedGraph
from spach_deploy.validation.bisect.reference import ProbeView
from spach_deploy.validation.bisect.tensor_matching import (
    FIRM,
    FIRM_EIGHT_BITS,
    GraphForms,
    Layout,
    Match,
    Matcher,
    Order,
    ReferenceTensor,
    distinct,
)

WRONG_PROBE_POINTS = 12
"""After so many wrong places the rest is not looked for: the graph is another model's."""

_NEAR, _EXPLAINED, _EXPLAINS = 0.5, 12, 0.2

_EVIDENCE = 3.0
"""A place that is off by so many times its rounding may be right, with others' rounding folded into it."""

Feeds = dict[str, NDArray[np.generic]]


class TensorSearch:
    """`settled`: each place's tensor; `wrong`: places that had to be settled by where they stand, in order.

    `inherited`: errors in the graph as it is, of the places that were found in it at once.
    """

    def __init__(
        self,
        opened: OpenedGraph,
        view: ProbeView,
        feeds: Feeds,
        rounding: Callable[[Match], float],
        *,
        is_quantized: bool,
    ) -> None:
        self.settled: dict[str, Match] = {}
        self.inherited: dict[str, float] = {}
        self.wrong: list[str] = []
        self.hidden: set[str] = set()
        self._opened = opened
        self._view = view
        self._feeds = feeds
        self._limit = FIRM_EIGHT_BITS if is_quantized else FIRM
        self._rounding = rounding
        self._is_quantized = is_quantized
        self._forms: GraphForms | None = None
        self._answers = self._answer_tensors()
        self._orders = _orders(opened)
        self._find()

    def _answer_tensors(self) -> dict[str, list[str]]:
        """The last place is what the graph gives out, whatever happens to it on its way."""
        last = list(self._view.places)[-1]
        sizes = {candidate.recorded.value.size for candidate in self._view.candidates[last]}
        fitting = {*self._opened.tensors(sizes)} & {*self._opened.outputs}
        return {last: sorted(fitting)} if fitting else {}

    @property
    def given(self) -> Arrays:
        """The reference's values of the settled tensors."""
        return {match.tensor: match.layout.from_rows(match.candidate.recorded.value) for match in self.settled.values()}

    def settle_wrong(self, place: str) -> bool:
        """Settle a place that what follows it shows to be wrong, and what is found then; whether it has a tensor."""
        match = None if place in self.hidden else self._standing_for(place)
        if match is None:
            self.hidden.add(place)
            return False
        self.wrong.append(place)
        self.settled[place] = match
        self._find()
        return True

    def before(self, place: str) -> list[str]:
        """Settled places that `place` is computed from, through places that have no tensor."""
        return [name for name in self._back(place) if name in self.settled]

    def between(self, place: str) -> list[str]:
        """Places without a tensor that stand between `place` and the settled ones before it, in order."""
        return [name for name in self._back(place) if name not in self.settled]

    def _back(self, place: str) -> list[str]:
        seen: set[str] = set()
        waiting = list(self._view.places[place].parents)
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting.extend(() if name in self.settled else self._view.places[name].parents)
        return [name for name in self._view.places if name in seen]

    # The rounds

    def _find(self) -> None:
        while self._has_open():
            more = self._look()
            if not self.settled:
                self.inherited = {place: match.error for place, match in more.items()}
            self.settled |= more
            if not more and not self._settle_next():
                return

    def _has_open(self) -> bool:
        """Whether an expected place has no tensor yet; others are found in the first round or never."""
        open_places = (place for place in self._view.places if place not in self.settled and place not in self.hidden)
        return any(self._view.is_expected(place) for place in open_places)

    def _look(self) -> dict[str, Match]:
        """Places that the graph computes rightly from what is settled."""
        unsettled = {name: entries for name, entries in self._view.candidates.items() if name not in self.settled}
        matcher = Matcher(unsettled, self._opened.order, self._limit, self._answers, self._orders)
        given = self.given
        for names in self._opened.passes(self._opened.tensors(matcher.sizes)):
            for tensor, value in self._opened.run(self._feeds, names, given).items():
                matcher.see(tensor, value)
        self._forms = self._forms or matcher.forms()
        return matcher.matches(self._forms, self.settled.values())

    def _settle_next(self) -> bool:
        """Settle the first wrong place, or say that it has no tensor; False where there is none."""
        if len(self.wrong) >= WRONG_PROBE_POINTS:
            return False
        for place in self._view.places:
            if place in self.settled or place in self.hidden or not self._is_next(place):
                continue
            match = self._standing_for(place)
            if match is None:
                self.hidden.add(place)
                continue
            self.wrong.append(place)
            self.settled[place] = match
            return True
        return False

    def _is_next(self, place: str) -> bool:
        """Whether all before it is settled or has no tensor, and nothing right is computed from it."""
        if not self._view.is_expected(place) or any(name not in self.hidden for name in self._open_before(place)):
            return False
        return not any(place in self.between(later) for later, match in self.settled.items() if self._is_right(match))

    def _is_right(self, match: Match) -> bool:
        """Whether a settled place is right to within rounding, so that what it is computed from is too."""
        evidence = self._limit if self._is_quantized else _EVIDENCE * self._rounding(match)
        return match.place not in self.wrong and match.error <= evidence

    def _open_before(self, place: str) -> list[str]:
        return [name for name in self.between(place) if self._view.is_expected(name)]

    # The tensor of a wrong place

    def _standing_for(self, place: str) -> Match | None:
        """The tensor that is computed from a place's inputs alone and has its size: the nearest, if it is near.

        Else that which a fault explains; where none does, the last that is named after the module, or the nearest.
        """
        every = list(self._standing(place))
        named = [entry for entry in every if self._is_named(entry[0])]
        found = named or [entry for entry in every if not self._is_anothers(entry[0])]
        nearest = min((match for match, _ in found), key=lambda match: _rank(match.error), default=None)
        if nearest is None or nearest.error < _NEAR:
            return nearest
        explained = [(self._left(*entry), entry[0]) for entry in found[-_EXPLAINED:]]
        left, best = min(explained, key=lambda entry: entry[0], default=(np.inf, None))
        if best is not None and left < _EXPLAINS:
            return best
        if named:
            return max((match for match, _ in named), key=lambda match: self._opened.order[match.tensor])
        return nearest

    def _left(self, match: Match, rows: NDArray[np.floating]) -> float:
        """Share of the error that is left when the likeliest fault is assumed."""
        diagnosis = diagnose(match.candidate.recorded, rows)
        return diagnosis.left / match.error if diagnosis.left and match.error > 0 else np.inf

    def _is_named(self, match: Match) -> bool:
        module = self._view.places[match.place].module
        return bool(module) and module in self._names(match)

    def _is_anothers(self, match: Match) -> bool:
        """Whether it has the name of another module: in graphs that are not ours, names mean nothing."""
        return any(place.module in self._names(match) for place in self._view.places.values() if place.module)

    def _names(self, match: Match) -> tuple[str, str]:
        return owner(match.tensor), owner(self._opened.makers[match.tensor])

    def _standing(self, place: str) -> Iterator[tuple[Match, NDArray[np.floating]]]:
        given = self.given
        inputs = [self.settled[name].tensor for name in self.before(place)]
        candidate = self._view.candidates[place][0]
        sizes = [entry.recorded.value.size for entry in self._view.candidates[place]]
        names = self._opened.computed_from(inputs, given, self._opened.tensors(sizes))
        taken = {match.tensor for match in self.settled.values()}
        names = [name for name in names if name not in taken and name in self._answers.get(place, (name,))]
        if not names:
            return
        for tensor, value in self._opened.run(self._feeds, names, given).items():
            if value.size == candidate.recorded.value.size:
                yield from self._as_place(place, tensor, value, inputs)

    def _as_place(
        self, place: str, tensor: str, value: NDArray[np.floating], inputs: list[str]
    ) -> Iterator[tuple[Match, NDArray[np.floating]]]:
        """The tensor taken for the place's in each form and layout, unless it is an input, moved by somebody else."""
        for candidate in self._candidates(place):
            for layout in self._layouts(value, candidate):
                rows = layout.to_rows(value, candidate.recorded.value.shape)
                match = Match(place, candidate, tensor, layout, relative_l2(rows, candidate.recorded.value))
                if self._is_named(match) or not self._is_input(rows, inputs):
                    yield match, rows

    def _layouts(self, value: NDArray[np.floating], candidate: ReferenceTensor) -> Iterator[Layout]:
        for order in distinct(self._orders, candidate.recorded.value.shape):
            if order is not Order.CHANNELS_FIRST or value.ndim >= 3:
                yield Layout(value.shape, order)

    def _candidates(self, place: str) -> tuple[ReferenceTensor, ...]:
        """The place's value in the form that the graph follows, or in each where that is not known."""
        every = self._view.candidates[place]
        own = tuple(entry for entry in every if self._forms is not None and self._forms.follows(place, entry.form))
        return own or every

    def _is_input(self, rows: NDArray[np.floating], inputs: list[str]) -> bool:
        """Whether it is one of the place's inputs, moved or rounded."""
        for match in self.settled.values():
            value = match.candidate.recorded.value
            is_input = match.tensor in inputs and value.shape == rows.shape
            if is_input and relative_l2(rows, value) <= self._rounding(match):
                return True
        return False


def _orders(opened: OpenedGraph) -> tuple[Order, ...]:
    """Orders that the graph may have tensors in: images behind tokens only where a node says that it makes that."""
    usual = (Order.ROWS, Order.CHANNELS_FIRST)
    swaps = any(name.rpartition("/")[2] == TOKENS_FIRST for name in opened.makers.values())
    return (*usual, Order.TOKENS_FIRST) if swaps else usual


def _rank(error: float) -> float:
    return error if np.isfinite(error) else float("inf")

"""Search a graph for the tensors of all probe points, including those with wrong values.

1. Run the graph on the images. Match every tensor that agrees with a probe point. From then on its readers get the
reference's value.

2. Repeat. Each round computes more of the graph from right inputs, and so matches more.

3. Where a round matches nothing new, one point is wrong: the first one whose inputs are all matched, and which no right
point is computed from. Match it with the tensor that is most likely its, and go on with 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from spach_deploy.common.metrics import relative_l2
from spach_deploy.graph.editing import owner
from spach_deploy.graph.passes.tokens_first import NAME as TOKENS_FIRST
from spach_deploy.validation.bisect.fault_diagnosis import diagnose
from spach_deploy.validation.bisect.opened_graph import Arrays, OpenedGraph
from spach_deploy.validation.bisect.tensor_matching import (
    MATCH_LIMIT,
    MATCH_LIMIT_EIGHT_BITS,
    GraphForms,
    Layout,
    Match,
    Matcher,
    Order,
    ProbeView,
    ReferenceTensor,
    distinct,
)

WRONG_PROBE_POINTS = 12
"""The search stops after so many wrong points: the graph is of another model."""

_NEAR, _EXPLAINED, _EXPLAINS = 0.5, 12, 0.2

_RIGHT_FACTOR = 3.0
"""A point within this multiple of its rounding error counts as right: others' rounding may be folded into it."""

Feeds = dict[str, NDArray[np.generic]]


class TensorSearch:
    """The search, done by the constructor.

    `matched`: the tensor of each probe point. `wrong`: points that were matched by their position rather than by their
    values, in order. `absent`: points that have no tensor. `inherited`: relative L2 in the graph as it is, of the
    points that the first round matched.
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
        self.matched: dict[str, Match] = {}
        self.inherited: dict[str, float] = {}
        self.wrong: list[str] = []
        self.absent: set[str] = set()
        self._opened = opened
        self._view = view
        self._feeds = feeds
        self._limit = MATCH_LIMIT_EIGHT_BITS if is_quantized else MATCH_LIMIT
        self._rounding = rounding
        self._is_quantized = is_quantized
        self._forms: GraphForms | None = None
        self._output_tensors = self._find_output_tensors()
        self._orders = _orders(opened)
        self._match_all()

    def _find_output_tensors(self) -> dict[str, list[str]]:
        """For the last point, if the model gives it, only the graph's outputs are candidates, whatever is before."""
        last = list(self._view.points)[-1]
        if not self._view.points[last].is_output:
            return {}
        sizes = {candidate.recorded.value.size for candidate in self._view.candidates[last]}
        fitting = {*self._opened.tensors(sizes)} & {*self._opened.outputs}
        return {last: sorted(fitting)} if fitting else {}

    @property
    def overrides(self) -> Arrays:
        """The reference's value for each matched tensor."""
        return {match.tensor: match.layout.from_rows(match.candidate.recorded.value) for match in self.matched.values()}

    def match_wrong(self, point: str) -> bool:
        """Match a point that the next one shows to be wrong, and continue the search. False where it has no tensor."""
        match = None if point in self.absent else self._best_candidate(point)
        if match is None:
            self.absent.add(point)
            return False
        self.wrong.append(point)
        self.matched[point] = match
        self._match_all()
        return True

    def matched_inputs(self, point: str) -> list[str]:
        """The nearest matched points that `point` is computed from."""
        return [name for name in self._ancestors(point) if name in self.matched]

    def unmatched_inputs(self, point: str) -> list[str]:
        """Unmatched points between `point` and its matched inputs, in order."""
        return [name for name in self._ancestors(point) if name not in self.matched]

    def _ancestors(self, point: str) -> list[str]:
        """Points that `point` is computed from, back to the nearest matched ones, in order."""
        seen: set[str] = set()
        waiting = list(self._view.points[point].parents)
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting.extend(() if name in self.matched else self._view.points[name].parents)
        return [name for name in self._view.points if name in seen]

    # The rounds

    def _match_all(self) -> None:
        while self._has_unmatched():
            more = self._match_once()
            if not self.matched:
                self.inherited = {point: match.error for point, match in more.items()}
            self.matched |= more
            if not more and not self._match_next_wrong():
                return

    def _has_unmatched(self) -> bool:
        """Whether an expected point is still unmatched; others are found in the first round or never."""
        unmatched = (point for point in self._view.points if point not in self.matched and point not in self.absent)
        return any(self._view.is_expected(point) for point in unmatched)

    def _match_once(self) -> dict[str, Match]:
        """Match the points whose values the graph computes rightly from what is matched so far."""
        unmatched = {name: entries for name, entries in self._view.candidates.items() if name not in self.matched}
        matcher = Matcher(unmatched, self._opened.order, self._limit, self._output_tensors, self._orders)
        overrides = self.overrides
        for names in self._opened.groups(self._opened.tensors(matcher.sizes)):
            for tensor, value in self._opened.run(self._feeds, names, overrides).items():
                matcher.add(tensor, value)
        self._forms = self._forms or matcher.forms()
        return matcher.matches(self._forms, self.matched.values())

    def _match_next_wrong(self) -> bool:
        """Match the first wrong point, or record that it has no tensor; False where there is none."""
        if len(self.wrong) >= WRONG_PROBE_POINTS:
            return False
        for point in self._view.points:
            if point in self.matched or point in self.absent or not self._is_next(point):
                continue
            match = self._best_candidate(point)
            if match is None:
                self.absent.add(point)
                continue
            self.wrong.append(point)
            self.matched[point] = match
            return True
        return False

    def _is_next(self, point: str) -> bool:
        """Whether all inputs of a point are matched or absent, and no right point is computed from it."""
        if not self._view.is_expected(point) or any(name not in self.absent for name in self._missing_inputs(point)):
            return False
        return not any(
            point in self.unmatched_inputs(later) for later, match in self.matched.items() if self._is_right(match)
        )

    def _is_right(self, match: Match) -> bool:
        """Whether a matched point is right to within rounding, so that its inputs are right too."""
        limit = self._limit if self._is_quantized else _RIGHT_FACTOR * self._rounding(match)
        return match.point not in self.wrong and match.error <= limit

    def _missing_inputs(self, point: str) -> list[str]:
        return [name for name in self.unmatched_inputs(point) if self._view.is_expected(name)]

    # The tensor of a wrong place

    def _best_candidate(self, point: str) -> Match | None:
        """The most likely tensor of a wrong point, of those with its size that are computed from its inputs alone.

        Tensors that are named after its module come before others. Of these the nearest, if it is near; else the one
        that a fault explains best; else the last that is named after the module; else the nearest.
        """
        every = list(self._candidate_matches(point))
        named = [entry for entry in every if self._has_own_name(entry[0])]
        found = named or [entry for entry in every if not self._has_other_name(entry[0])]
        nearest = min((match for match, _ in found), key=lambda match: _rank(match.error), default=None)
        if nearest is None or nearest.error < _NEAR:
            return nearest
        explained = [(self._unexplained_share(*entry), entry[0]) for entry in found[-_EXPLAINED:]]
        left, best = min(explained, key=lambda entry: entry[0], default=(np.inf, None))
        if best is not None and left < _EXPLAINS:
            return best
        if named:
            return max((match for match, _ in named), key=lambda match: self._opened.order[match.tensor])
        return nearest

    def _unexplained_share(self, match: Match, rows: NDArray[np.floating]) -> float:
        """The share of the error that the most likely fault leaves unexplained."""
        diagnosis = diagnose(match.candidate.recorded, rows)
        return diagnosis.left / match.error if diagnosis.left and match.error > 0 else np.inf

    def _has_own_name(self, match: Match) -> bool:
        module = self._view.points[match.point].module
        return bool(module) and module in self._names(match)

    def _has_other_name(self, match: Match) -> bool:
        """Whether the tensor is named after another module. Only in exported graphs do names mean this."""
        return any(point.module in self._names(match) for point in self._view.points.values() if point.module)

    def _names(self, match: Match) -> tuple[str, str]:
        return owner(match.tensor), owner(self._opened.makers[match.tensor])

    def _candidate_matches(self, point: str) -> Iterator[tuple[Match, NDArray[np.floating]]]:
        """Tensors that could be a wrong point's, with their values (B, N, C)."""
        overrides = self.overrides
        inputs = [self.matched[name].tensor for name in self.matched_inputs(point)]
        sizes = [entry.recorded.value.size for entry in self._view.candidates[point]]
        names = self._opened.computed_from(inputs, overrides, self._opened.tensors(sizes))
        taken = {match.tensor for match in self.matched.values()}
        names = [name for name in names if name not in taken and name in self._output_tensors.get(point, (name,))]
        if not names:
            return
        for tensor, value in self._opened.run(self._feeds, names, overrides).items():
            yield from self._matches_of_tensor(point, tensor, value, inputs)

    def _matches_of_tensor(
        self, point: str, tensor: str, value: NDArray[np.floating], inputs: list[str]
    ) -> Iterator[tuple[Match, NDArray[np.floating]]]:
        """The tensor as the point's value, in each form and layout, unless it is one of the point's inputs in another
        layout.
        """
        for candidate in self._forms_of_point(point):
            if candidate.recorded.value.size != value.size:
                continue
            for layout in self._layouts(value, candidate):
                rows = layout.to_rows(value, candidate.recorded.value.shape)
                match = Match(point, candidate, tensor, layout, relative_l2(rows, candidate.recorded.value))
                if self._has_own_name(match) or not self._is_input(rows, inputs):
                    yield match, rows

    def _layouts(self, value: NDArray[np.floating], candidate: ReferenceTensor) -> Iterator[Layout]:
        for order in distinct(self._orders, candidate.recorded.value.shape):
            if order is not Order.CHANNELS_FIRST or value.ndim >= 3:
                yield Layout(value.shape, order)

    def _forms_of_point(self, point: str) -> tuple[ReferenceTensor, ...]:
        """The point's value in the form that the graph follows; in every form where that is unknown."""
        every = self._view.candidates[point]
        own = tuple(
            entry
            for entry in every
            if self._forms is not None and self._forms.follows(self._view.points[point], entry.form)
        )
        return own or every

    def _is_input(self, rows: NDArray[np.floating], inputs: list[str]) -> bool:
        """Whether `rows` is one of the point's inputs, moved or rounded."""
        for match in self.matched.values():
            value = match.candidate.recorded.value
            is_input = match.tensor in inputs and value.shape == rows.shape
            if is_input and relative_l2(rows, value) <= self._rounding(match):
                return True
        return False


def _orders(opened: OpenedGraph) -> tuple[Order, ...]:
    """Axis orders to look for: tokens before images only where a node of the graph makes that order."""
    usual = (Order.ROWS, Order.CHANNELS_FIRST)
    swaps = any(name.rpartition("/")[2] == TOKENS_FIRST for name in opened.makers.values())
    return (*usual, Order.TOKENS_FIRST) if swaps else usual


def _rank(error: float) -> float:
    return error if np.isfinite(error) else float("inf")

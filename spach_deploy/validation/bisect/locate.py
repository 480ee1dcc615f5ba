"""The first module whose output is wrong given right inputs.

The graph runs twice. First as it is: its tensors are matched with the reference's places. Then every matched tensor's
readers get the reference's value instead, so that each module computes from right inputs, and what it makes of them is
compared: an error is then its own. Tensors that were too wrong to be matched because of an error before them are
matched in that second run, and it is repeated as long as that finds more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from spach_deploy.errors import UsageError
from spach_deploy.validation.bisect.losses import Loss
from spach_deploy.validation.bisect.mapping import Layout, Match, Matcher
from spach_deploy.validation.bisect.opened import Arrays, OpenedGraph
from spach_deploy.validation.bisect.reference import BATCH, Reference, View
from spach_deploy.validation.precision_loss import Arithmetic

FIRM = 0.1
"""Relative L2 up to which a tensor is surely the place's, so that its readers may be given the reference's value."""

EIGHT_BIT_FACTOR = 0.75
"""Share of what eight bits cost that a layer may differ from the same layer in PyTorch: values that lie between two
steps fall to either side."""

_ROUNDS = 4
_NEAR = 24
_ARITHMETICS: dict[int, Arithmetic] = {TensorProto.FLOAT16: Arithmetic.FP16, TensorProto.BFLOAT16: Arithmetic.BF16}


@dataclasses.dataclass(frozen=True)
class Found:
    """A place in a graph. `local`: relative L2 given right inputs; `inherited`: in the graph as it is.

    `value` float32 (B, N, C) is what the graph makes of right inputs. `allowed`: rounding.
    """

    match: Match
    inherited: float
    local: float
    allowed: float
    value: NDArray[np.floating] = dataclasses.field(repr=False)

    @property
    def is_right(self) -> bool:
        """Whether it is rounding alone."""
        return self.local <= self.allowed


@dataclasses.dataclass(frozen=True)
class Suspicion:
    """A place whose error is its own: `found` None where no tensor of the graph resembles it; `seen_at` shows it."""

    place: str
    found: Found | None
    seen_at: str


@dataclasses.dataclass(frozen=True)
class Location:
    """What a graph does at each place; suspicions in the order of the model. `view`: the reference it was held to.

    `strangers`: for each suspected place without a tensor, values (B, N, C) of tensors of its size near where it should
    be, computed from right inputs.
    """

    view: View
    arithmetic: Arithmetic
    found: dict[str, Found]
    suspicions: tuple[Suspicion, ...]
    strangers: dict[str, list[NDArray[np.floating]]] = dataclasses.field(repr=False)

    @property
    def unmapped(self) -> tuple[str, ...]:
        """Places that are no tensor of the graph and that nothing speaks against."""
        suspected = {suspicion.place for suspicion in self.suspicions}
        return tuple(name for name in self.view.places if name not in self.found and name not in suspected)


def locate(graph: ModelProto, reference: Reference) -> Location:
    """Hold every place of `graph` to the reference. UsageError where the graph cannot be taken apart."""
    name, dtype, batch = _input(graph)
    view = reference.view(batch)
    opened = OpenedGraph(graph, batch)
    feeds = {name: reference.inputs(dtype, batch)}
    matches, alone = _mapped(opened, view, feeds)
    arithmetic = _ARITHMETICS[opened.half] if opened.half is not None else Arithmetic.FP32
    found = dict(_held(opened, matches, alone, feeds, reference, arithmetic))
    ordered = {place: found[place] for place in view.places if place in found}
    suspicions = tuple(_suspicions(view, ordered))
    given = {match.tensor: _given(match) for match in matches.values()}
    strangers = {
        suspicion.place: _strangers(opened, view, suspicion.place, ordered, feeds, given)
        for suspicion in suspicions
        if suspicion.found is None
    }
    return Location(view, arithmetic, ordered, suspicions, strangers)


def _strangers(
    opened: OpenedGraph,
    view: View,
    place: str,
    found: dict[str, Found],
    feeds: dict[str, NDArray[np.generic]],
    given: Arrays,
) -> list[NDArray[np.floating]]:
    """Tensors of a place's size that are no place's and that stand behind its parents, in either layout."""
    shape = view.candidates[place][0].recorded.value.shape
    behind = _parents_with_tensors(view, found, place)
    start = max((opened.order[found[name].match.tensor] for name in behind), default=-1)
    near = [name for name in opened.tensors([int(np.prod(shape))]) if opened.order[name] > start and name not in given]
    values = opened.run(feeds, near[:_NEAR], given) if near else {}
    fitting = [value for value in values.values() if value.size == np.prod(shape)]
    layouts = (Layout((), channels_first) for channels_first in (False, True))
    return [layout.to_rows(value, shape) for layout in layouts for value in fitting]


def _parents_with_tensors(view: View, found: dict[str, Found], place: str) -> list[str]:
    hidden = [place, *_before(view, found, place)]
    return [parent for name in hidden for parent in view.places[name].parents if parent in found]


def _input(graph: ModelProto) -> tuple[str, str, int]:
    """Name, dtype and batch of the images."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    inputs = [value for value in graph.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise UsageError(f"The graph has {len(inputs)} inputs; a classifier of images has one.", "Give another graph.")
    tensor = inputs[0].type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    dims = tensor.shape.dim
    return inputs[0].name, str(dtype), (dims[0].dim_value if dims else 0) or BATCH


def _mapped(
    opened: OpenedGraph, view: View, feeds: dict[str, NDArray[np.generic]]
) -> tuple[dict[str, Match], dict[str, float]]:
    """Tensors of places, and their errors in the graph as it is."""
    firm: dict[str, Match] = {}
    alone: dict[str, float] = {}
    form = ""
    for turn in range(_ROUNDS):
        open_places = {name: entries for name, entries in view.candidates.items() if name not in firm}
        matcher = Matcher(open_places, opened.order)
        given = {match.tensor: _given(match) for match in firm.values()}
        for names in opened.passes(opened.tensors(matcher.sizes)):
            for tensor, value in opened.run(feeds, names, given).items():
                matcher.see(tensor, value)
        form = form or matcher.form()
        matches = matcher.matches(form, firm.values())
        alone = alone or {place: match.error for place, match in matches.items()}
        more = {place: match for place, match in matches.items() if match.error <= FIRM}
        if turn and not more:
            break
        firm |= more
    return firm | matches, alone


def _given(match: Match) -> NDArray[np.generic]:
    return match.layout.from_rows(match.candidate.recorded.value)


def _held(
    opened: OpenedGraph,
    matches: dict[str, Match],
    alone: dict[str, float],
    feeds: dict[str, NDArray[np.generic]],
    reference: Reference,
    arithmetic: Arithmetic,
) -> Iterator[tuple[str, Found]]:
    """Each place computed from right inputs and compared."""
    given: Arrays = {match.tensor: _given(match) for match in matches.values()}
    places = {match.tensor: place for place, match in matches.items()}
    for names in opened.passes(places):
        for tensor, value in opened.run(feeds, names, given).items():
            match = matches[places[tensor]]
            rows = match.layout.to_rows(value, match.candidate.recorded.value.shape)
            local, eight_bits = reference.local_error(match.place, match.candidate, rows)
            allowed = _allowed(reference.loss(match.place, match.candidate, arithmetic), eight_bits)
            yield match.place, Found(match, alone.get(match.place, np.inf), local, allowed, rows)


def _allowed(loss: Loss, eight_bits: float) -> float:
    return loss.allowed + EIGHT_BIT_FACTOR * eight_bits


def _suspicions(view: View, found: dict[str, Found]) -> Iterator[Suspicion]:
    """Places whose error is their own. What no tensor resembles is blamed where what follows it is wrong."""
    blamed: set[str] = set()
    for name in view.places:
        entry = found.get(name)
        if entry is not None and entry.is_right:
            continue
        if entry is None and not _is_last(view, name):
            continue
        hidden = [place for place in _before(view, found, name) if view.is_expected(place)]
        place = hidden[0] if hidden else name
        if place not in blamed:
            blamed.add(place)
            yield Suspicion(place, found.get(place), name)


def _is_last(view: View, name: str) -> bool:
    return name == list(view.places)[-1]


def _before(view: View, found: dict[str, Found], name: str) -> list[str]:
    """Places without a tensor that stand between `name` and the places before it that have one, in order."""
    seen: set[str] = set()
    waiting = list(view.places[name].parents)
    while waiting:
        place = waiting.pop()
        if place not in found and place not in seen:
            seen.add(place)
            waiting.extend(view.places[place].parents)
    return [place for place in view.places if place in seen]

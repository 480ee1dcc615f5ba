"""Which modules of a graph are wrong given right inputs.

Once every place has its tensor (`search`), the graph runs twice more: as it is, which gives inherited errors, and with
every tensor's readers given the reference's value, so that each module computes from right inputs and an error is its
own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.common.errors import UsageError
from spach_deploy.common.metrics import relative_l2
from spach_deploy.graph.editing import name_of
from spach_deploy.graph.names import owner
from spach_deploy.graph.precision.formats import FLOAT
from spach_deploy.validation.bisect.opened_graph import Arrays, OpenedGraph
from spach_deploy.validation.bisect.reference import BATCH, ProbedReference, ProbeView
from spach_deploy.validation.bisect.search import Feeds, TensorSearch
from spach_deploy.validation.bisect.tensor_matching import Match
from spach_deploy.validation.rounding_error import StorageFormat

EIGHT_BIT_FACTOR = 0.75
"""Share of what eight bits cost that a layer may differ from the same layer in PyTorch: values that lie between two
steps fall to either side."""

_ARITHMETICS: dict[int, StorageFormat] = {
    ir.DataType.FLOAT16: StorageFormat.FP16,
    ir.DataType.BFLOAT16: StorageFormat.BF16,
}


@dataclasses.dataclass(frozen=True)
class ProbeErrors:
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
    """A place whose error is its own. `found` None: no tensor stands for it, and `seen_at` is wrong.

    `value` (B, N, C): what is made of the place's output before others read it, where that is what is wrong.
    """

    place: str
    found: ProbeErrors | None
    seen_at: str
    value: NDArray[np.floating] | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Location:
    """What a graph does at each place; suspicions in the order of the model. `view`: the reference it was held to."""

    view: ProbeView
    found: dict[str, ProbeErrors]
    suspicions: tuple[Suspicion, ...]

    @property
    def unmapped(self) -> tuple[str, ...]:
        """Places that have no tensor and that nothing speaks against."""
        suspected = {suspicion.place for suspicion in self.suspicions}
        return tuple(name for name in self.view.places if name not in self.found and name not in suspected)


def locate(graph: ir.Model, reference: ProbedReference) -> Location:
    """Hold every place of `graph` to the reference. UsageError where the graph cannot be taken apart."""
    name, dtype, batch = _input(graph)
    opened = OpenedGraph(graph, batch)
    view = reference.view(batch).of_graph(opened.makers)
    feeds = {name: reference.inputs(dtype, batch)}
    is_quantized = any(node.op_type == "QuantizeLinear" for node in graph.graph)
    arithmetic = _ARITHMETICS[opened.half] if opened.half is not None else StorageFormat.FP32

    def rounding(match: Match) -> float:
        return reference.loss(match.place, match.candidate, arithmetic).allowed

    search = TensorSearch(opened, view, feeds, rounding, is_quantized=is_quantized)
    while True:
        held = dict(_held(opened, search, feeds, reference, arithmetic))
        found = {place: held[place] for place in view.places if place in held}
        suspicions = tuple(_suspicions(view, search, found))
        hidden = (entry.place for entry in suspicions if entry.found is None)
        if not any(search.settle_wrong(place) for place in hidden):
            break
    return Location(view, found, tuple(_behind(entry, opened, search, feeds, found) for entry in suspicions))


def _input(graph: ir.Model) -> tuple[str, str, int]:
    """Name, dtype and batch of the images."""
    inputs = [value for value in graph.graph.inputs if not value.is_initializer()]
    if len(inputs) != 1:
        raise UsageError(f"The graph has {len(inputs)} inputs; a classifier of images has one.", "Give another graph.")
    (given,) = inputs
    first = given.shape[0] if given.shape else 0
    return name_of(given), str((given.dtype or FLOAT).numpy()), first if isinstance(first, int) and first else BATCH


def _held(
    opened: OpenedGraph, search: TensorSearch, feeds: Feeds, reference: ProbedReference, arithmetic: StorageFormat
) -> Iterator[tuple[str, ProbeErrors]]:
    """Each place computed from right inputs, and as it is, and compared."""
    places = {match.tensor: place for place, match in search.settled.items()}
    given: Arrays = search.given
    alone = _alone(opened, search, feeds)
    for names in opened.passes(places):
        for tensor, value in opened.run(feeds, names, given).items():
            match = search.settled[places[tensor]]
            yield match.place, _found(match, alone[match.place], value, search, reference, arithmetic)


def _alone(opened: OpenedGraph, search: TensorSearch, feeds: Feeds) -> dict[str, float]:
    """Errors in the graph as it is; those of tensors that were found later are measured now."""
    errors = dict(search.inherited)
    later = {match.tensor: match for place, match in search.settled.items() if place not in errors}
    for names in opened.passes(later):
        for tensor, value in opened.run(feeds, names, {}).items():
            match = later[tensor]
            exact = match.candidate.recorded.value
            errors[match.place] = relative_l2(match.layout.to_rows(value, exact.shape), exact)
    return errors


def _found(
    match: Match,
    inherited: float,
    value: NDArray[np.floating],
    search: TensorSearch,
    reference: ProbedReference,
    arithmetic: StorageFormat,
) -> ProbeErrors:
    exact = match.candidate.recorded.value
    rows = match.layout.to_rows(value, exact.shape)
    local, eight_bits = reference.local_error(match.place, match.candidate, rows)
    allowed = reference.loss(match.place, match.candidate, arithmetic).allowed + EIGHT_BIT_FACTOR * eight_bits
    for name in search.between(match.place):  # what is folded into it rounds too
        allowed += reference.loss(name, reference.form_of(name, match.candidate.form), arithmetic).allowed
    return ProbeErrors(match, inherited, local, allowed, rows)


def _suspicions(view: ProbeView, search: TensorSearch, found: dict[str, ProbeErrors]) -> Iterator[Suspicion]:
    """Places whose error is their own. What has no tensor is blamed where what follows it is wrong."""
    blamed: set[str] = set()
    for name in view.places:
        entry = found.get(name)
        if entry is None or entry.is_right:
            continue
        hidden = [place for place in search.between(name) if view.is_expected(place)]
        place = hidden[0] if hidden else name
        if place not in blamed:
            blamed.add(place)
            yield Suspicion(place, found.get(place), name)


def _behind(
    suspicion: Suspicion, opened: OpenedGraph, search: TensorSearch, feeds: Feeds, found: dict[str, ProbeErrors]
) -> Suspicion:
    """The suspicion, or the place before it whose output is right and then cut off or rounded on its way.

    A node that has the name of the suspected module is that module's own.
    """
    places = search.before(suspicion.place) if suspicion.found is not None else []
    for place in places:
        match, limit = found[place].match, found[place].allowed
        made = [entry for entry in opened.altered(match.tensor) if entry[0] not in search.given]
        if not made or not found[place].is_right:
            continue
        values = opened.run(feeds, [tensor for tensor, _ in made], search.given)
        for tensor, node in made:
            if values[tensor].size != match.candidate.recorded.value.size or values[tensor].ndim < 2:
                continue
            rows = match.layout.to_rows(values[tensor], match.candidate.recorded.value.shape)
            if relative_l2(rows, match.candidate.recorded.value) <= limit:
                continue
            if owner(node) != suspicion.place and not _is_moved(rows, match, limit):
                return Suspicion(place, found[place], suspicion.seen_at, rows)
    return suspicion


def _is_moved(rows: NDArray[np.floating], match: Match, limit: float) -> bool:
    """Whether it is the value in another layout: the same numbers, but for rounding."""
    exact = match.candidate.recorded.value
    return relative_l2(np.sort(rows, axis=None), np.sort(exact, axis=None)) <= limit

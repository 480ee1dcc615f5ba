"""Find the modules of a graph that are wrong given right inputs.

First `search` finds the graph's tensor for every probe point. Then the graph runs twice more. As it is, it gives
inherited errors. With the reference's value given to all readers of every matched tensor, each module computes from
right inputs, so its error is its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from spach_deploy.blocks.base import modules_of
from spach_deploy.blocks.token_mlp import StaticAxisMixing
from spach_deploy.common.errors import UsageError
from spach_deploy.common.metrics import relative_l2
from spach_deploy.graph.editing import name_of, owner
from spach_deploy.graph.precision.formats import FLOAT
from spach_deploy.quantization.spelt_quantize import join_quantizers
from spach_deploy.validation.bisect.fault_diagnosis import Fault, diagnose
from spach_deploy.validation.bisect.opened_graph import Arrays, OpenedGraph
from spach_deploy.validation.bisect.result import Bisection, ModuleResult, Suspect, Unmatched
from spach_deploy.validation.bisect.search import Feeds, TensorSearch
from spach_deploy.validation.bisect.tensor_matching import BATCH, Match, ProbedReference, ProbeView
from spach_deploy.validation.rounding_error import StorageFormat

EIGHT_BIT_FACTOR = 0.75
"""A quantized layer may differ from the same layer quantized in PyTorch by this share of the eight-bit rounding error:
values between two steps may be rounded either way.
"""

_ARITHMETICS: dict[int, StorageFormat] = {
    ir.DataType.FLOAT16: StorageFormat.FP16,
    ir.DataType.BFLOAT16: StorageFormat.BF16,
}


@dataclasses.dataclass(frozen=True)
class ProbeErrors:
    """Errors at a probe point of a graph, relative L2.

    `local`: given right inputs; `inherited`: in the graph as it is; `allowed`: what rounding explains. `value` float32
    (B, N, C): what the graph computes from right inputs.
    """

    match: Match
    inherited: float
    local: float
    allowed: float
    value: NDArray[np.floating] = dataclasses.field(repr=False)

    @property
    def is_right(self) -> bool:
        """Whether rounding explains the local error."""
        return self.local <= self.allowed


@dataclasses.dataclass(frozen=True)
class Suspicion:
    """A probe point with an error of its own.

    `found`: None where the graph has no tensor for it; then the point `seen_at`, which follows it, is wrong. `value`
    (B, N, C): set where the point's output is right, but is altered before others read it; the altered value.
    """

    point: str
    found: ProbeErrors | None
    seen_at: str
    value: NDArray[np.floating] | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Location:
    """A graph's errors at all probe points, and the suspicions in the order of the model. `view`: the reference."""

    view: ProbeView
    found: dict[str, ProbeErrors]
    suspicions: tuple[Suspicion, ...]

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Probe points without a tensor that nothing casts suspicion on."""
        suspected = {suspicion.point for suspicion in self.suspicions}
        return tuple(name for name in self.view.points if name not in self.found and name not in suspected)


def bisect_graph(graph: ir.Model, reference: ProbedReference) -> Bisection:
    """Compare every module of `graph` with the reference's. UsageError where the graph's tensors cannot be read."""
    join_quantizers(graph)
    location = locate(graph, reference)
    return Bisection(tuple(_suspects(location)), tuple(_modules(location)), tuple(_unmatched(location)))


def locate(graph: ir.Model, reference: ProbedReference) -> Location:
    """Compare every probe point of `graph` with the reference. UsageError where the graph's tensors cannot be read."""
    name, dtype, batch = _input(graph)
    opened = OpenedGraph(graph, batch)
    view = reference.view(batch).of_graph(opened.makers)
    feeds = {name: reference.inputs(dtype, batch)}
    is_quantized = any(node.op_type == "QuantizeLinear" for node in graph.graph)
    arithmetic = _ARITHMETICS[opened.half] if opened.half is not None else StorageFormat.FP32

    def rounding(match: Match) -> float:
        return reference.rounding_errors(match.point, match.candidate, arithmetic).allowed

    search = TensorSearch(opened, view, feeds, rounding, is_quantized=is_quantized)
    while True:
        errors = dict(_errors_by_point(opened, search, feeds, reference, arithmetic))
        found = {point: errors[point] for point in view.points if point in errors}
        suspicions = tuple(_suspicions(view, search, found, reference))
        absent = (entry.point for entry in suspicions if entry.found is None)
        if not any(search.match_wrong(point) for point in absent):
            break
    return Location(
        view, found, tuple(_blame_altered_input(entry, opened, search, feeds, found) for entry in suspicions)
    )


def _input(graph: ir.Model) -> tuple[str, str, int]:
    """Name, dtype and batch size of the images."""
    inputs = [value for value in graph.graph.inputs if not value.is_initializer()]
    if len(inputs) != 1:
        raise UsageError(f"The graph has {len(inputs)} inputs; a classifier of images has one.", "Give another graph.")
    (images,) = inputs
    first = images.shape[0] if images.shape else 0
    batch = first if isinstance(first, int) and first else BATCH
    return name_of(images), str((images.dtype or FLOAT).numpy()), batch


def _errors_by_point(
    opened: OpenedGraph, search: TensorSearch, feeds: Feeds, reference: ProbedReference, arithmetic: StorageFormat
) -> Iterator[tuple[str, ProbeErrors]]:
    """For each matched probe point, its errors from right inputs and in the graph as it is."""
    points = {match.tensor: point for point, match in search.matched.items()}
    overrides: Arrays = search.overrides
    inherited = _inherited_errors(opened, search, feeds)
    for names in opened.groups(points):
        for tensor, value in opened.run(feeds, names, overrides).items():
            match = search.matched[points[tensor]]
            yield match.point, _found(match, inherited[match.point], value, search, reference, arithmetic)


def _inherited_errors(opened: OpenedGraph, search: TensorSearch, feeds: Feeds) -> dict[str, float]:
    """Errors in the graph as it is, by probe point. The first search has measured most of them."""
    errors = dict(search.inherited)
    later = {match.tensor: match for point, match in search.matched.items() if point not in errors}
    for names in opened.groups(later):
        for tensor, value in opened.run(feeds, names, {}).items():
            match = later[tensor]
            exact = match.candidate.recorded.value
            errors[match.point] = relative_l2(match.layout.to_rows(value, exact.shape), exact)
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
    local, eight_bits = reference.local_error(match.point, match.candidate, rows)
    allowed = (
        reference.rounding_errors(match.point, match.candidate, arithmetic).allowed + EIGHT_BIT_FACTOR * eight_bits
    )
    for name in search.unmatched_inputs(match.point):  # what is folded into it rounds too
        allowed += reference.rounding_errors(name, reference.form_of(name, match.candidate.form), arithmetic).allowed
    return ProbeErrors(match, inherited, local, allowed, rows)


def _suspicions(
    view: ProbeView, search: TensorSearch, found: dict[str, ProbeErrors], reference: ProbedReference
) -> Iterator[Suspicion]:
    """Probe points with an error of their own. A point without a tensor is suspected where the next one is wrong."""
    blamed: set[str] = set()
    for name in view.points:
        entry = found.get(name)
        if entry is None or entry.is_right:
            continue
        absent = [point for point in search.unmatched_inputs(name) if view.is_expected(point)]
        point = (_explaining(name, search, entry, reference) or absent[0]) if absent else name
        if point not in blamed:
            blamed.add(point)
            yield Suspicion(point, found.get(point), name)


def _explaining(name: str, search: TensorSearch, entry: ProbeErrors, reference: ProbedReference) -> str:
    """Of an sMLPNet's three linear layers in one product, whose result is the wrong point, the one that explains its
    error; "" of other points.
    """
    read = search.matched_inputs(name)
    for path, mixing in modules_of(reference.static, StaticAxisMixing):
        if not isinstance(mixing, StaticAxisMixing) or name != f"{path}.{mixing.paths[-1]}" or len(read) != 1:
            continue
        right, z = entry.match.candidate.recorded, search.matched[read[0]].candidate.recorded
        if right.grid is not None and z.grid == right.grid:
            shape = (len(z.value), *right.grid, -1)
            error = (entry.value - right.value).reshape(shape)
            layer = mixing.wrong_layer(torch.from_numpy(z.value.reshape(shape)), torch.from_numpy(error))
            return f"{path}.{layer}" if layer else ""
    return ""


def _blame_altered_input(
    suspicion: Suspicion, opened: OpenedGraph, search: TensorSearch, feeds: Feeds, found: dict[str, ProbeErrors]
) -> Suspicion:
    """The suspicion; or, where the input is right but is clipped or rounded before the module reads it, the input's
    point.

    A node that is named after the suspected module belongs to that module.
    """
    points = search.matched_inputs(suspicion.point) if suspicion.found is not None else []
    for point in points:
        match, limit = found[point].match, found[point].allowed
        made = [entry for entry in opened.altered(match.tensor) if entry[0] not in search.overrides]
        if not made or not found[point].is_right:
            continue
        values = opened.run(feeds, [tensor for tensor, _ in made], search.overrides)
        for tensor, node in made:
            if values[tensor].size != match.candidate.recorded.value.size or values[tensor].ndim < 2:
                continue
            rows = match.layout.to_rows(values[tensor], match.candidate.recorded.value.shape)
            if relative_l2(rows, match.candidate.recorded.value) <= limit:
                continue
            if owner(node) != suspicion.point and not _is_moved(rows, match, limit):
                return Suspicion(point, found[point], suspicion.seen_at, rows)
    return suspicion


def _is_moved(rows: NDArray[np.floating], match: Match, limit: float) -> bool:
    """Whether `rows` is the value in another layout: the same numbers but for rounding."""
    exact = match.candidate.recorded.value
    return relative_l2(np.sort(rows, axis=None), np.sort(exact, axis=None)) <= limit


# The result


def _suspects(location: Location) -> Iterator[Suspect]:
    named: set[str] = set()
    for suspicion in location.suspicions:
        module = location.view.points[suspicion.point].module
        if module in named:
            continue
        named.add(module)
        found = suspicion.found
        if found is not None:
            recorded = found.match.candidate.recorded
            value = found.value if suspicion.value is None else suspicion.value
            error = relative_l2(value, recorded.value) if suspicion.value is not None else found.local
            diagnosis = diagnose(recorded, value)
            yield Suspect(module, diagnosis.fault.value, _finite(error), found.allowed, diagnosis.why)
        else:
            yield _suspect_without_tensor(location, suspicion, module)


def _finite(error: float) -> float:
    return error if error == error else float("inf")


def _suspect_without_tensor(location: Location, suspicion: Suspicion, module: str) -> Suspect:
    """A module without a tensor in the graph: the error shows at the next probe point."""
    seen = location.found[suspicion.seen_at]
    why = f"No tensor of the graph stands for its output, and {suspicion.seen_at}, which follows, is wrong."
    return Suspect(module, Fault.WEIGHT.value, seen.local, seen.allowed, why)


def _modules(location: Location) -> Iterator[ModuleResult]:
    for point, found in location.found.items():
        yield ModuleResult(point, found.inherited, found.local, found.allowed, found.match.tensor)


def _unmatched(location: Location) -> Iterator[Unmatched]:
    for point in location.unmatched:
        yield Unmatched(point, "The graph has it folded into its neighbours; what follows it is right.")

"""A graph bisected: located, diagnosed, and told."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import ModelProto

from spach_deploy.validation.bisect.kinds import Diagnosis, Fault, diagnose, hypotheses
from spach_deploy.validation.bisect.locate import Location, Suspicion, locate
from spach_deploy.validation.bisect.losses import relative_l2
from spach_deploy.validation.bisect.reference import Reference
from spach_deploy.validation.bisect.result import Bisection, ModuleResult, Suspect, Unmapped

_NEAR = 0.1
"""Relative L2 up to which a tensor is what a hypothesis makes of a place."""


def bisect_graph(graph: ModelProto, reference: Reference) -> Bisection:
    """Hold every module of `graph` to the reference's. UsageError where the graph cannot be taken apart."""
    location = locate(graph, reference)
    return Bisection(tuple(_suspects(location)), tuple(_modules(location)), tuple(_unmapped(location)))


def _suspects(location: Location) -> Iterator[Suspect]:
    named: set[str] = set()
    for suspicion in location.suspicions:
        module = location.view.places[suspicion.place].module
        if module in named:
            continue
        named.add(module)
        found = suspicion.found
        if found is not None:
            diagnosis = diagnose(found.match.candidate.recorded, found.value)
            yield Suspect(module, diagnosis.fault.value, found.local, found.allowed, diagnosis.why)
        else:
            yield _hidden(location, suspicion, module)


def _hidden(location: Location, suspicion: Suspicion, module: str) -> Suspect:
    """A place that no tensor resembles: which tensor is what the module makes with one thing wrong?"""
    seen = location.found.get(suspicion.seen_at)
    error, allowed = (seen.local, seen.allowed) if seen is not None else (float("inf"), 0.0)
    diagnosis = _explained(location, suspicion)
    if diagnosis is None:
        after = suspicion.seen_at if suspicion.seen_at != suspicion.place else "what follows"
        diagnosis = Diagnosis(Fault.WEIGHT, f"No tensor of the graph resembles its output, and {after} is wrong.")
    return Suspect(module, diagnosis.fault.value, error, allowed, diagnosis.why)


def _explained(location: Location, suspicion: Suspicion) -> Diagnosis | None:
    for candidate in location.view.candidates[suspicion.place]:
        for value in location.strangers.get(suspicion.place, ()):
            for hypothesis in hypotheses(candidate.recorded, value):
                if relative_l2(value, hypothesis.value) < _NEAR:
                    return Diagnosis(hypothesis.fault, hypothesis.words)
    return None


def _modules(location: Location) -> Iterator[ModuleResult]:
    for place, found in location.found.items():
        yield ModuleResult(place, found.inherited, found.local, found.allowed, found.match.tensor)


def _unmapped(location: Location) -> Iterator[Unmapped]:
    for place in location.unmapped:
        yield Unmapped(place, "The graph has it folded into its neighbours; what follows it is right.")

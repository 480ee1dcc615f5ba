"""A graph bisected: located, diagnosed, and told."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import ModelProto

from spach_deploy.validation.bisect.kinds import Fault, diagnose
from spach_deploy.validation.bisect.locate import Location, Suspicion, locate
from spach_deploy.validation.bisect.losses import relative_l2
from spach_deploy.validation.bisect.reference import Reference
from spach_deploy.validation.bisect.result import Bisection, ModuleResult, Suspect, Unmapped


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
            recorded = found.match.candidate.recorded
            value = found.value if suspicion.value is None else suspicion.value
            error = relative_l2(value, recorded.value) if suspicion.value is not None else found.local
            diagnosis = diagnose(recorded, value)
            yield Suspect(module, diagnosis.fault.value, _finite(error), found.allowed, diagnosis.why)
        else:
            yield _hidden(location, suspicion, module)


def _finite(error: float) -> float:
    return error if error == error else float("inf")


def _hidden(location: Location, suspicion: Suspicion, module: str) -> Suspect:
    """A place without a tensor: what follows it shows it."""
    seen = location.found[suspicion.seen_at]
    why = f"No tensor of the graph stands for its output, and {suspicion.seen_at}, which follows, is wrong."
    return Suspect(module, Fault.WEIGHT.value, seen.local, seen.allowed, why)


def _modules(location: Location) -> Iterator[ModuleResult]:
    for place, found in location.found.items():
        yield ModuleResult(place, found.inherited, found.local, found.allowed, found.match.tensor)


def _unmapped(location: Location) -> Iterator[Unmapped]:
    for place in location.unmapped:
        yield Unmapped(place, "The graph has it folded into its neighbours; what follows it is right.")

"""Planted faults bisected, and what became of each."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterable, Sequence

from tests.planted.faults import Planned, Planted, planned, plant
from tests.planted.subjects import FORMS, Subject
from tests.planted.variants import Variant, variants
from tests.protos import bisect_graph


@dataclasses.dataclass(frozen=True)
class Score:
    """What a bisection said of one fault. `named`: the first suspect is the module; `told`: of the fault's kind."""

    model: str
    form: str
    module: str
    kind: str
    what: str
    size: float
    rejected: bool
    named: bool
    told: bool
    suspect: str
    seconds: float

    @property
    def is_detectable(self) -> bool:
        """Whether the fault does more than the graph's own noise."""
        return self.size >= 1.0


def chosen(subject: Subject, count: int, seed: int) -> list[Planned]:
    """`count` of a subject's faults, spread over modules: each module once before any twice; forms and kinds vary."""
    generator = random.Random(seed)
    by_module: dict[str, list[Planned]] = {}
    for form in FORMS:
        for fault in planned(subject, form):
            by_module.setdefault(fault.module, []).append(fault)
    for faults in by_module.values():
        generator.shuffle(faults)
    modules = list(by_module)
    generator.shuffle(modules)
    result: list[Planned] = []
    while len(result) < count and any(by_module.values()):
        result.extend(by_module[module].pop() for module in modules if by_module[module])
    return result[:count]


def score(subject: Subject, fault: Planned, seed: int) -> Score | None:
    """Plant and bisect; None where the fault changes nothing."""
    try:
        spoiled: Planted = plant(subject, fault, seed)
    except ValueError:
        return None
    start = time.perf_counter()
    result = bisect_graph(spoiled.graph, subject.reference)
    seconds = time.perf_counter() - start
    first = result.suspects[0] if result.suspects else None
    return Score(
        model=subject.name,
        form=fault.form,
        module=fault.module,
        kind=fault.kind,
        what=fault.what,
        size=spoiled.size,
        rejected=not result.passed,
        named=first is not None and first.module == fault.module,
        told=first is not None and first.kind == fault.kind,
        suspect="" if first is None else f"{first.module}: {first.kind}",
        seconds=seconds,
    )


@dataclasses.dataclass(frozen=True)
class VariantScore:
    """What a bisection said of a harmless variant."""

    model: str
    name: str
    rejected: bool
    suspect: str


def score_variant(subject: Subject, variant: Variant) -> VariantScore:
    """Bisect one harmless variant."""
    result = bisect_graph(variant.make(subject), subject.reference)
    suspect = f"{result.suspects[0].module}: {result.suspects[0].why}" if result.suspects else ""
    return VariantScore(subject.name, variant.name, not result.passed, suspect)


def chosen_variants(subjects: Sequence[Subject], count: int) -> Iterable[tuple[Subject, Variant]]:
    """`count` pairs, every variant with every subject in turn."""
    pairs = [(subject, variant) for variant in variants() for subject in subjects]
    return pairs[:count]

"""A sample of the faults and the harmless variants of `benchmarks.bisect`, in small models, chosen by a fixed seed."""

from __future__ import annotations

import pytest

from tests.planted.faults import Planned, planned, plant
from tests.planted.score import chosen, score, score_variant
from tests.planted.subjects import FORMS, shared
from tests.planted.variants import Variant, variants
from tests.validation import faults

SEED = 20_211_126
CLEAR = 2.0
"""Noise floors from which on a fault must be rejected here; the benchmark counts those between 1 and 2 too."""


@pytest.mark.parametrize("kind", ["hybrid", "mlp", "conv"])
def test_faults_are_rejected_and_their_modules_named(kind: str) -> None:
    subject = shared(kind)
    scores = [score(subject, fault, SEED + number) for number, fault in enumerate(chosen(subject, 9, SEED))]
    clear = [entry for entry in scores if entry is not None and entry.size >= CLEAR]
    assert len(clear) >= 6
    assert [entry for entry in clear if not entry.rejected] == []
    assert [entry for entry in clear if not entry.named] == []


SAMPLE = variants()[:: len(variants()) // 9]


@pytest.mark.parametrize("variant", SAMPLE, ids=lambda variant: variant.name)
def test_harmless_variants_are_not_rejected(variant: Variant) -> None:
    assert score_variant(shared("mlp"), variant).suspect == ""


def test_there_are_enough_of_them() -> None:
    """300 faults in three models, and 100 variants: the hybrid alone has more."""
    found = [fault for form in FORMS for fault in planned(shared("hybrid"), form)]
    assert len(found) > 300
    kinds = {"wrong weight", "wrong layout", "order of heads", "wrong epsilon", "overflow", "missing bias", "precision"}
    assert {fault.kind for fault in found} == kinds
    assert 3 * len(variants()) >= 100


def test_every_weighted_module_has_faults() -> None:
    subject = shared("hybrid")
    modules = {fault.module for form in FORMS for fault in planned(subject, form)}
    weighted = {name for name, module in subject.model.named_modules() if getattr(module, "weight", None) is not None}
    assert weighted <= modules


def test_a_fault_that_changes_nothing_is_no_fault() -> None:
    nothing = Planned("canonical", "head", "wrong weight", "nothing", lambda graph, rng, amount: None)
    with pytest.raises(ValueError, match="changes nothing"):
        plant(shared("mlp"), nothing, SEED)


def test_a_variant_that_is_not_harmless_is_none() -> None:
    def spoil(subject: object) -> object:
        graph = shared("mlp").graph("canonical")
        faults.drop_gelu(graph, next(node.name for node in graph.graph.node if node.op_type == "Gelu"))
        return graph

    with pytest.raises(ValueError, match="not harmless"):
        Variant("spoiled", "canonical", spoil).make(shared("mlp"))  # type: ignore[arg-type]

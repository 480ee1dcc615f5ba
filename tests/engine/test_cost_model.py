"""Predicted times: the formula, the cards, and plans whose arithmetic is known."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from spach_deploy.engine.cost_model import Card, cards, error_in_words, fit, in_words, predicted_ms, predicted_seconds
from spach_deploy.engine.plan_facts import KernelWork, PlanFacts, read_plan_facts
from spach_deploy.graph.editing import macs, shapes_at_batch_one
from spach_deploy.options.specs import Precision
from tests.quantization.test_paying import bundle

CARD = Card("test", "sm89", 100.0, {"fp16": 10.0, "int8": 20.0})


def test_a_kernel_takes_the_longer_of_moving_and_multiplying_and_a_start() -> None:
    moving, multiplying = KernelWork(100_000_000), KernelWork(8, 10_000_000_000, "half")
    assert predicted_seconds([moving], CARD, 0.0) == pytest.approx(1e-3)
    assert predicted_seconds([multiplying], CARD, 0.0) == pytest.approx(2e-3)
    in_eight_bits = dataclasses.replace(multiplying, dtype="int8")
    assert predicted_seconds([in_eight_bits], CARD, 0.0) == pytest.approx(1e-3)
    assert predicted_seconds([moving, multiplying], CARD, 10.0) == pytest.approx(3.02e-3)


def test_a_type_that_the_card_lacks_is_not_predicted() -> None:
    assert predicted_seconds([KernelWork(8, 8, "fp8_e4m3")], CARD) is None
    assert predicted_seconds([KernelWork(8, 0, "fp8_e4m3")], CARD) is not None


def test_the_cards_are_named_once_and_have_the_types_of_their_capability() -> None:
    names = [card.name for card in cards()]
    assert len(names) == len(set(names)) > 15
    for card in cards():
        number = int(card.capability.removeprefix("sm"))
        assert {"fp32", "fp16", "int8"} <= card.tera.keys()
        assert ("bf16" in card.tera) == (number >= 80)
        assert ("fp8" in card.tera) == (number >= 89)
        assert card.tera["fp32"] < card.tera["fp16"] < card.tera["int8"]
    assert {card.capability for card in cards(["sm89", "sm90"])} == {"sm89", "sm90"}


def test_predictions_are_called_that_with_their_error() -> None:
    assert in_words({"L4": 4.229, "L40S": 1.0}, 8) == "predicted, not measured, at batch 8: L4 4.23 ms"
    assert in_words({}, 8) == ""
    found = fit()
    assert 0 < found.least <= found.median <= found.most
    assert f"{found.least:.1f} to {found.most:.1f} times as long" in error_in_words()


needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


def facts(path: Path) -> PlanFacts:
    found = read_plan_facts((path / "engine.plan").read_bytes())
    assert found is not None
    return found


@needs_rtx
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8, Precision.FP8], ids=["fp16", "int8", "fp8"])
def test_the_schedules_arithmetic_is_the_graphs(precision: Precision) -> None:
    import onnx_ir as ir

    made = bundle(precision)
    model = ir.load(str(made.path / "model.onnx"))
    for batch in (1, 4):
        work = facts(made.path).work(batch)
        assert work is not None
        expected = batch * macs(model, shapes_at_batch_one(model))
        assert sum(kernel.macs for kernel in work) == pytest.approx(expected, rel=0.01)
        assert sum(kernel.bytes for kernel in work) == facts(made.path).bytes_moved(batch)


@needs_rtx
def test_a_bundle_has_predictions_for_the_cards_that_its_plan_is_for() -> None:
    made = bundle(Precision.FP16)
    kernels = made.manifest.engine.kernels
    assert kernels is not None
    assert kernels.predicted_ms == predicted_ms(facts(made.path), ["sm89"], 2)
    assert kernels.predicted_ms.keys() == {card.name for card in cards(["sm89"])}
    assert all(time > 0 for time in kernels.predicted_ms.values())

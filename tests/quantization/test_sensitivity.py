"""What a layer costs, predicted for all at once, against what it costs when it is measured alone."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import nn

from spach_deploy.quantization.fake_quantization import fake_quantized
from spach_deploy.quantization.formats import INT8
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.quantization.sensitivity import LayerCost, LayerWatch, largest_set, summed_costs
from tests.quantization import small_models


@functools.cache
def example() -> tuple[nn.Module, QuantizationPlan]:
    return small_models.static("hybrid"), small_models.plan("hybrid", INT8)


def logits(model: nn.Module, images: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(torch.from_numpy(images))
    return result


def measured(modules: set[str]) -> float:
    static, plan = example()
    images = small_models.inputs()
    chosen = dataclasses.replace(plan, sites=tuple(site for site in plan.sites if site.module in modules))
    exact, rounded = logits(static, images), logits(fake_quantized(static, chosen), images)
    return float(((rounded - exact).norm(dim=1) / exact.norm(dim=1)).square().mean().sqrt())


def costs_of(static: nn.Module, plan: QuantizationPlan) -> tuple[LayerCost, ...]:
    watch = LayerWatch(static, plan)
    return summed_costs(plan, [watch.see(number, image[None]) for number, image in enumerate(small_models.inputs())])


def test_predicted_costs_are_those_of_layers_quantized_alone() -> None:
    static, plan = example()
    costs = costs_of(static, plan)
    assert [cost.module for cost in costs] == [site.module for site in plan.sites]
    dearest = sorted(costs, key=lambda cost: -cost.rel_l2)[:5]
    for cost in dearest:
        assert cost.rel_l2 == pytest.approx(measured({cost.module}), rel=0.6), cost.module


def test_squares_of_costs_add_up_to_that_of_all_layers() -> None:
    static, plan = example()
    costs = costs_of(static, plan)
    total = float(np.sqrt(sum(cost.rel_l2**2 for cost in costs)))
    assert total == pytest.approx(measured({cost.module for cost in costs}), rel=0.5)


def test_the_model_is_left_as_it_was() -> None:
    static, plan = example()
    before = logits(static, small_models.inputs())
    costs_of(static, plan)
    assert torch.equal(before, logits(static, small_models.inputs()))
    assert not any(module._forward_hooks for module in static.modules())


COSTS = tuple(LayerCost(f"layer{index}", 0.001 * (index + 1), 1000) for index in range(16))


def from_squares(kept: frozenset[str]) -> float:
    return float(np.sqrt(sum(cost.rel_l2**2 for cost in COSTS if cost.module not in kept)))


@pytest.mark.parametrize("bound", [0.002, 0.01, 0.02, 0.03])
def test_the_fewest_layers_are_left_in_float(bound: float) -> None:
    choice = largest_set(COSTS, bound, from_squares, "relative L2")
    assert choice.holds
    assert from_squares(frozenset(choice.kept_float)) == choice.measured <= bound
    assert from_squares(frozenset(choice.kept_float[:-1])) > bound
    assert choice.evaluations <= 7


def test_nothing_is_left_in_float_where_everything_fits() -> None:
    choice = largest_set(COSTS, 1.0, from_squares, "relative L2")
    assert (choice.kept_float, choice.evaluations) == ((), 1)


def test_a_bound_that_nothing_keeps_is_said() -> None:
    choice = largest_set(COSTS, 0.01, lambda kept: 0.5, "relative L2")
    assert not choice.holds
    assert len(choice.kept_float) == len(COSTS)


def test_a_large_layer_is_kept_in_eight_bits_before_a_small_one_of_the_same_cost() -> None:
    costs = (LayerCost("small", 0.01, 10), LayerCost("large", 0.01, 1000))
    assert largest_set(costs, 0.012, lambda kept: 0.014 - 0.004 * len(kept), "x").kept_float == ("small",)

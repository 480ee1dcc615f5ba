"""What each quantized layer costs, and the largest set of layers that stays within a bound.

Cheaper than one evaluation a layer, by two tricks. Locally, a layer's error d on the right input is known from running
that one layer twice. What becomes of it in the logits is, to first order, J d, with the Jacobian J of all that stands
behind the layer; and for a random normal vector u, the mean of (u^T J d)^2 is |J d|^2 (Hutchinson, 1990). Now u^T J is
what one backward pass from u^T logits leaves at the layer, and the same pass leaves it at every layer. So `PROBES`
backward passes an image give the cost of all layers at once, however many there are. Errors of different layers are
independent, so their squares add up; the choice made from them is then measured, all layers together, and only that
decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spach_deploy.quantization.fake_quantization import equalized_model, quantized_module
from spach_deploy.quantization.formats import Float32
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.rewrites.static_modules import StaticSpach

PROBES = 2
"""Backward passes an image. With eight images a layer's squared cost is known to a third, enough for an order."""

_SEED = 1990


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer adds. `rel_l2`: expected relative L2 of the logits with it alone quantized; `macs`: its size."""

    module: str
    rel_l2: float
    macs: int

    @property
    def per_mac(self) -> float:
        """Squared relative L2 for a multiplication saved, by which layers are given up."""
        return self.rel_l2**2 / max(self.macs, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


Squares = tuple[tuple[str, float], ...]
"""What one image says of modules: squared relative errors in the order in which they were found."""


def summed_costs(plan: QuantizationPlan, found: Iterable[Squares]) -> tuple[LayerCost, ...]:
    """Costs from what `LayerWatch.see` gave for each image, added up in the images' order."""
    squares = {site.module: 0.0 for site in plan.sites}
    images = 0
    for entries in found:
        images += 1
        for module, square in entries:
            squares[module] += square
    return tuple(
        LayerCost(site.module, float(np.sqrt(squares[site.module] / (images * PROBES))), site.macs)
        for site in plan.sites
    )


class LayerWatch:
    """Hooks on every quantized layer: its own error on the way forward, what the logits feel on the way back."""

    def __init__(self, static: StaticSpach, plan: QuantizationPlan) -> None:
        self._model = equalized_model(static, plan)
        self._squares: list[tuple[str, float]] = []
        self._norm = 1.0
        modules = dict(self._model.named_modules(remove_duplicate=False))
        for site in plan.sites:
            layer = modules[site.module]
            layer.register_forward_hook(self._hook(site.module, quantized_module(layer, site, plan.form)))

    def see(self, number: int, image: Float32) -> Squares:
        """The image (3, S, S) with this number; its random vectors are its own, whoever sees the others."""
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self._squares = []
        logits = self._model(torch.from_numpy(image[None].copy()).requires_grad_(True))
        self._norm = float(logits.detach().square().sum())
        generator = torch.Generator().manual_seed(_SEED)
        drawn = [torch.randn(logits.shape, generator=generator) for _ in range((number + 1) * PROBES)]
        for probe, u in enumerate(drawn[number * PROBES :], 1):
            (logits * u).sum().backward(retain_graph=probe < PROBES)
        return tuple(self._squares)

    def _hook(self, path: str, quantized: nn.Module) -> Callable[[nn.Module, Any, Tensor], None]:
        def forward(module: nn.Module, inputs: Any, output: Tensor) -> None:
            with torch.no_grad():
                error = quantized(inputs[0]) - output

            def backward(gradient: Tensor) -> None:
                self._squares.append((path, float((gradient * error).sum()) ** 2 / self._norm))

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward


@dataclasses.dataclass(frozen=True)
class LayerSelection:
    """Which layers stay in float so that the bound holds. `measured` is of the chosen set, by what was bounded."""

    costs: tuple[LayerCost, ...]
    kept_float: tuple[str, ...]
    bound: float
    measured: float
    everything: float
    evaluations: int
    measure: str

    @property
    def holds(self) -> bool:
        """Whether the bound holds."""
        return self.measured <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON for the manifest: the layers from the dearest on."""
        kept = set(self.kept_float)
        ordered = sorted(self.costs, key=lambda cost: -cost.rel_l2)
        return {
            "measure": self.measure,
            "bound": self.bound,
            "measured": self.measured,
            "all_quantized": self.everything,
            "evaluations": self.evaluations,
            "layers": [{**cost.to_dict(), "kept_float": cost.module in kept} for cost in ordered],
        }


def largest_set(
    costs: Sequence[LayerCost], bound: float, measure: Callable[[frozenset[str]], float], what: str
) -> LayerSelection:
    """The fewest layers left in float, dearest for their size first, with which `measure` is at most `bound`.

    `measure` takes the modules left in float. More of them in float is taken to measure less, so the number is found by
    bisection: log2(layers) evaluations. With all of them in float and the bound still broken, the choice says so.
    """
    order = [cost.module for cost in sorted(costs, key=lambda cost: -cost.per_mac)]
    seen: dict[int, float] = {}

    def at(count: int) -> float:
        if count not in seen:
            seen[count] = measure(frozenset(order[:count]))
        return seen[count]

    low, high = 0, len(order)
    if at(0) > bound:
        first = _predicted(costs, order, bound, at(0))
        low, high = (0, first) if at(first) <= bound else (first, len(order))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if at(middle) <= bound else (middle, high)
    else:
        high = 0
    return LayerSelection(tuple(costs), tuple(order[:high]), bound, at(high), seen[0], len(seen), what)


def _predicted(costs: Sequence[LayerCost], order: Sequence[str], bound: float, everything: float) -> int:
    """Where the bound should be reached if squares add up: a good place to begin."""
    squares = {cost.module: cost.rel_l2**2 for cost in costs}
    left = total = sum(squares.values())
    for count, module in enumerate(order, 1):
        left -= squares[module]
        if left <= total * (bound / everything) ** 2:
            return min(count, len(order) - 1) if len(order) > 1 else 1
    return len(order)

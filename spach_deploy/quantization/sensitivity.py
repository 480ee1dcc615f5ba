"""Sensitivity: how much error each quantized layer adds, and the most layers that can be quantized within a bound.

The costs of all layers are estimated at once, by `PROBES` backward passes for each image:

1. A layer's own error d, for the right input, is its rounded output minus its output.
2. To first order it changes the logits by J d, with the Jacobian J of everything after the layer. For a random normal
   vector u, the mean of (u^T J d)^2 is |J d|^2 (Hutchinson, 1990).
3. u^T J is the gradient of u^T logits at the layer's output, and one backward pass gives it for every layer.

Errors of different layers are independent, so their squares add up. That gives an order of the layers. The error of the
chosen set is then measured, with all its layers quantized, and only the measured error must be within the bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spach_deploy.bundle.inputs import Batch, arrays_of
from spach_deploy.quantization.fake_quantization import equalized_model, quantized_module
from spach_deploy.quantization.plan import QuantizationPlan

PROBES = 2
"""Backward passes for each image. With eight images a layer's squared cost is known within a third: enough to rank."""

_SEED = 1990


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Cost of one layer. `rel_l2`: estimated relative L2 of the logits with only this layer quantized. `macs`: its
    multiplications for one image.
    """

    module: str
    rel_l2: float
    macs: int

    @property
    def per_mac(self) -> float:
        """Squared relative L2 for each multiplication that is quantized. Layers with the highest
        stay in float first.
        """
        return self.rel_l2**2 / max(self.macs, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


Squares = tuple[tuple[str, float], ...]
"""(module, squared relative error of the logits) of one image, one entry for each layer and probe."""


def summed_costs(plan: QuantizationPlan, found: Iterable[Squares]) -> tuple[LayerCost, ...]:
    """Costs of all layers of `plan` from the results of `LayerWatch.see`, one for each image, in the images' order."""
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
    """The model with hooks on every layer of `plan`: forward they compute its error d, backward u^T J d."""

    def __init__(self, static: nn.Module, plan: QuantizationPlan) -> None:
        self._model = equalized_model(static, plan)
        self._squares: list[tuple[str, float]] = []
        self._norm = 1.0
        modules = dict(self._model.named_modules(remove_duplicate=False))
        for site in plan.sites:
            layer = modules[site.module]
            layer.register_forward_hook(self._hook(site.module, quantized_module(layer, site, plan.form)))

    def see(self, number: int, image: Batch) -> Squares:
        """Squared relative errors for one image, float32 (1, 3, S, S), or inputs with it.

        The random vectors depend on `number`, the image's index, alone, so processes may share the images.
        """
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self._squares = []
        given = [torch.from_numpy(array.copy()) for array in arrays_of(image)]
        made = self._model(*(x.requires_grad_(True) if x.is_floating_point() else x for x in given))
        logits = made[0] if isinstance(made, tuple) else made  # of several outputs the first
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
    """Which layers stay in float so that the measured error is within the bound.

    `measured`: error with `kept_float` in float; `everything`: error with all layers quantized; `measure`: which error
    that is, in words; `evaluations`: how often it was measured.
    """

    costs: tuple[LayerCost, ...]
    kept_float: tuple[str, ...]
    bound: float
    measured: float
    everything: float
    evaluations: int
    measure: str

    @property
    def holds(self) -> bool:
        """Whether the measured error is within the bound."""
        return self.measured <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON for the manifest; layers in descending order of cost."""
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
    """Leave as few layers in float as keep `measure` at most `bound`; those with the highest cost per MAC first.

    `measure` gets the modules that stay in float and returns the error; `what` names it. More layers in float are
    assumed to lower the error, so their number is found by bisection, in log2(layers) evaluations. If the error is
    above the bound with all layers in float, `holds` of the result is False.
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
    """The number of layers in float at which the bound is reached if squared costs add up: where bisection begins."""
    squares = {cost.module: cost.rel_l2**2 for cost in costs}
    left = total = sum(squares.values())
    for count, module in enumerate(order, 1):
        left -= squares[module]
        if left <= total * (bound / everything) ** 2:
            return min(count, len(order) - 1) if len(order) > 1 else 1
    return len(order)

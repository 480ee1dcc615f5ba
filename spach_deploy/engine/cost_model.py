"""Predicted time of an engine plan on a card, from the plan's own schedule and public figures of the card.

Every kernel takes the longer of moving its bytes and doing its products, at the card's peaks, and a start:

    sum over kernels of max(bytes / bandwidth, 2 macs / peak of its type) + start

That is a roofline (Williams et al., 2009) by kernel, and a prediction, not a measurement: no kernel reaches the peaks,
and caches save some of the bytes. `Fit` says how far it was off where it could be checked (`benchmarks/cost_model.py`).
Two plans of one card are compared by it, rather than the seconds of one taken at their word. `cards.json` has the
figures.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from spach_deploy.common.files import read_json
from spach_deploy.engine.plan_facts import KernelWork, PlanFacts

_FILE = Path(__file__).with_name("cards.json")
_TYPES = {"half": "fp16", "float": "fp32", "fp8_e4m3": "fp8"}
"""Names of cards.json for TensorRT's."""


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU. `tera`: peak operations per second by data type, in 10^12. `usual`: shown where room is short."""

    name: str
    capability: str
    bandwidth_gb_s: float
    tera: Mapping[str, float]
    usual: bool = False


@dataclasses.dataclass(frozen=True)
class Fit:
    """How many times the predicted time was measured, where that could be checked: least, median and most."""

    where: str
    least: float
    median: float
    most: float


@dataclasses.dataclass(frozen=True)
class _Table:
    cards: tuple[Card, ...]
    kernel_start_us: float
    fit: Fit


@functools.cache
def _table() -> _Table:
    content = read_json(_FILE)
    cards = tuple(Card(**entry) for entry in content["cards"])
    return _Table(cards, content["kernel_start_us"], Fit(**content["fit"]))


def cards(capabilities: Collection[str] | None = None) -> tuple[Card, ...]:
    """The known cards, or those of these capabilities (`sm89`)."""
    return tuple(card for card in _table().cards if capabilities is None or card.capability in capabilities)


def fit() -> Fit:
    """How far predictions were off."""
    return _table().fit


def predicted_seconds(work: Iterable[KernelWork], card: Card, start_us: float | None = None) -> float | None:
    """The time of kernels that run one after another; None where the card has no such type. `start_us`: of one kernel,
    that of a GPU by default.
    """
    start = (_table().kernel_start_us if start_us is None else start_us) * 1e-6
    total = 0.0
    for kernel in work:
        peak = card.tera.get(_TYPES.get(kernel.dtype, kernel.dtype)) if kernel.macs else 1.0
        if peak is None:
            return None
        total += start + max(kernel.bytes / (card.bandwidth_gb_s * 1e9), 2 * kernel.macs / (peak * 1e12))
    return total


def error_in_words() -> str:
    """One sentence on how far predictions are off."""
    found = fit()
    return (
        "Times are predicted, not measured: the least that the plan's schedule takes at a card's peaks. On"
        f" {found.where} it took {found.least:.1f} to {found.most:.1f} times as long, {found.median:.1f} in the median."
    )


def predicted_ms(facts: PlanFacts, capabilities: Collection[str], batch: int) -> dict[str, float]:
    """By card of these capabilities: the predicted time of one inference of `batch` images; empty where it is not
    known.
    """
    work = facts.work(batch)
    found = {} if work is None else {card.name: predicted_seconds(work, card) for card in cards(capabilities)}
    return {name: round(1000 * seconds, 3) for name, seconds in found.items() if seconds is not None}


def in_brief(predicted: Mapping[str, float]) -> str:
    """The prediction for one usual card in few words; empty without any."""
    name = next(iter(_shown(predicted)), None)
    return "" if name is None else f"{name} {predicted[name]:.2f} ms"


def _shown(predicted: Mapping[str, float]) -> list[str]:
    return [card.name for card in cards() if card.name in predicted and card.usual] or list(predicted)[:4]


def in_words(predicted: Mapping[str, float], batch: int | None) -> str:
    """One line on predictions; empty without any."""
    times = ", ".join(f"{name} {predicted[name]:.2f} ms" for name in _shown(predicted))
    if not times:
        return ""
    return f"predicted, not measured, at batch {batch}: {times}"

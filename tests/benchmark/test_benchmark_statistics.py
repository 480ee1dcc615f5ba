from __future__ import annotations

import math

import numpy as np
import pytest

from spach_deploy.benchmark.result import WIDEST, Latency, Ratio, ratio


def test_quantiles_are_given_only_where_the_runs_can_tell_them() -> None:
    assert Latency.of([3.0, 1.0, 2.0]) == Latency(3, 2.0, None, None)
    ten = Latency.of([float(i) for i in range(1, 11)])
    assert (ten.p90, ten.p99) == (9.0, None)
    hundred = Latency.of([float(i) for i in range(1, 101)])
    assert (hundred.median, hundred.p90, hundred.p99) == (50.5, 90.0, 99.0)


def test_what_slows_a_whole_round_cancels() -> None:
    found = ratio([1.0, 5.0, 0.5, 2.0], [3.0, 15.0, 1.5, 6.0])
    assert found is not None
    assert found.value == pytest.approx(3)
    assert found.high / found.low == pytest.approx(1)
    assert found.is_conclusive


def test_rounds_that_disagree_are_not_told() -> None:
    found = ratio([1.0, 1.0, 1.0], [2.0, 3.0, 1.2])
    assert found is not None
    assert not found.is_conclusive
    assert found.to_dict()["value"] is None
    assert found.low < math.prod([2.0, 3.0, 1.2]) ** (1 / 3) < found.high


def test_a_wide_interval_around_one_cannot_tell_which_is_faster() -> None:
    assert not Ratio(1.08, 0.97, 1.2).is_conclusive
    assert Ratio(1.08, 1.01, 1.2).is_conclusive
    assert Ratio(1.0, 0.97, 1.04).to_dict() == {"value": 1.0, "low": 0.97, "high": 1.04, "told": True, "same": True}


def test_one_round_tells_nothing() -> None:
    assert ratio([1.0], [2.0]) is None


@pytest.mark.parametrize("rounds", [3, 5, 30])
def test_the_interval_holds_the_truth_nineteen_times_in_twenty(rounds: int) -> None:
    random = np.random.default_rng(rounds)
    held = 0
    for _ in range(2000):
        own, other = random.lognormal(0, 0.05, rounds), random.lognormal(math.log(2), 0.05, rounds)
        found = ratio(list(own), list(other))
        assert found is not None
        held += found.low <= 2 <= found.high
    assert 0.93 <= held / 2000 <= 0.97
    assert WIDEST > 1

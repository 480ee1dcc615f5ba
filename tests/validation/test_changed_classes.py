from __future__ import annotations

import numpy as np

from spach_deploy.validation.accuracy import MOST_CLOSE, MOST_FLIPS, notable_predictions

REFERENCE = np.array([[5.0, 1.0, 0.0], [2.0, 1.9, 0.0], [0.0, 3.0, 1.0]], np.float32)


def test_flips_come_with_both_sets_of_best_classes_the_surest_first() -> None:
    candidate = REFERENCE.copy()
    candidate[1] = [1.8, 1.9, 0.0]
    candidate[2] = [0.0, 1.0, 3.5]
    found = notable_predictions(REFERENCE, candidate, ["a", "b", "c"])
    assert [(answer.name, answer.flipped) for answer in found] == [("c", True), ("b", True)]
    surest = found[0]
    assert [ranked.index for ranked in surest.reference] == [1, 2, 0]
    assert [ranked.index for ranked in surest.candidate] == [2, 1, 0]
    assert (surest.reference_margin, surest.candidate_margin) == (2.0, 2.5)
    assert abs(sum(ranked.probability for ranked in surest.candidate) - 1) < 1e-12


def test_without_a_flip_the_smallest_margins_come_first() -> None:
    found = notable_predictions(REFERENCE, REFERENCE + np.float32(0.5), ())
    assert [answer.image for answer in found] == [1, 2, 0]
    assert [round(answer.reference_margin, 3) for answer in found] == [0.1, 2.0, 4.0]
    assert not any(answer.flipped for answer in found)


def test_classes_that_the_reference_scores_alike_are_no_flip() -> None:
    alike = np.array([[1.0, 1.0, 0.0]], np.float32)
    assert not notable_predictions(alike, np.array([[1.0, 1.1, 0.0]], np.float32), ["a"])[0].flipped


def test_only_so_many_are_shown() -> None:
    many = np.tile(np.array([[1.0, 0.0]], np.float32), (100, 1))
    assert len(notable_predictions(many, many[:, ::-1], ())) == MOST_FLIPS
    assert len(notable_predictions(many, many, ())) == MOST_CLOSE


def test_what_cannot_be_ranked_gives_none() -> None:
    not_finite = REFERENCE.copy()
    not_finite[0, 0] = np.inf
    for candidate in (None, REFERENCE[:2], not_finite):
        assert notable_predictions(REFERENCE, candidate, ()) == ()
    assert notable_predictions(REFERENCE[:, :1], REFERENCE[:, :1], ()) == ()


def test_half_precision_is_ranked_too() -> None:
    assert len(notable_predictions(REFERENCE, REFERENCE.astype(np.float16), ())) == 3

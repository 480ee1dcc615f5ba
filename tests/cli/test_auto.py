"""spach-export --auto: candidates side by side, one recommendation, the reasons in words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from spach_deploy.bundle.store import Bundle
from spach_deploy.options.specs import Precision
from spach_deploy.pipeline.auto import PrecisionCandidate, as_table, judge_candidates, pareto
from tests import small_bundles
from tests.commands import export, refusal
from tests.quantization.small_quantized import calibration_images

SMALL = ("--model", small_bundles.NAME, "--image-size", small_bundles.SIZE, "--num-classes", small_bundles.CLASSES)


def candidate(precision: Precision, rel_l2: float, kernels: int, moved: int, plan: int) -> PrecisionCandidate:
    return PrecisionCandidate(precision, Path(precision.value), rel_l2, 1.0, kernels, moved, plan)


HALF = candidate(Precision.FP16, 1e-3, 158, 1371, 142)
INT8 = candidate(Precision.INT8, 1.5e-2, 194, 1396, 87)
FP8 = candidate(Precision.FP8, 5e-2, 180, 1300, 88)


def test_half_is_recommended_where_eight_bits_need_more_kernels_and_the_reason_says_so() -> None:
    found = judge_candidates((HALF, INT8, FP8), None)
    assert found.chosen is HALF
    assert any("194 kernels against 158" in reason for reason in found.reasons)
    assert any("stopwatch" in reason for reason in found.reasons)


def test_what_is_lighter_in_all_that_is_known_wins() -> None:
    lighter = candidate(Precision.INT8, 1.5e-2, 150, 1000, 87)
    assert judge_candidates((HALF, lighter), None).chosen is lighter


def predicted(entry: PrecisionCandidate, l4: float, rtx_3060: float) -> PrecisionCandidate:
    return dataclasses.replace(entry, batch=8, predicted_ms={"L4": l4, "RTX 3060": rtx_3060})


def test_what_is_predicted_to_be_faster_on_every_card_wins() -> None:
    half, eight, other = predicted(HALF, 4.0, 8.0), predicted(INT8, 3.5, 7.0), predicted(FP8, 3.0, 6.0)
    found = judge_candidates((half, eight), None)
    assert found.chosen is eight, "although it has more kernels and moves more"
    assert (
        "int8 is predicted to take 88% of the time of fp16, the mean over 2 cards, and less on each" in found.reasons[0]
    )
    assert "Times are predicted, not measured" in found.reasons[-1]
    assert judge_candidates((half, eight, other), None).chosen is other
    assert "predicted, not measured, at batch 8: RTX 3060 7.00 ms, L4 3.50 ms" in as_table(found)


def test_what_is_predicted_to_be_slower_on_one_card_is_not_recommended() -> None:
    half, eight = predicted(HALF, 4.0, 8.0), predicted(INT8, 4.2, 5.0)
    found = judge_candidates((half, eight), None)
    assert found.chosen is half
    assert any("int8 is predicted to take 62% to 105% of the time of fp16, by card" in why for why in found.reasons)


def test_a_bound_leaves_out_what_passes_it() -> None:
    lighter = candidate(Precision.INT8, 1.5e-2, 150, 1000, 87)
    found = judge_candidates((HALF, lighter), 0.01)
    assert found.chosen is HALF
    assert any("more than 0.01" in reason for reason in found.reasons)
    assert judge_candidates((HALF, lighter), 1e-4).exit_code == 1


def test_the_pareto_front_leaves_out_what_is_beaten_in_everything() -> None:
    worse = candidate(Precision.FP8, 2e-2, 200, 1400, 90)
    assert pareto((HALF, INT8, worse)) == (HALF, INT8)


def test_candidates_become_bundles_and_a_table(tmp_path: Path) -> None:
    arguments = (*SMALL, "--auto", "--calibration", calibration_images(), "--engine", "none", "--json")
    with small_bundles.registered():
        result = export(*arguments, "-o", tmp_path)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [entry["precision"] for entry in found["candidates"]] == ["fp16", "int8", "fp8"]
    assert found["recommended"] == "fp16"
    assert found["candidates"][0]["rel_l2"] < found["candidates"][1]["rel_l2"] < found["candidates"][2]["rel_l2"]
    for precision in ("fp16", "int8", "fp8"):
        assert Bundle.open(tmp_path / precision).manifest.precision.asked == precision


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ((), "need images to calibrate on"),
        (("--fp16", "--calibration", "x"), "--auto chooses the precision, and --fp16 does too"),
    ],
)
def test_contradictions_are_refused(more: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    assert reason in refusal(export("--model", "ms_conv_xxs", "--auto", *more, "-o", tmp_path / "out"))

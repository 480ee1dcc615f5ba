"""The table at 80 columns, and the report, from results made by hand."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from spach_deploy.common.errors import UsageError
from spach_deploy.common.files import Destination
from spach_deploy.options.specs import OutputSpec
from spach_deploy.validation.accuracy import Accuracy, paired
from spach_deploy.validation.compare import compare_outputs
from spach_deploy.validation.result import MissingEngineRun, ReportHeader, Validation, write_report
from spach_deploy.validation.runs import EvaluationSet, Level, RunResult
from spach_deploy.validation.table import as_text
from spach_deploy.validation.tolerance import Bounds
from spach_deploy.validation.verdict import Tolerance, judge
from tests.outputs import classifier, of_logits

NAMES = ("a.jpg", "an exceedingly long name of a photograph taken in the summer of last year.jpg")
REFERENCE = np.array([[3.0, 2.99, 0.0, 1.0, 0.5, 0.2, 0.1], [0.0, 4.0, 0.0, 1.0, 0.5, 0.2, 0.1]], np.float32)
BOUNDS = Bounds(
    {"logits": Tolerance(0.01, 0.1, 0.99, 0.05, "by hand"), "top_values": Tolerance(0.01)}, {"sentence": "by hand"}
)


def evidence(logits: np.ndarray, level: Level = Level.GRAPH) -> RunResult:
    outputs = OutputSpec(top_k=2)
    comparison = compare_outputs(of_logits(REFERENCE, outputs), of_logits(logits, outputs), image_names=NAMES)
    return RunResult(
        level, "typed graph in ONNX Runtime", (1, 7), comparison, BOUNDS, judge(comparison, BOUNDS.outputs)
    )


def accuracy(candidate: np.ndarray, max_drop: float | None = None) -> Accuracy:
    measured = paired(REFERENCE, candidate, [0, 1])
    return Accuracy(measured, "typed graph in ONNX Runtime", "a folder of a very long name " * 4, max_drop, ("Noted.",))


def validation(*items: RunResult, is_demo: bool = False, missing: bool = False) -> Validation:
    eval_set = EvaluationSet(
        lambda start, stop: REFERENCE[start:stop],
        {"logits": REFERENCE},
        NAMES,
        "photographs",
        "PyTorch in FP32",
        classifier(7),
    )
    why = MissingEngineRun("no NVIDIA GPU here", "an NVIDIA GPU with tensorrt 10.16") if missing else None
    subject = ReportHeader("bundle/model.onnx", "ms_hybrid_s", "fp16", is_demo)
    return Validation(subject, eval_set, items, missing_engine_run=why)


FLIPPED = REFERENCE + np.array([[-0.01, 0.01] + [0.0] * 5, [0.0] * 7], np.float32)
WRONG = REFERENCE * np.float32(1.5)


@pytest.mark.parametrize("logits", [REFERENCE, FLIPPED, WRONG, np.full_like(REFERENCE, np.nan)])
def test_it_fits_eighty_columns(logits: np.ndarray) -> None:
    text = as_text(validation(evidence(logits), evidence(logits), is_demo=True, missing=True))
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [60, 72, 100])
def test_a_narrow_terminal_loses_nothing_and_a_wide_one_is_used(width: int) -> None:
    found = dataclasses.replace(validation(evidence(FLIPPED), evidence(WRONG)), accuracy=accuracy(FLIPPED))
    usual, other = as_text(found), as_text(found, width=width)
    assert 50 < max(map(len, other.splitlines())) <= width
    assert sorted(re.findall(r"\d\S*", other)) == sorted(re.findall(r"\d\S*", usual))
    assert "…" not in other


def test_a_flip_within_its_margin_is_shown_and_passes() -> None:
    found = validation(evidence(FLIPPED))
    text = as_text(found)
    assert found.passed
    assert "1 of 2" in text
    assert "0 to 1, margin" in text
    assert "rank 0: 1 for 0" in text
    assert "AGREED" in text


def test_a_difference_is_told_with_its_image_and_bound() -> None:
    found = validation(evidence(WRONG))
    text = " ".join(as_text(found).split())
    assert found.exit_code == 1
    assert "DID NOT AGREE" in text
    assert "relative L2 is 0.5 in image" in text
    assert "0.01 is allowed (by hand)" in text
    assert "relative L2 is 0.5" in found.failure()


def test_a_second_run_takes_a_line_per_output_unless_it_alone_disagrees() -> None:
    agreed = as_text(validation(evidence(REFERENCE), evidence(REFERENCE)))
    first = as_text(validation(evidence(WRONG), evidence(WRONG)))
    second = as_text(validation(evidence(REFERENCE), evidence(WRONG)))
    assert agreed.count("relative L2, worst image") == first.count("relative L2, worst image") == 2
    assert second.count("relative L2, worst image") == 4
    assert "x Output" in second


def test_demo_weights_are_said_first() -> None:
    assert as_text(validation(evidence(REFERENCE), is_demo=True)).startswith("DEMO WEIGHTS")
    assert "DEMO" not in as_text(validation(evidence(REFERENCE)))


def test_colour_only_when_asked() -> None:
    assert "\x1b[" in as_text(validation(evidence(REFERENCE)), color=True)


@pytest.mark.parametrize("logits", [REFERENCE, FLIPPED, np.roll(REFERENCE, 3, axis=1), REFERENCE[:, :4]])
def test_accuracy_stands_below_the_comparison(logits: np.ndarray) -> None:
    measured = paired(REFERENCE[:, : logits.shape[1]], logits, [0, 1])
    found = dataclasses.replace(validation(evidence(REFERENCE)), accuracy=Accuracy(measured, "graph", "l.txt"))
    text = as_text(found)
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"top-1 +100.00% +\d+.00% +\d+.00 +-?\d+.\d\d to \d+.\d\d", text)
    assert (" top-5  " in text) is (logits.shape[1] > 5)
    assert "With 2 images a drop below" in text
    assert text.index("images that change class") < text.index("2 labelled images") < text.index("AGREED")
    assert found.exit_code == 0


def test_a_drop_beyond_the_allowed_is_exit_1_and_no_disagreement(tmp_path: Path) -> None:
    within = dataclasses.replace(validation(evidence(FLIPPED)), accuracy=accuracy(FLIPPED, 50.0))
    beyond = dataclasses.replace(validation(evidence(FLIPPED)), accuracy=accuracy(FLIPPED, 49.9))
    assert (within.exit_code, beyond.exit_code) == (0, 1)
    text = " ".join(as_text(beyond).split())
    assert "x Top-1 accuracy falls by 50.00 points (95 % interval of the drop -48.64 to 90.55 points)" in text
    assert "AGREED with PyTorch in FP32, but LOST MORE ACCURACY than --max-drop allows." in text
    assert "Noted." in text
    write_report(beyond, Destination.of(tmp_path / "report.json"))
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["passed"] is False
    assert "more than the 49.9 that --max-drop allows" in content["findings"][0]
    assert content["accuracy"]["drop_points"] == 50
    assert content["accuracy"]["interval"][0] < 0 < content["accuracy"]["interval"][1]


def test_both_faults_are_told(tmp_path: Path) -> None:
    found = dataclasses.replace(validation(evidence(WRONG)), accuracy=accuracy(FLIPPED, 1.0))
    text = as_text(found)
    assert "DID NOT AGREE" in text
    assert "x Top-1 accuracy falls" in text


def test_levels_and_exit_codes() -> None:
    graph, engine = evidence(REFERENCE), evidence(REFERENCE, Level.ENGINE)
    assert validation(graph).exit_code == 0
    assert validation(graph, missing=True).exit_code == 3
    assert validation(engine, graph).level is Level.ENGINE
    assert validation(engine, graph).exit_code == 0
    assert validation(evidence(WRONG), missing=True).exit_code == 1


def test_no_evidence_is_no_pass() -> None:
    assert validation().exit_code == 1
    assert "Nothing was compared" in validation().failure()


def test_the_report_is_json_whatever_was_found(tmp_path: Path) -> None:
    for logits in (REFERENCE, WRONG, np.full_like(REFERENCE, np.inf)):
        write_report(validation(evidence(logits)), Destination.of(tmp_path / "report.json"))
        content = json.loads((tmp_path / "report.json").read_text())
        assert content["passed"] is (logits is REFERENCE)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_report_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(validation(evidence(REFERENCE)), Destination.of(tmp_path / "nowhere" / "report.json"))

"""The table of runtimes: an answer that is wrong, missing or not finite is not right, and a crash costs one graph."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.consumers.__main__ import judged, question
from benchmarks.consumers.page import page
from benchmarks.consumers.runtimes import Answer, answers, reason
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, Bundle
from spach_deploy.graph.runtimes import problem_of
from spach_deploy.options.specs import Precision
from tests import small_bundles

CRASHING = """
import json, os, sys
print(json.dumps({"version": "1"}), flush=True)
for line in sys.stdin:
    graph = json.loads(line)["graph"]
    for batch in (1, 8):
        if (graph, batch) == ("b", 8):
            os.abort()
        print(json.dumps({"graph": graph, "batch": batch, "logits": [[1.0]]}), flush=True)
"""


def test_a_runtime_that_crashes_at_a_graph_runs_those_behind_it() -> None:
    found = answers([sys.executable, "-c", CRASHING], [{"graph": name} for name in "abc"])
    assert [(line["graph"], line["batch"]) for line in found] == [
        *(("a", 1), ("a", 8), ("b", 1), ("b", 0), ("c", 1), ("c", 8)),
    ]
    assert "ended with -6" in str(found[3]["error"])


def test_a_client_that_leaves_a_graph_out_or_does_not_start_is_an_error() -> None:
    quiet = [sys.executable, "-c", "import sys; print('{}'); sys.stdin.read()"]
    with pytest.raises(SystemExit, match="left a out"):
        answers(quiet, [{"graph": "a"}])
    with pytest.raises(SystemExit, match="no such runtime"):
        answers([sys.executable, "-c", "raise SystemExit('no such runtime')"], [{"graph": "a"}])


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(small_bundles.copy(small_bundles.bundle(Precision.FP32), tmp_path / "bundle"), verify=False)


def run_of(bundle: Bundle, logits: object, batch: int = 1) -> Answer:
    return {"graph": "g", "batch": batch, "logits": logits}


def test_an_answer_is_judged_by_its_worst_image(bundle: Bundle) -> None:
    right = Golden.load(bundle.file(GOLDEN)).outputs["logits"]
    wrong = right.copy()
    wrong[-1] *= 1.5
    assert judged(bundle, [run_of(bundle, right.tolist())]) == 0
    both = [run_of(bundle, right.tolist()), run_of(bundle, wrong.tolist(), len(right))]
    assert judged(bundle, both) == pytest.approx(0.5)
    assert "relative L2 is 5.0e-01" in problem_of(judged(bundle, both), 1e-3)


def test_numbers_that_are_not_finite_a_lacking_image_and_an_error_are_words(bundle: Bundle) -> None:
    right = Golden.load(bundle.file(GOLDEN)).outputs["logits"].tolist()
    nan = [[None, *right[0][1:]], *right[1:]]  # as JSON of JavaScript has it
    assert "not finite" in str(judged(bundle, [run_of(bundle, nan)]))
    assert "shape" in str(judged(bundle, [run_of(bundle, right[1:])]))
    failed: list[Answer] = [run_of(bundle, right), {"graph": "g", "batch": 8, "error": "no memory"}]
    assert judged(bundle, failed) == "at 8 images at once: no memory"


def test_a_client_gets_the_golden_images(bundle: Bundle) -> None:
    asked = json.loads(json.dumps(question(bundle)))
    images = np.fromfile(asked["images"], np.float32).reshape(asked["shape"])
    assert np.array_equal(images, Golden.load(bundle.file(GOLDEN)).input)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from /a/model.onnx failed:/src/core/graph/model.cc:179"
            " onnxruntime::Model::Model(onnx::ModelProto&&, const Options&) Unsupported model IR version: 10, max 9\n",
            "Unsupported model IR version: 10, max 9",
        ),
        ("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no Conv(22) node with name 'stem/Conv'", "no Conv(22)"),
        (
            "Exception from src/core.cpp:121:\nFrontEnd API failed with GeneralFailure:\nErrors during translation:\n"
            "While validating A: FrontEnd API failed with GeneralFailure:\nWrong scale: f16\n"
            "While validating B: FrontEnd API failed with GeneralFailure:\nRank not known\n",
            "Wrong scale: f16",
        ),
        (
            "OpenCV(5.0.0) /io/dnn/graph.cpp:2213: error: (-210:Unsupported format or combination of formats)"
            " Unsupported data type:  in function 'getMatFromTensor'\n",
            "Unsupported data type:",
        ),
        ("", "refused without words"),
    ],
    ids=["onnxruntime", "no kernel", "openvino", "opencv", "nothing"],
)
def test_a_runtimes_words_are_shown_without_its_places(said: str, shown: str) -> None:
    assert reason(said) == shown


def test_the_page_tells_refused_from_some_that_are_right() -> None:
    names = ("a", "b")
    usual = {"form": "cpu", "precision": "fp32", "opset": 20, "ir": 9, "allowed": 1e-3}
    graphs = {name: {**usual, "family": name} for name in names}
    told = {"right": (0.0, 1e-4), "refused": ("too new", "too new"), "1 of 2": (0.0, 1e-2), "0 of 2": (1.0, "too new")}
    for cell, found in told.items():
        runtime = {"name": "R", "version": "1", "answers": dict(zip(names, found, strict=True))}
        text = page({"graphs": graphs, "runtimes": [runtime], "read": "2026-11-30"})
        assert f"| R 1 | {cell} |" in text
        assert ("- R 1, fp32: too new" in text) == (cell == "refused")

"""What users see stays what it was, until a recording of it is made anew; and what differs is said."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from benchmarks.recordings.__main__ import load, save
from benchmarks.recordings.cases import CHECKPOINT, QUICK, cases
from benchmarks.recordings.differences import compared
from benchmarks.recordings.inputs import make_inputs
from benchmarks.recordings.readings import plain, read_graph, read_json
from benchmarks.recordings.recorder import TERMINAL, Done, portable, record
from benchmarks.recordings.weights import write
from tests.commands import ROOT, entry_points

RECORDED = ROOT / "tests" / "recordings" / "quick.json"
AGAIN = "python -m benchmarks.recordings tests/recordings/quick.json --quick"


def in_process(command: Sequence[str], folder: Path) -> Done:
    module, _, function = entry_points()[command[0]].partition(":")
    main = getattr(importlib.import_module(module), function)
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
        main(command[1:], prog_name=command[0])
    return Done(int(end.value.code or 0), out.getvalue(), errors.getvalue())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_inputs(tmp_path)
    write(str(tmp_path / CHECKPOINT))
    monkeypatch.chdir(tmp_path)
    for name, value in TERMINAL.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def test_commands_do_what_was_recorded(folder: Path) -> None:
    new = {case.name: portable(record(case, in_process, folder, {})) for case in cases(QUICK)}
    assert compared(load(RECORDED), new) == {}, f"If that is meant: {AGAIN}"


def graph(name: str = "scale", value: float = 2.0, doc: str = "") -> ModelProto:
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3]) for n in ("input", "output")]
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [1], [value])
    shift = helper.make_tensor("shift", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("Mul", ["input", "scale"], ["scaled"], name=name),
        helper.make_node("Add", ["scaled", "shift"], ["output"], name="add", doc_string=doc),
    ]
    tensors = [shift, scale] if doc else [scale, shift]
    return helper.make_model(helper.make_graph(nodes, "graph", [infos[0]], [infos[1]], tensors))


def differing(tmp_path: Path, new: ModelProto) -> list[str]:
    """What is said where `graph()` was recorded and `new` is there now."""
    found = []
    for model in (graph(), new):
        onnx.save(model, tmp_path / "model.onnx")
        found.append({"case": {"graphs": {"model.onnx": read_graph(tmp_path / "model.onnx", {})}}})
    return compared(*found).get("case", [])


def test_the_same_graph_in_other_bytes_is_told_from_another_graph(tmp_path: Path) -> None:
    assert differing(tmp_path, graph()) == []
    assert differing(tmp_path, graph(doc="it adds")) == [
        "graph model.onnx: other bytes, of the same nodes, initializers and interface",
        "graph model.onnx: other doc strings",
    ]
    assert "graph model.onnx node + factor: Mul(input, scale) -> (scaled)" in differing(tmp_path, graph("factor"))
    changed = "graph model.onnx: 1 of 2 initializers differ (scale), means by up to 5.0e-01"
    assert differing(tmp_path, graph(value=3.0))[-1] == changed


def test_keys_values_lines_and_exit_codes_are_compared() -> None:
    text = '{"layers": [{"asked": "fp16", "seconds": 1.5}, {"asked": "fp16"}], "count": 3}'
    old = {"case": {"command": "c", "exit code": 0, "stdout": ["a", "b"], "json": read_json(text, {})}}
    text = '{"layers": [{"asked": "int8", "seconds": 2.5}, {"asked": "int8"}], "more": 4}'
    new = {"case": {"command": "c", "exit code": 1, "stdout": ["a", "c"], "json": read_json(text, {})}}
    assert compared(old, new) == {
        "case": [
            "exit code: 0 -> 1",
            "stdout -b",
            "stdout +c",
            "json count: gone, was 3",
            "json layers/[]/asked: 'fp16' -> 'int8' (and 1 more)",
            "json more: new, 4",
        ]
    }


def test_measured_figures_times_and_versions_are_left_out() -> None:
    text = "built in /a/b at 2026-11-29T10:00:00+00:00 by torch 2.13.0+cpu: 15.8 MB, 3.5e-07 of 7 kernels, batch 1:8:32"
    wanted = "built in HERE at TIME by torch VERSION: # MB, # of 7 kernels, batch 1:8:32"
    assert " ".join(plain(text, {"/a/b": "HERE"}, figures=True).split()) == wanted
    assert "15.8 MB" in plain(text, {}, figures=False)
    assert plain("a\nCalibrating: image 3 of 16, 4 s left.\nb\n", {}, figures=False) == "a\nb\n"


def test_a_recording_is_a_folder_or_a_file(tmp_path: Path) -> None:
    for place in (tmp_path / "folder", tmp_path / "file.json"):
        save("one", {"exit code": 0}, place)
        save("two", {"exit code": 2}, place)
        assert load(place) == {"one": {"exit code": 0}, "two": {"exit code": 2}}

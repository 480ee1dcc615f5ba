"""The benchmark for GPUs, rehearsed on the CPU: the same code, fewer cells; what only a GPU does, against a fake."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import runtime_gpu
from benchmarks.gpu import report
from benchmarks.gpu.cells import CELLS, Cell, cell_named, why_not
from benchmarks.gpu.runners import engine_batches

SMALL = ["--device", "cpu", "--model", "conv_xxs", "--image-size", "32", "--batches", "1,2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a whole rehearsal."""
    made = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        assert run(made) == 0
    return made


def run(folder: Path, *words: str) -> int:
    return runtime_gpu.main([*SMALL, "--folder", str(folder), "--output", str(folder / "RESULTS.md"), *words])


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Cells in this process, which has loaded torch, and hardly timed."""

    def measured(cell: Cell, arguments: Any, limit_s: float) -> dict[str, Any]:
        return runtime_gpu.measure(cell, arguments)

    patch.setattr(runtime_gpu, "TURN_S", 0.01)
    patch.setattr(runtime_gpu, "_in_a_process", measured)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def test_a_rehearsal_measures_what_a_cpu_can_and_says_what_not(folder: Path) -> None:
    state = json.loads((folder / runtime_gpu.STATE).read_text())
    assert set(state["cells"]) == {cell.name for cell in CELLS}
    timed = {name for name, cell in state["cells"].items() if cell.get("seconds")}
    graphs = {cell.name for cell in CELLS if cell.runner == "onnxruntime"}
    assert timed == {"eager/fp32"} | graphs
    for name in timed:
        assert state["cells"][name]["error"] <= state["cells"][name]["allowed"]
        assert set(state["cells"][name]["seconds"]) == {"1", "2"}
    page = (folder / "RESULTS.md").read_text()
    assert "our graph over the plain one, onnxruntime fp16: " in page
    assert "TensorRT over torch.compile, fp16: not measured (compile/fp16: needs a GPU)" in page
    assert "share of the roofline at batch 2: " in page


def test_what_is_done_is_not_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> dict[str, Any]:
        raise AssertionError("measured again")

    monkeypatch.setattr(runtime_gpu, "TURN_S", 0.01)
    monkeypatch.setattr(runtime_gpu, "_in_a_process", never)
    assert run(folder) == 0


def test_without_time_cells_are_left_out_by_name_and_come_later(folder: Path, quick: None, tmp_path: Path) -> None:
    state = json.loads((folder / runtime_gpu.STATE).read_text())
    del state["cells"]["eager/fp32"]
    (folder / runtime_gpu.STATE).write_text(json.dumps(state))
    run(folder, "--minutes", "-1")
    page = (folder / "RESULTS.md").read_text()
    assert "- eager/fp32: left out: no time" in page
    run(folder)
    assert "left out" not in (folder / "RESULTS.md").read_text()


def test_a_cell_runs_in_a_process_of_its_own(folder: Path) -> None:
    arguments = runtime_gpu.arguments_of([*SMALL, "--folder", str(folder)])
    found = runtime_gpu._in_a_process(cell_named("onnxruntime/ours/fp32"), arguments, 100)
    assert set(found["seconds"]) == {"1", "2"}
    assert runtime_gpu._in_a_process(cell_named("onnxruntime/ours/fp32"), arguments, 0.01) == {
        "problem": "left out: no time"
    }
    arguments.folder = folder / "nowhere"
    assert "No such file" in runtime_gpu._in_a_process(cell_named("onnxruntime/ours/fp32"), arguments, 100)["problem"]


def test_a_wrong_cell_is_not_timed(folder: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = runtime_gpu.arguments_of([*SMALL, "--folder", str(folder)])
    monkeypatch.setattr(runtime_gpu, "_host", lambda answer: 1.1 * np.asarray(answer))
    found = runtime_gpu.measure(cell_named("onnxruntime/ours/fp32"), arguments)
    assert found["problem"] == "wrong: not timed"
    assert found["seconds"] == {}


@pytest.mark.parametrize(
    ("cell", "capability", "installed", "reason"),
    [
        ("tensorrt/ours/fp16", (9, 0), {"tensorrt-rtx"}, "does not support data-centre Hopper"),
        ("tensorrt/ours/fp16", (9, 0), {"tensorrt"}, ""),
        ("tensorrt/ours/fp16", (8, 9), {"tensorrt-rtx"}, ""),
        ("tensorrt/ours/fp16", (8, 9), set(), "neither tensorrt nor tensorrt-rtx"),
        ("onnxruntime/ours/fp16", (9, 0), set(), "pip install onnxruntime-gpu"),
        ("cuda-graphs/fp16", (9, 0), set(), ""),
    ],
)
def test_why_a_cell_cannot_run_on_a_gpu(
    cell: str, capability: tuple[int, int], installed: set[str], reason: str
) -> None:
    assert why_not(cell_named(cell), "cuda", capability, frozenset(installed)).count(reason) >= 1
    assert bool(why_not(cell_named(cell), "cuda", capability, frozenset(installed))) == bool(reason)


def test_goals_are_met_or_not_by_the_weakest_batch(folder: Path) -> None:
    seconds = {"tensorrt/plain/fp16": (2.0, 2.4), "tensorrt/ours/fp16": (1.0, 2.2), "compile/fp16": (4.0, 4.0)}
    cells = {name: {"seconds": dict(zip("12", times, strict=True))} for name, times in seconds.items()}
    peaks = {"fp16": 1e9, "bytes": 1e9}
    lines = list(report.goals(cells, peaks, folder / "ours-fp16.onnx", [1, 2]))
    assert lines[0].endswith("2.00 at batch 1, 1.09 at batch 2; goal 1.15 NOT MET")
    assert any(line.startswith("TensorRT over torch.compile") and line.endswith("goal 1.5 met") for line in lines)
    assert "by tensorrt/ours/fp16" in lines[-1]


class Engine:
    """As TensorRT's: doubles what lies at the input's address into the output's."""

    names = ("input", "logits")
    num_io_tensors = 2

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()

    def create_execution_context(self) -> Engine:
        return self

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return type("Mode", (), {"name": "INPUT" if name == "input" else "OUTPUT"})

    def get_tensor_dtype(self, name: str) -> Any:
        return type("DataType", (), {"name": "FLOAT"})

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        count = int(np.prod(self.shape))
        read, write = ((ctypes.c_float * count).from_address(self.addresses[name]) for name in self.names)
        for index in range(count):
            write[index] = 2 * read[index]
        return True


def test_an_engine_is_fed_through_torchs_memory() -> None:
    stream: Callable[[], int] = lambda: 7  # noqa: E731
    set_batch = engine_batches(Engine(), torch.device("cpu"), stream)
    images = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    np.testing.assert_array_equal(set_batch(images)().numpy(), 2 * images)
    np.testing.assert_array_equal(set_batch(images[:, :1])().numpy(), 2 * images[:, :1])


@pytest.mark.gpu
def test_a_gpu_runs_the_cells_that_it_can(tmp_path: Path) -> None:
    words = ["--model", "conv_xxs", "--image-size", "32", "--batches", "1,8", "--folder", str(tmp_path)]
    assert runtime_gpu.main([*words, "--output", str(tmp_path / "RESULTS.md")]) == 0

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spach_deploy.common.errors import MismatchError, MissingPackageError, UnavailableError, UsageError
from spach_deploy.runtime import Runner, TensorSpec
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner

W = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)


def graph(path: Path, *, batch: int | str = "batch", operator: str = "MatMul", kind: int = TensorProto.FLOAT) -> Path:
    inputs = ["x", "w"] if operator == "MatMul" else ["x"]
    node = helper.make_node(operator, inputs, ["y"], "node")
    width = 2 if operator == "MatMul" else 4
    made = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, [batch, 4])],
        [helper.make_tensor_value_info("y", kind, [batch, width])],
        [numpy_helper.from_array(W, "w")] if operator == "MatMul" else [],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def x(batch: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((batch, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def _needs_onnxruntime() -> None:
    pytest.importorskip("onnxruntime")


def test_runs_any_batch_from_a_path_or_from_bytes(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx")
    for model in (path, path.read_bytes()):
        with OnnxRuntimeRunner(model, threads=1, max_batch=3) as runner:
            checked: Runner = runner
            assert checked.input_specs == {"x": TensorSpec("float32", (None, 4))}
            assert checked.output_specs == {"y": TensorSpec("float32", (None, 2))}
            np.testing.assert_allclose(checked.run({"x": x(7)})["y"], x(7) @ W, rtol=1e-5, atol=1e-6)


def test_a_fixed_batch_is_filled_and_split(tmp_path: Path) -> None:
    with OnnxRuntimeRunner(graph(tmp_path / "g.onnx", batch=2), threads=1) as runner:
        np.testing.assert_allclose(runner.run({"x": x(5)})["y"], x(5) @ W, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimization", ["none", "basic", "extended", "all"])
def test_every_optimization_level_gives_the_same(tmp_path: Path, optimization: Any) -> None:
    with OnnxRuntimeRunner(graph(tmp_path / "g.onnx"), threads=1, optimization=optimization) as runner:
        np.testing.assert_allclose(runner.run({"x": x(2)})["y"], x(2) @ W, rtol=1e-5, atol=1e-6)


def test_wrong_feeds_are_refused(tmp_path: Path) -> None:
    with OnnxRuntimeRunner(graph(tmp_path / "g.onnx")) as runner, pytest.raises(MismatchError, match="ONNX Runtime"):
        runner.run({"images": x(1)})


@pytest.mark.parametrize("content", [b"", b"a text file", bytes(range(256)) * 4])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.onnx does not load"), OnnxRuntimeRunner(path):
        pass


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not load"), OnnxRuntimeRunner(tmp_path / "absent.onnx"):
        pass


def test_a_node_without_cpu_kernel_is_unavailable_and_not_wrong(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx", operator="Erf", kind=TensorProto.BFLOAT16)
    with pytest.raises(UnavailableError, match="no CPU kernel"), OnnxRuntimeRunner(path):
        pass


def test_an_absent_package_names_its_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with (
        pytest.raises(MissingPackageError, match=r"pip install 'spach-deploy\[cpu\]'"),
        OnnxRuntimeRunner(graph(tmp_path / "g.onnx")),
    ):
        pass

"""Small ONNX graphs that the real compiler builds in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DTYPES: dict[str, tuple[int, Any]] = {
    "fp32": (TensorProto.FLOAT, np.float32),
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
WIDTH = 64


def weights(*shape: int, dtype: str = "fp16", seed: int = 0) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[0])
    typed: np.ndarray[Any, Any] = values.astype(DTYPES[dtype][1])
    return typed


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    initializers: dict[str, np.ndarray[Any, Any]] | None = None,
    domain: str | None = None,
) -> Path:
    opsets = [helper.make_opsetid("", 23)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in (initializers or {}).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def mlp(path: Path, dtype: str = "fp16", *, batch: int | str = "batch", middle: str | None = None) -> Path:
    """x (batch, 64) fp32 -> two linear layers in `dtype` with a GELU between -> y fp32. `middle`: type of fc2."""
    kind, second = DTYPES[dtype][0], middle or dtype
    nodes = [
        helper.make_node("Cast", ["x"], ["x_typed"], "cast_in", to=kind),
        helper.make_node("MatMul", ["x_typed", "w1"], ["h"], "block.fc1"),
        helper.make_node("Gelu", ["h"], ["g"], "block.act"),
        helper.make_node("Cast", ["g"], ["g_typed"], "cast_middle", to=DTYPES[second][0]),
        helper.make_node("MatMul", ["g_typed", "w2"], ["z"], "block.fc2"),
        helper.make_node("Cast", ["z"], ["y"], "cast_out", to=TensorProto.FLOAT),
    ]
    shape: list[Any] = [batch, WIDTH]
    values = {"w1": weights(WIDTH, WIDTH, dtype=dtype), "w2": weights(WIDTH, WIDTH, dtype=second, seed=1)}
    return save(path, nodes, {"x": (TensorProto.FLOAT, shape)}, {"y": (TensorProto.FLOAT, shape)}, values)


def attention(path: Path) -> Path:
    """q, k, v from one projection of tokens (batch, 16, 64) in fp16, four heads; decomposed, as exporters write it."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["qkv"], "attn.qkv"),
        helper.make_node("Reshape", ["qkv", "heads"], ["r"], "attn.split_heads"),
        helper.make_node("Transpose", ["r"], ["t"], "attn.transpose", perm=[0, 2, 1, 3]),
        helper.make_node("Split", ["t"], ["q", "k", "v"], "attn.split", axis=1, num_outputs=3),
        helper.make_node("Transpose", ["k"], ["kt"], "attn.kt", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], "attn.scores"),
        helper.make_node("Softmax", ["scores"], ["p"], "attn.softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"], "attn.values"),
    ]
    values = {"w": weights(64, 192), "heads": np.array([0, 16, 12, 16], np.int64)}
    fp16 = TensorProto.FLOAT16
    return save(path, nodes, {"x": (fp16, ["batch", 16, 64])}, {"y": (fp16, ["batch", 4, 16, 16])}, values)


def unknown_operator(path: Path) -> Path:
    node = helper.make_node("Strange", ["x"], ["y"], "block.odd", domain="com.example")
    return save(path, [node], _pair(), _pair("y"), domain="com.example")


def types_that_do_not_meet(path: Path) -> Path:
    node = helper.make_node("Add", ["x", "c"], ["y"], "block.add")
    return save(path, [node], _pair(), _pair("y"), {"c": np.ones(4, np.float32)})


def attention_that_crashes_the_compiler(path: Path) -> Path:
    """An ONNX Attention in FP32: TensorRT for RTX 1.7.1 ends with a segmentation fault on it."""
    node = helper.make_node("Attention", ["x", "x", "x"], ["y"], "block.attention")
    shape = ["batch", 2, 16, 32]
    return save(path, [node], {"x": (TensorProto.FLOAT, shape)}, {"y": (TensorProto.FLOAT, shape)})


def two_dynamic_extents(path: Path) -> Path:
    node = helper.make_node("Relu", ["x"], ["y"], "block.relu")
    shape = ["batch", "tokens"]
    return save(path, [node], {"x": (TensorProto.FLOAT16, shape)}, {"y": (TensorProto.FLOAT16, shape)})


def _pair(name: str = "x") -> dict[str, tuple[int, list[Any]]]:
    return {name: (TensorProto.FLOAT16, ["batch", 4])}

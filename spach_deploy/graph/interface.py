"""What a caller sends and gets: pixels in, probabilities and top-k out, as graph nodes around the model.

--io-dtype uint8   input (B, H, W, 3) uint8 RGB pixels; scale, mean and standard deviation are in the graph
--softmax          output `probabilities` (B, classes) float32
--top-k K          outputs `top_values` (B, K) float32 and `top_indices` (B, K) int64, ranked by logit
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from spach_deploy.common.errors import UsageError
from spach_deploy.graph.edit import constant, mark_float32
from spach_deploy.graph.export import BATCH, INPUT, LOGITS
from spach_deploy.options.specs import IODtype, OutputSpec, Preprocessing

PROBABILITIES, TOP_VALUES, TOP_INDICES = "probabilities", "top_values", "top_indices"


def add_interface(model: ModelProto, outputs: OutputSpec, preprocessing: Preprocessing) -> None:
    """Add what `outputs` asks for to the canonical FP32 graph, in place."""
    if outputs.io_dtype is IODtype.UINT8:
        _take_pixels(model, preprocessing)
    classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    check_outputs(outputs, classes)
    if outputs.softmax:
        _add_softmax(model, classes)
    if outputs.top_k is not None:
        _add_top_k(model, outputs.top_k, classes)


def check_outputs(outputs: OutputSpec, classes: int) -> None:
    """UsageError for more best classes than there are."""
    k = outputs.top_k
    if k is not None and not 1 <= k <= classes:
        raise UsageError(f"--top-k {k} of {classes} classes does not exist.", f"Give a number from 1 to {classes}.")


def _take_pixels(model: ModelProto, preprocessing: Preprocessing) -> None:
    """uint8 (B, H, W, 3) -> (x - 255 mean) / (255 std) -> (B, 3, H, W), in FP32: pixels are not exact in half."""
    graph, size = model.graph, preprocessing.image_size
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    graph.initializer.append(constant("io.offset", (255.0 * mean).astype(np.float32)))
    graph.initializer.append(constant("io.scale", (1.0 / (255.0 * std)).astype(np.float32)))
    for node in graph.node:
        node.input[:] = ["io/normalized" if name == INPUT else name for name in node.input]
    nodes = [
        _node("Cast", [INPUT], "io/float", to=TensorProto.FLOAT),
        _node("Sub", ["io/float", "io.offset"], "io/centred"),
        _node("Mul", ["io/centred", "io.scale"], "io/scaled"),
        _node("Transpose", ["io/scaled"], "io/normalized", perm=[0, 3, 1, 2]),
    ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*(mark_float32(node) for node in nodes[:3]), nodes[3], *rest])
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [BATCH, size, size, 3]))


def _add_softmax(model: ModelProto, classes: int) -> None:
    model.graph.node.append(mark_float32(_node("Softmax", [LOGITS], "io/Softmax", PROBABILITIES, axis=-1)))
    model.graph.output.append(helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, [BATCH, classes]))


def _add_top_k(model: ModelProto, k: int, classes: int) -> None:
    graph = model.graph
    graph.initializer.append(constant("io.top_k", np.array([k], np.int64)))
    node = helper.make_node("TopK", [LOGITS, "io.top_k"], [TOP_VALUES, TOP_INDICES], name="io/TopK", axis=-1)
    graph.node.append(mark_float32(node))
    graph.output.append(helper.make_tensor_value_info(TOP_VALUES, TensorProto.FLOAT, [BATCH, k]))
    graph.output.append(helper.make_tensor_value_info(TOP_INDICES, TensorProto.INT64, [BATCH, k]))


def _node(op_type: str, inputs: list[str], name: str, output: str = "", **options: Any) -> NodeProto:
    return helper.make_node(op_type, inputs, [output or name], name=name, **options)

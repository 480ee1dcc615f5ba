"""Static PyTorch model -> FP32 ONNX graph: torch.onnx.export, onnxsim, node names by module, symbolic batch.

Two things save time, and neither changes the graph:

- Only one block of each kind is traced and simplified; its nodes are repeated with the other blocks' weights
  (`block_prototype.py`).
- The batch is traced as a fixed number and made symbolic afterwards (`free_batch`), because torch.onnx takes twice the
  time with a symbolic one. The static model has the batch first in every tensor and states it in reshapes only.

The result is compared with PyTorch at several batch sizes, like any other graph.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from onnx import ModelProto

from spach_deploy.common.errors import CertificateError
from spach_deploy.graph.block_prototype import Prototype, block_of, make_prototype, stamp_blocks, with_ordinary_weights
from spach_deploy.graph.editing import array_of, as_proto, name_of
from spach_deploy.graph.names import name_by_module
from spach_deploy.graph.passes.block_boundaries import restore_block_boundaries
from spach_deploy.options.specs import OPSET

if TYPE_CHECKING:
    from torch import nn


INPUT, LOGITS, BATCH = "input", "logits", "batch"
_TRACED_BATCH = 3


def free_batch(model: ir.Model, traced: int, name: str) -> None:
    """Make the batch of a graph symbolic, in place, that was traced with the fixed batch `traced`.

    The first input and the outputs get the symbolic dimension `name` first; reshapes to (traced * n, ...) become
    reshapes to (-1, ...). Raises CertificateError for a reshape whose first extent is no multiple of `traced`, or that
    has a -1 already.
    """
    graph = model.graph
    for value in (*graph.inputs[:1], *graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([name, *value.shape[1:]])
    for node in graph:
        shape = node.inputs[1] if node.op_type == "Reshape" else None
        extents = array_of(shape)
        if shape is not None and extents is not None and extents[0] > 0:
            freed = np.array(_freed(extents.tolist(), traced, name_of(node)), np.int64)
            shape.const_value = ir.Tensor(freed, name=shape.name)


def _freed(shape: list[int], traced: int, node: str) -> list[int]:
    if shape[0] % traced or -1 in shape:
        raise CertificateError(f"{node} reshapes to {shape}, from which the batch cannot be told.")
    return [-1, *shape[1:]]


def export_canonical(model: nn.Module, image_size: int) -> ir.Model:
    """ONNX graph of `model`: input (batch, 3, S, S) float32 -> logits (batch, classes) float32, opset 20.

    S is `image_size` in pixels, and the batch is symbolic. The initializers share the memory of the model's parameters.
    Raises CertificateError for a graph whose batch cannot be made symbolic, whose blocks cannot be repeated, or that
    onnxsim computes differently.
    """
    prototype = make_prototype(model)
    return stamp_blocks(_traced(prototype, image_size), prototype.repeats, model)


def _traced(prototype: Prototype, image_size: int) -> ir.Model:
    """The prototype's graph, named by modules and simplified. Its blocks' weights are graph inputs, after the first."""
    ordinary = with_ordinary_weights(prototype)
    exported = _exported(ordinary.model, image_size)
    _as_inputs(exported.graph, prototype.repeats)
    name_by_module(exported)
    model = ir.from_proto(simplify(as_proto(exported)))
    restore_block_boundaries(model, is_grid=ordinary.model.grid_stream)
    return model


def _exported(model: nn.Module, image_size: int) -> ir.Model:
    """The graph that torch.onnx makes of `model`, with a symbolic batch."""
    example = torch.zeros(_TRACED_BATCH, 3, image_size, image_size)
    with _quiet_exporter():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[LOGITS],
            verbose=False,
        )
    assert program is not None
    free_batch(program.model, _TRACED_BATCH, BATCH)
    return program.model


def _as_inputs(graph: ir.Graph, blocks: Collection[str]) -> None:
    """Turn the float weights of `blocks` from initializers into graph inputs, in place.

    They are most of the bytes, and the simplifier would copy them several times. Nothing may be folded into them
    either.
    """
    for name, value in list(graph.initializers.items()):
        if value.dtype == ir.DataType.FLOAT and value.shape and block_of(name, blocks) is not None:
            graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)


def simplify(model: ModelProto) -> ModelProto:
    """`model` after onnxsim's constant folding and fusions. Raises CertificateError when onnxsim reports a
    difference.
    """
    import onnxsim

    simplified, equal = onnxsim.simplify(model, check_n=0)
    if not equal:
        raise CertificateError("onnxsim's simplified graph differs from the exported one.")
    result: ModelProto = simplified
    return result


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence torch.onnx's progress and its warnings about packages that are not needed; errors still show."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

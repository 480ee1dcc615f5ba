"""Static model -> canonical FP32 ONNX: torch.onnx, onnxsim, names of modules, certificate.

The exporter's time grows with the number of blocks, and blocks of one shape differ in nothing but their weights. So one
block of each kind is exported (the prototype), simplified, and stamped once per block with that block's own weights
(`stamp.py`). What comes out is what a whole export would give, and it is compared with PyTorch like any other graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator

import torch
from onnx import ModelProto

from spach_deploy.errors import CertificateError
from spach_deploy.onnx_graph.free_batch import free_batch
from spach_deploy.onnx_graph.names import name_by_module
from spach_deploy.onnx_graph.passes.block_boundaries import restore_block_boundaries
from spach_deploy.onnx_graph.prototype import Prototype, make_prototype, structure, with_ordinary_weights
from spach_deploy.onnx_graph.stamp import forget_weights, stamp_blocks
from spach_deploy.rewrites.static_modules import StaticSpach
from spach_deploy.runtime.pages import small_pages

OPSET = 20
INPUT, LOGITS, BATCH = "input", "logits", "batch"
_TRACED_BATCH = 3


@dataclasses.dataclass(frozen=True)
class Traced:
    """The graph of a prototype's `structure`, serialized, without the weights of its blocks."""

    structure: str
    graph: bytes = dataclasses.field(repr=False)


def export_canonical(model: StaticSpach, image_size: int, traced: Traced | None = None) -> ModelProto:
    """ONNX graph of `model`: input (batch, 3, S, S) float32 -> logits (batch, classes) float32, opset 20.

    `traced` is taken where it is of this very structure. Raises CertificateError when the exporter or the simplifier
    fails.
    """
    prototype = make_prototype(model)
    if traced is None or traced.structure != structure(prototype):
        traced = trace(prototype, image_size)
    return stamp_blocks(ModelProto.FromString(traced.graph), prototype.repeats, model)


def trace(prototype: Prototype, image_size: int) -> Traced:
    """The prototype's graph: named by modules, simplified. It may be `without_weights`."""
    ordinary = with_ordinary_weights(prototype)
    exported = torch_export(ordinary.model, image_size)
    name_by_module(exported)
    graph = simplify(exported)
    restore_block_boundaries(graph, is_grid=ordinary.model.grid_stream)
    forget_weights(graph, prototype.repeats)
    return Traced(structure(prototype), graph.SerializeToString())


def torch_export(model: StaticSpach, image_size: int) -> ModelProto:
    """torch.onnx's own graph of `model`, every block traced."""
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
    proto: ModelProto = program.model_proto
    free_batch(proto, _TRACED_BATCH, BATCH)
    return proto


def simplify(model: ModelProto) -> ModelProto:
    """onnxsim's constant folding and fusions; CertificateError when its own check fails."""
    import onnxsim

    with small_pages():
        simplified, equal = onnxsim.simplify(model, check_n=0)
    if not equal:
        raise CertificateError("onnxsim's simplified graph differs from the exported one.")
    result: ModelProto = simplified
    return result


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter prints its progress and warns about packages we do not need; errors still come through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

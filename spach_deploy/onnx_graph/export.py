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
from collections import OrderedDict
from collections.abc import Iterator

import torch
from onnx import ModelProto
from torch import nn

from spach_deploy.errors import CertificateError
from spach_deploy.onnx_graph.free_batch import free_batch
from spach_deploy.onnx_graph.names import name_by_module
from spach_deploy.onnx_graph.passes.block_boundaries import restore_block_boundaries
from spach_deploy.onnx_graph.stamp import stamp_blocks
from spach_deploy.rewrites.base import own
from spach_deploy.rewrites.static_modules import StaticBlock, StaticSpach
from spach_deploy.runtime.pages import small_pages

OPSET = 20
INPUT, LOGITS, BATCH = "input", "logits", "batch"
_TRACED_BATCH = 3


@dataclasses.dataclass(frozen=True)
class Prototype:
    """A model with one block of each kind, and for each the blocks it stands for (itself first)."""

    model: StaticSpach
    repeats: dict[str, tuple[str, ...]]


def export_canonical(model: StaticSpach, image_size: int) -> ModelProto:
    """ONNX graph of `model`: input (batch, 3, S, S) float32 -> logits (batch, classes) float32, opset 20.

    Raises CertificateError when the exporter or the simplifier fails.
    """
    prototype = make_prototype(model)
    exported = torch_export(prototype.model, image_size)
    name_by_module(exported)
    simplified = simplify(exported)
    restore_block_boundaries(simplified, is_grid=model.stem.grid_stream)
    return stamp_blocks(simplified, prototype.repeats, model)


def make_prototype(model: StaticSpach) -> Prototype:
    """Keep the first of every run of blocks that differ in weights alone, with weights that have no special values.

    Real weights may be zeros, ones or equal to each other, and optimizers act on that: what is true of one block's
    weights would be stamped on all.
    """
    result = StaticSpach(model.stem, model.norm1, model.norm2, model.head)
    repeats: dict[str, list[str]] = {}
    generator = torch.Generator().manual_seed(0)
    for stage in model.stage_names:
        kept: OrderedDict[str, nn.Module] = OrderedDict()
        previous, representative = "", ""
        for index, layer in getattr(model, stage)._modules.items():
            kind = block_kind(layer) if isinstance(layer, StaticBlock) else ""
            path = f"{stage}.{index}"
            if kind and kind == previous:
                repeats[representative].append(path)
                continue
            kept[index] = _with_ordinary_weights(layer, generator) if kind else layer
            if kind:
                representative = path
                repeats[path] = [path]
            previous = kind
        result.add_stage(stage, nn.Sequential(kept))
    return Prototype(result.eval(), {name: tuple(blocks) for name, blocks in repeats.items()})


def _with_ordinary_weights(block: nn.Module, generator: torch.Generator) -> nn.Module:
    twin = own(block)
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.rand(parameter.shape, generator=generator) + 0.5
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
    return twin


def block_kind(block: StaticBlock) -> str:
    """What a block's graph depends on beside its weights."""
    mixer = "conv" if block.spatial_func is None else type(block.spatial_func).__name__
    scale = getattr(block.spatial_func, "scale", 1.0)
    parts = (mixer, block.gamma_1 is None, scale, block.cpe_net.includes_residual, block.cpe_net.grid_stream)
    return "/".join(str(part) for part in parts)


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

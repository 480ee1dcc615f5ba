"""Small SPACH models with demo weights, one of every mixing type, that tests of several packages share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from spach_deploy.blocks import rewrite
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical, free_batch
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.spach import Spach
from spach_deploy.options.architecture import Architecture, Stages
from spach_deploy.options.specs import OPSET
from tests.shared import once

IMAGE_SIZE = 32
CLASSES = 11


def architecture(width: int, patch_size: int, channel_ratio: float, stages: str, **others: Any) -> Architecture:
    """An architecture of small images. `stages`: as `described_stages` writes them, `2 conv | 1 conv, 2 trans`."""
    values = {"image_size": (IMAGE_SIZE, IMAGE_SIZE), "classes": CLASSES, **others}
    return Architecture(
        width=width, patch_size=patch_size, channel_ratio=channel_ratio, stages=_parsed(stages), **values
    )


def _parsed(stages: str) -> Stages:
    runs = [[run.split() for run in stage.split(",")] for stage in stages.split("|")]
    return tuple(tuple((mixer, int(depth)) for depth, mixer in stage) for stage in runs)


ARCHITECTURES: dict[str, Architecture] = {
    "conv": architecture(16, 8, 2, "3 conv"),
    "trans": architecture(16, 8, 2, "3 trans", heads=2),
    "mlp": architecture(16, 8, 3, "3 mlp"),
    "mlp_shared": architecture(16, 8, 2, "3 mlp", shared=True),
    "hybrid": architecture(16, 4, 3, "2 conv | 1 conv, 2 trans | 3 trans", heads=4),
    "hybrid_stem": architecture(16, 4, 2, "2 conv | 2 trans", heads=2, stem="conv"),
    "ms_mlp": architecture(16, 4, 2, "2 conv | 2 mlp", shared=True),
    "bare": architecture(
        16, 4, 2.5, "1 conv, 1 trans | 2 trans", heads=2, qkv_bias=False, layer_scale=False, position_encoding=False
    ),
    "mixed": architecture(16, 4, 2, "1 mlp, 1 conv | 1 trans, 2 mlp | 2 trans", heads=2, token_ratio=0.8, shared=True),
}


@functools.cache
def small_model(kind: str) -> Spach:
    """A model of `kind`; do not change it, tests share it."""
    model = Spach(ARCHITECTURES[kind]).eval()
    load_demo_weights(model)
    return model


@functools.cache
def canonical_bytes(kind: str) -> bytes:
    """The canonical FP32 graph of `small_model(kind)`, serialized."""

    def make(target: Path) -> None:
        target.write_bytes(as_proto(export_canonical(rewrite(small_model(kind)).model, IMAGE_SIZE)).SerializeToString())

    return once(f"canonical/{kind}.onnx", make).read_bytes()


def plain_export(model: torch.nn.Module, image_size: int) -> ModelProto:
    """What torch.onnx.export makes of `model` as it is, but for a free batch."""
    example = torch.zeros(3, 3, image_size, image_size)
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["input"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    free_batch(program.model, len(example), "batch")
    return as_proto(program.model)


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Normalized images (count, 3, S, S)."""
    return np.random.default_rng(seed).standard_normal((count, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)


def logits(model: torch.nn.Module, batch: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits of `model` in its own precision."""
    dtype = next(model.parameters()).dtype
    with torch.inference_mode():
        result: NDArray[np.float32] = model(torch.from_numpy(batch).to(dtype)).numpy()
    return result


def relative_l2(value: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """||value - reference|| / ||reference||."""
    return float(np.linalg.norm(value.astype(np.float64) - reference) / np.linalg.norm(reference.astype(np.float64)))

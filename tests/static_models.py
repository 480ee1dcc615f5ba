"""Small SPACH models with demo weights, one of every mixing type, that tests of several packages share."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from spach_deploy.blocks import rewrite
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical, free_batch
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.published import SpachConfig
from spach_deploy.models.spach import Spach
from spach_deploy.options.specs import OPSET
from tests.shared import once

IMAGE_SIZE = 32
CLASSES = 11

CONFIGS: dict[str, SpachConfig] = {
    "conv": SpachConfig(16, 8, 2, (("conv",) * 3,)),
    "trans": SpachConfig(16, 8, 2, (("trans",) * 3,), num_heads=2),
    "mlp": SpachConfig(16, 8, 3, (("mlp",) * 3,)),
    "mlp_shared": SpachConfig(16, 8, 2, (("mlp",) * 3,), shared_spatial=True),
    "hybrid": SpachConfig(16, 4, 3, (("conv",) * 2, ("conv", "trans", "trans"), ("trans",) * 3), num_heads=4),
    "hybrid_stem": SpachConfig(16, 4, 2, (("conv",) * 2, ("trans",) * 2), num_heads=2, conv_stem=True),
    "ms_mlp": SpachConfig(16, 4, 2, (("conv",) * 2, ("mlp",) * 2), shared_spatial=True),
}


@functools.cache
def small_model(kind: str) -> Spach:
    """A model of `kind`; do not change it, tests share it."""
    model = Spach(CONFIGS[kind], image_size=IMAGE_SIZE, num_classes=CLASSES).eval()
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

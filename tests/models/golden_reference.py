"""Reference values of the published implementation, for the models of this package.

`../golden/models.json` has its registry names, options, parameter counts, and state-dict keys and shapes;
`../golden/logits.npz` its logits, float32 (2, 1000), computed in evaluation mode on a CPU at 224 pixels with
the weights and input below, loaded with strict=True. The first three functions are those which made them.
"""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spach_deploy.models import Architecture, create_model
from spach_deploy.models.outputs import SelectableOutputs

GOLDEN = Path(__file__).parents[1] / "golden"


def reference_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[Any]:
    """Value of the parameter or buffer called `name`, as float32 (int64 for a batch counter)."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + (seed << 32)))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("running_mean"):
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    if name.endswith("gamma_1"):
        return rng.uniform(0.1, 1.0, shape).astype(np.float32)
    if len(shape) >= 2:
        fan_in = int(np.prod(shape[1:]))
        values: npt.NDArray[Any] = (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
        return values
    if name.endswith("weight"):
        return (1.0 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    return (0.1 * rng.standard_normal(shape)).astype(np.float32)


def reference_state_dict(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """State dict for {name: shape}."""
    return {name: reference_tensor(name, tuple(shape), seed) for name, shape in shapes.items()}


def reference_input(batch: int = 2, image_size: int = 224, seed: int = 0) -> npt.NDArray[Any]:
    """Input batch, shape (batch, 3, image_size, image_size), float32, standard normal."""
    rng = np.random.Generator(np.random.PCG64(1_000_003 + seed))
    images: npt.NDArray[Any] = rng.standard_normal((batch, 3, image_size, image_size)).astype(np.float32)
    return images


def reference_batch(shape: tuple[int, int, int, int], seed: int = 0) -> npt.NDArray[Any]:
    """Input of any shape (batch, channels, height, width), float32, standard normal."""
    images: npt.NDArray[Any] = (
        np.random.Generator(np.random.PCG64(1_000_003 + seed)).standard_normal(shape).astype(np.float32)
    )
    return images


@functools.cache
def golden_models() -> dict[str, dict[str, Any]]:
    """What models.json holds, by our name."""
    models: dict[str, dict[str, Any]] = json.loads((GOLDEN / "models.json").read_text())
    return models


@functools.cache
def golden_logits() -> dict[str, npt.NDArray[np.float32]]:
    """Logits (2, 1000) by our name."""
    with np.load(GOLDEN / "logits.npz") as archive:
        return dict(archive)


@functools.cache
def golden_variants() -> dict[str, dict[str, Any]]:
    """What variants.json holds, by name: architectures outside the table, by the published constructor's options."""
    variants: dict[str, dict[str, Any]] = json.loads((GOLDEN / "variants.json").read_text())
    return variants


def golden_answers(name: str) -> dict[str, npt.NDArray[np.float32]]:
    """Answers of a variant to the first image of `reference_batch`: logits (1, classes), embedding (1, C), and for one
    of them the first tokens after each stage, `layer1` (1, 16, C) and so on.
    """
    with np.load(GOLDEN / "variants.npz") as archive:
        return {key.partition("|")[2]: archive[key] for key in archive if key.startswith(f"{name}|")}


def golden_model_of(architecture: Architecture) -> SelectableOutputs:
    """The model of an architecture with the golden weights, in evaluation mode."""
    with torch.device("meta"):
        model = create_model(architecture)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    state = {key: torch.from_numpy(value) for key, value in reference_state_dict(shapes).items()}
    model.load_state_dict(state, assign=True)
    return model

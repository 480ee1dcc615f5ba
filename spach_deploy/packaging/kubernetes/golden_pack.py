"""The golden pack as files for golden_check.py: raw tensors and one JSON file.

golden.json          the model's name, its tensors, tolerances, the batches to send, and the SHA-256 of every file
input.bin            N inputs, in the model's input format
logits.bin …         the expected outputs for them, float32 or int64, little-endian
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import CLASS_SCORES, expected_outputs, of_role
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.bundle.store import GOLDEN
from spach_deploy.common.errors import BundleError
from spach_deploy.common.text import json_text
from spach_deploy.options.specs import BatchProfile, Role
from spach_deploy.packaging.triton.config import DATA_TYPES
from spach_deploy.packaging.triton.options import Backend
from spach_deploy.packaging.triton.served_model import ServedModel
from spach_deploy.validation.runs import repeated_images
from spach_deploy.validation.tolerance import Bounds

DESCRIPTION = "golden.json"

_EXPORT_AGAIN = "Export the bundle again."


@dataclasses.dataclass(frozen=True)
class GoldenPack:
    """The files by name, and the sizes of the batches that the check sends."""

    files: dict[str, bytes]
    batch_sizes: tuple[int, ...]


def golden_pack(model: ServedModel) -> GoldenPack:
    """The pack of `model`. BundleError where the bundle's golden pack does not fit the model."""
    golden = Golden.load(model.bundle.file(GOLDEN))
    golden.check(model.bundle)
    expected = expected_outputs(golden.outputs, model.outputs)
    tensors = {"input.bin": np.ascontiguousarray(golden.input).tobytes()}
    for output in model.outputs:
        tensors[_file(output)] = _bytes(output, expected[output.name])
    sent = batches(len(golden.names), model.batch)
    description = {
        "model": model.name,
        "images": list(golden.names),
        "input": _tensor(model.inputs[0], "input.bin"),
        "outputs": [_output(output, model) for output in model.outputs],
        "batches": [list(batch) for batch in sent],
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in tensors.items()},
    }
    text = json_text(description) + "\n"
    return GoldenPack({DESCRIPTION: text.encode(), **tensors}, tuple(map(len, sent)))


def bounds(model: ServedModel) -> Bounds:
    """Tolerances on a GPU: the engine's for a plan, or where they allow for TF32; else the graph's."""
    tolerances = model.facts.tolerances
    return tolerances.engine if model.backend is Backend.TENSORRT or allows_tf32(model) else tolerances.graph


def allows_tf32(model: ServedModel) -> bool:
    """Whether the bundle's tolerances of the engine allow for TF32."""
    return model.facts.tf32


def batches(images: int, profile: BatchProfile) -> tuple[tuple[int, ...], ...]:
    """Indices of images for each batch: the smallest batch, the rest of the images, then the largest batch.

    A graph can be right at one batch size and wrong at another. Images are repeated where there are too few.
    """
    sent = [_take(0, profile.min, images)]
    start = min(profile.min, images)
    while start < images:
        size = max(profile.min, min(profile.max, images - start))
        sent.append(_take(start, size, images))
        start += size
    if max(map(len, sent)) < profile.max:
        sent.append(_take(0, profile.max, images))
    return tuple(sent)


def _take(start: int, size: int, images: int) -> tuple[int, ...]:
    return repeated_images(images, start + size)[start:]


def _bytes(output: TensorInfo, expected: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(expected).astype("<i8" if output.role is Role.TOP_INDICES else "<f4").tobytes()


def _tensor(tensor: TensorInfo, file: str) -> dict[str, Any]:
    data_type = DATA_TYPES[tensor.dtype].removeprefix("TYPE_")
    return {"name": tensor.name, "datatype": data_type, "shape": list(tensor.shape[1:]), "file": file}


def _output(output: TensorInfo, model: ServedModel) -> dict[str, Any]:
    """Description of an output with its kind and tolerance. Indices are compared by the scores that they rank."""
    entry = _tensor(output, _file(output))
    logits = of_role(model.outputs, Role.LOGITS)
    if output.role is Role.TOP_INDICES and logits is not None:
        return {**entry, "kind": "indices", "ranks": logits.name, "tolerance": _tolerance(logits.name, model)}
    kind = "scores" if output.role in CLASS_SCORES else "values"
    return {**entry, "kind": kind, "tolerance": _tolerance(output.name, model)}


def _file(output: TensorInfo) -> str:
    return f"{output.name}.bin"


def _tolerance(output: str, model: ServedModel) -> dict[str, Any]:
    given = bounds(model).outputs.get(output)
    if given is None:
        raise BundleError(f"Bundle {model.bundle.path} has no tolerance for the output {output}.", _EXPORT_AGAIN)
    return {name: getattr(given, name) for name in ("rel_l2", "max_abs", "cosine_min", "flip_margin")}

"""Warm-up requests from a bundle's golden images, so that the first client does not wait for lazy initialization.

Triton sends `batch_size` copies of one sample; the file holds that sample's bytes. A model without a batch of its own
(max_batch_size 0) is sent one request with all of its samples. A batch size of 0 means no warm-up, and one above the
maximum keeps the model from loading, or crashes the server.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN
from spach_deploy.packaging.triton.schema import data_type_number, message_class
from spach_deploy.packaging.triton.served_model import ServedModel
from spach_deploy.packaging.triton.tensors import DATA_TYPES

FOLDER = "warmup"
"""Where Triton looks for a model's warm-up data."""

_FILE = "golden_input"


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """Warm-up requests, and the files that they read, by name."""

    requests: tuple[Any, ...] = ()
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)


def warm_up(model: ServedModel) -> WarmUp:
    """One request of each batch that matters: the smallest, the usual, the largest.

    Raises BundleError where the golden pack cannot be read.
    """
    golden = Golden.load(model.bundle.file(GOLDEN))
    form = model.batches
    if form.max_batch_size:
        sizes = sorted({1, model.batch.opt, model.batch.max})
        requests = tuple(_request(model, size, form.dims(model.inputs[0]), _FILE) for size in sizes)
        return WarmUp(requests, {_FILE: golden.input[0].tobytes()})
    sizes = sorted({model.batch.min, model.batch.opt, model.batch.max})
    dims = {size: [size, *form.dims(model.inputs[0])[1:]] for size in sizes}
    requests = tuple(_request(model, 1, dims[size], f"{_FILE}_{size}") for size in sizes)
    return WarmUp(requests, {f"{_FILE}_{size}": _batch(golden.input, size).tobytes() for size in sizes})


def _batch(samples: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    return samples[np.arange(size) % len(samples)]


def _request(model: ServedModel, batch_size: int, dims: list[int], file: str) -> Any:
    tensor = model.inputs[0]
    sample = {"data_type": data_type_number(DATA_TYPES[tensor.dtype]), "dims": dims, "input_data_file": file}
    samples = batch_size if model.batches.max_batch_size else dims[0]
    return message_class("ModelWarmup")(
        name=f"golden_{samples}", batch_size=batch_size, inputs={tensor.name: sample}, count=1
    )

"""config.pbtxt of a served model: tensors in Triton's data types and dims, batching, instances and warm-up requests.

Warm-up requests are made from a bundle's golden images, so that the first client does not wait for lazy
initialization. Triton sends `batch_size` copies of one sample, whose bytes are in a file. A model with max_batch_size 0
gets one request that holds a whole batch. Triton ignores a warm-up with batch size 0; one above the maximum keeps the
model from loading, or crashes the server.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import CLASS_SCORES
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.bundle.store import GOLDEN
from spach_deploy.packaging.triton.options import (
    KIND_AUTO,
    KIND_CPU,
    KIND_GPU,
    Device,
    Instances,
    TritonOptions,
    VersionPolicy,
)
from spach_deploy.packaging.triton.schema import data_type_number, message_class, model_config
from spach_deploy.packaging.triton.served_model import BatchingForm, ServedModel

DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
}
"""Triton's data types by the dtypes' names in NumPy."""

_BITS = {"BOOL": 8, "BF16": 16}


def byte_size(data_type: str, dims: Sequence[int]) -> int | None:
    """Bytes of a tensor with fixed dims; None for TYPE_STRING, whose elements have no fixed size."""
    if data_type not in DATA_TYPES.values():
        return None
    name = data_type.removeprefix("TYPE_")
    bits = _BITS.get(name) or int("".join(filter(str.isdigit, name)))
    return bits // 8 * math.prod(dims)


def shown(dims: Sequence[int]) -> str:
    """Dims as config.pbtxt writes them."""
    return f"[{', '.join(str(size) for size in dims)}]"


FOLDER = "warmup"
"""The folder in which Triton looks for a model's warm-up data."""

_FILE = "golden_input"


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """Warm-up requests, and the files with their data, by name."""

    requests: tuple[Any, ...] = ()
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)


def warm_up(model: ServedModel) -> WarmUp:
    """Requests in the smallest, the `opt` and the largest batch.

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


LABELS_FILE = "labels.txt"
ACCEPTS_RTX = "spach_deploy_accepts_rtx_plan"
"""Parameter in config.pbtxt of a model that has a plan of TensorRT for RTX on purpose (--force)."""

_KINDS = {Device.AUTO: KIND_AUTO, Device.GPU: KIND_GPU, Device.CPU: KIND_CPU}
_FORMATS = {"NHWC": 1, "NCHW": 2}


def model_configuration(model: ServedModel, options: TritonOptions, warm_up: WarmUp) -> Any:
    """The ModelConfig of `model`."""
    form = model.batches
    config = model_config(
        name=model.name,
        platform=model.backend.platform,
        backend=model.backend.value,
        max_batch_size=form.max_batch_size,
        input=[_input(tensor, form) for tensor in model.inputs],
        output=[_output(tensor, form) for tensor in model.outputs],
        instance_group=[instance_group(options.instances, _device(model, options.instances))],
        model_warmup=list(warm_up.requests),
        response_cache={"enable": True} if options.response_cache else None,
        version_policy=version_policy(options.version_policy),
    )
    if options.batching.dynamic and form.max_batch_size > 1:
        config.dynamic_batching.preferred_batch_size[:] = preferred_sizes((model.batch.opt, model.batch.max))
        config.dynamic_batching.max_queue_delay_microseconds = options.batching.queue_delay_us
    if model.accepts_rtx:
        config.parameters[ACCEPTS_RTX].string_value = "true"
    return config


def preferred_sizes(sizes: Iterable[int]) -> list[int]:
    """Preferred batch sizes, at which Triton stops waiting for more requests: the `opt` and the largest batch."""
    return sorted({size for size in sizes if size > 1})


def tensor_fields(name: str, data_type: str, dims: list[int]) -> dict[str, Any]:
    """The fields that inputs and outputs share."""
    return {"name": name, "data_type": data_type_number(data_type), "dims": dims}


def instance_group(instances: Instances, device: Device) -> dict[str, Any]:
    """The instance group of a model on `device`."""
    gpus = [] if device is Device.CPU else list(instances.gpus)
    return {"count": instances.count, "kind": _KINDS[device], "gpus": gpus}


def version_policy(policy: VersionPolicy | None) -> dict[str, Any] | None:
    """The field of a version policy; None for Triton's default, the latest version."""
    if policy is None:
        return None
    if policy.specific:
        return {"specific": {"versions": list(policy.specific)}}
    return {"all": {}} if policy.latest is None else {"latest": {"num_versions": policy.latest}}


def _device(model: ServedModel, instances: Instances) -> Device:
    if instances.device is not None:
        return instances.device
    return Device.GPU if model.needs_gpu or instances.gpus else Device.AUTO


def _input(tensor: TensorInfo, form: BatchingForm) -> dict[str, Any]:
    fields = tensor_fields(tensor.name, DATA_TYPES[tensor.dtype], form.dims(tensor))
    # Triton requires three dims with a format; an explicit batch would be a fourth.
    return {**fields, "format": _FORMATS.get(tensor.layout, 0) if form.max_batch_size else 0}


def _output(tensor: TensorInfo, form: BatchingForm) -> dict[str, Any]:
    fields = tensor_fields(tensor.name, DATA_TYPES[tensor.dtype], form.dims(tensor))
    return {**fields, "label_filename": LABELS_FILE if tensor.role in CLASS_SCORES else ""}

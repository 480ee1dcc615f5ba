"""A served model's config.pbtxt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spach_deploy.bundle.golden import LOGITS, PROBABILITIES
from spach_deploy.bundle.store import TensorInfo
from spach_deploy.packaging.triton.options import (
    KIND_AUTO,
    KIND_CPU,
    KIND_GPU,
    Device,
    Instances,
    TritonOptions,
    VersionPolicy,
)
from spach_deploy.packaging.triton.schema import data_type_number, model_config
from spach_deploy.packaging.triton.served_model import BatchingForm, ServedModel
from spach_deploy.packaging.triton.tensors import DATA_TYPES
from spach_deploy.packaging.triton.warmup import WarmUp

LABELS_FILE = "labels.txt"
ACCEPTS_RTX = "spach_deploy_accepts_rtx_plan"
"""Parameter of a model that carries a plan of TensorRT for RTX on purpose."""

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
    """The batch that the kernels were tuned for, and the largest: what a batch is sent at without waiting on."""
    return sorted({size for size in sizes if size > 1})


def tensor_fields(name: str, data_type: str, dims: list[int]) -> dict[str, Any]:
    """What inputs and outputs have in common."""
    return {"name": name, "data_type": data_type_number(data_type), "dims": dims}


def instance_group(instances: Instances, device: Device) -> dict[str, Any]:
    """Instances on `device`."""
    gpus = [] if device is Device.CPU else list(instances.gpus)
    return {"count": instances.count, "kind": _KINDS[device], "gpus": gpus}


def version_policy(policy: VersionPolicy | None) -> dict[str, Any] | None:
    """A version policy; None leaves Triton's own, the latest version."""
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
    # A format promises three dims, which a batch of its own in front of them would break.
    return {**fields, "format": _FORMATS.get(tensor.layout, 0) if form.max_batch_size else 0}


def _output(tensor: TensorInfo, form: BatchingForm) -> dict[str, Any]:
    fields = tensor_fields(tensor.name, DATA_TYPES[tensor.dtype], form.dims(tensor))
    return {**fields, "label_filename": LABELS_FILE if tensor.name in (LOGITS, PROBABILITIES) else ""}

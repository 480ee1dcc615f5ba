"""Ensembles: steps around a model, so that a client sends an image and gets labels.

    bytes    NAME_preprocess (decode, resize, crop, normalize) -> NAME -> NAME_top_k
    pixels   NAME -> NAME_top_k, for a model that takes uint8 pixels: it needs no preprocessing

NAME_ensemble connects them; NAME can still be called by itself.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from spach_deploy.bundle.outputs import LOGITS, of_role
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.common.errors import UsageError
from spach_deploy.options.specs import IODtype, Preprocessing, Role
from spach_deploy.packaging.triton.config import DATA_TYPES, LABELS_FILE, instance_group, tensor_fields
from spach_deploy.packaging.triton.options import Device, Ensemble, EnsembleInput, Instances
from spach_deploy.packaging.triton.schema import model_config
from spach_deploy.packaging.triton.served_model import ServedModel

IMAGE, PIXELS = "image", "pixels"
STEP_FILE = "model.py"

_TOP_K = 5


@dataclasses.dataclass(frozen=True)
class EnsembleStep:
    """A model of the repository that is made for an ensemble. `source`: its module in steps/; None for the ensemble."""

    config: Any
    source: str | None = None
    has_labels: bool = False


def ensemble_steps(model: ServedModel, ensemble: Ensemble) -> tuple[EnsembleStep, ...]:
    """The steps around `model`, and the ensemble. UsageError where they do not fit the model."""
    logits = of_role(model.outputs, Role.LOGITS)
    if logits is None:
        raise UsageError(
            f"--ensemble ranks classes, and {model.name} gives {', '.join(t.name for t in model.outputs)} alone.",
            "Leave --ensemble out, or export with --outputs logits too.",
        )
    k = min(_TOP_K, model.classes) if ensemble.top_k is None else ensemble.top_k
    _check(model, ensemble, k)
    steps = (_preprocess(model),) if ensemble.input is EnsembleInput.BYTES else ()
    return (*steps, _top_k(model, logits, k), _ensemble(model, ensemble.input, logits, k))


def _check(model: ServedModel, ensemble: Ensemble, k: int) -> None:
    if not model.batches.max_batch_size:
        raise UsageError(
            f"--ensemble: {model.name} takes batches of {model.batch.min} and more, but pictures come singly.",
            "Export it with a batch profile from 1, such as --batch 1:8:32, or give --backend onnxruntime.",
        )
    if ensemble.input is EnsembleInput.PIXELS and model.facts.io_dtype is not IODtype.UINT8:
        raise UsageError(
            f"--ensemble-input pixels: {model.name} takes normalized images.",
            "Export it with --io-dtype uint8, or let the ensemble take the bytes of picture files.",
        )
    if ensemble.input is EnsembleInput.BYTES and (channels := model.facts.preprocessing.channels) not in (1, 3):
        raise UsageError(
            f"--ensemble: {model.name} takes images of {channels} channels, which no picture file has.",
            "Export it with --io-dtype uint8 and give --ensemble-input pixels.",
        )
    if not 1 <= k <= model.classes:
        raise UsageError(
            f"--top-k {k} of {model.classes} classes does not exist.",
            f"Give a number from 1 to {model.classes}.",
        )


def _preprocess(model: ServedModel) -> EnsembleStep:
    tensor = model.inputs[0]
    transform = model.facts.preprocessing
    settings = {
        "image_size": transform.image_size,
        "resize_size": transform.resize_size,
        "mean": transform.mean,
        "std": transform.std,
        "dtype": tensor.dtype,
    }
    if transform.interpolation != Preprocessing.interpolation:
        settings["interpolation"] = transform.interpolation
    config = _step_config(
        f"{model.name}_preprocess",
        model,
        inputs=[tensor_fields(IMAGE, "TYPE_STRING", [1])],
        outputs=[tensor_fields(tensor.name, DATA_TYPES[tensor.dtype], model.batches.dims(tensor))],
    )
    config.parameters["preprocessing"].string_value = json.dumps(settings)
    return EnsembleStep(config, "preprocess")


def _top_k(model: ServedModel, logits: TensorInfo, k: int) -> EnsembleStep:
    config = _step_config(
        f"{model.name}_top_k",
        model,
        inputs=[tensor_fields(LOGITS, DATA_TYPES[logits.dtype], model.batches.dims(logits))],
        outputs=_outputs(k),
    )
    config.parameters["top_k"].string_value = str(k)
    config.parameters["labels"].string_value = LABELS_FILE
    return EnsembleStep(config, "top_k", has_labels=True)


def _outputs(k: int) -> list[dict[str, Any]]:
    types = {"labels": "TYPE_STRING", "probabilities": "TYPE_FP32", "indices": "TYPE_INT64"}
    return [tensor_fields(name, data_type, [k]) for name, data_type in types.items()]


def _step_config(name: str, model: ServedModel, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> Any:
    return model_config(
        name=name,
        backend="python",
        max_batch_size=model.batches.max_batch_size,
        input=inputs,
        output=outputs,
        instance_group=[instance_group(Instances(), Device.CPU)],
    )


def _ensemble(model: ServedModel, takes: EnsembleInput, logits: TensorInfo, k: int) -> EnsembleStep:
    tensor = model.inputs[0]
    takes_bytes = takes is EnsembleInput.BYTES
    given = tensor_fields(IMAGE, "TYPE_STRING", [1])
    if not takes_bytes:
        given = tensor_fields(PIXELS, DATA_TYPES[tensor.dtype], model.batches.dims(tensor))
    prepared = "prepared" if takes_bytes else PIXELS
    outputs = _outputs(k)
    steps = [
        _link(model.name, {tensor.name: prepared}, {logits.name: LOGITS}),
        _link(f"{model.name}_top_k", {LOGITS: LOGITS}, {output["name"]: output["name"] for output in outputs}),
    ]
    if takes_bytes:
        steps.insert(0, _link(f"{model.name}_preprocess", {IMAGE: IMAGE}, {tensor.name: prepared}))
    config = model_config(
        name=f"{model.name}_ensemble",
        platform="ensemble",
        max_batch_size=model.batches.max_batch_size,
        input=[given],
        output=outputs,
        ensemble_scheduling={"step": steps},
    )
    return EnsembleStep(config)


def _link(name: str, inputs: dict[str, str], outputs: dict[str, str]) -> dict[str, Any]:
    """A step of the ensemble, with maps from its tensors to the ensemble's. Version -1: the newest that is served."""
    return {"model_name": name, "model_version": -1, "input_map": inputs, "output_map": outputs}

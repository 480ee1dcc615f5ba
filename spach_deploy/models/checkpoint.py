"""Load a model with weights: those of a checkpoint, or demo weights."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from spach_deploy.common.errors import CheckpointError
from spach_deploy.models.checkpoint_content import StateDict, shown, state_dict_from_content
from spach_deploy.models.checkpoint_file import find_index, read_checkpoint, read_shards
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.hyperparameters import Setting, resolve_settings, values_of
from spach_deploy.models.matching import (
    check_fit,
    choose_image_size,
    compare_classes,
    compare_model,
    image_size_of,
    infer_model,
    num_classes_of,
)
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.models.registry import check_spec, create_model, resolve
from spach_deploy.models.spach import Spach
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.specs import ModelSpec, Preprocessing

DEMO_NOTE = "demo weights: made up from the tensors' names, not trained, so its answers mean nothing"
_FORMATS = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to be exported: evaluation mode, float32, on the CPU, without gradients.

    `checkpoint_sha256`: of the file (of several files, see `read_shards`). `notes`: what was unwrapped, inferred,
    converted and compared, in sentences for the report. `settings`: values that tensors do not show, with their source.
    """

    model: Spach
    name: str
    origin: Literal["checkpoint", "demo"]
    checkpoint_path: Path | None
    checkpoint_sha256: str | None
    notes: tuple[str, ...]
    settings: tuple[Setting, ...] = ()

    @property
    def architecture(self) -> Architecture:
        """What the model computes, with the values of the settings."""
        return self.model.architecture

    @property
    def image_size(self) -> int:
        """In pixels, one side."""
        return self.architecture.image_size[0]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.architecture.classes

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are resized, cropped and normalized for this model."""
        values = values_of(self.settings)
        return Preprocessing.for_size(self.image_size, values.mean, values.std)

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Hash of the float32 values (see the function), the same for the same weights in another kind of file."""
        return weights_sha256(self.model.state_dict())


def load_model(spec: ModelSpec) -> LoadedModel:
    """The model that `spec` describes, with its checkpoint's weights or, without one, demo weights.

    Name, image size and number of classes are inferred from the checkpoint where `spec` leaves them open.
    Raises ModelError for an unknown name or an image size the architecture does not allow, CheckpointError
    for a file that cannot be read, does not fit, holds values that are not finite, or contradicts what was
    asked.
    """
    check_spec(spec)
    return _with_demo_weights(spec) if spec.checkpoint is None else _from_checkpoint(spec, spec.checkpoint)


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over name, shape and float32 bytes of every floating-point tensor, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point():
            digest.update(f"{name} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().contiguous().numpy().data)
    return digest.hexdigest()


def _with_demo_weights(spec: ModelSpec) -> LoadedModel:
    assert spec.name is not None  # check_spec
    name = resolve(spec.name)
    asked = {"image_size": spec.image_size, "classes": spec.num_classes}
    architecture = ARCHITECTURES[name].replace(**{field: value for field, value in asked.items() if value is not None})
    settings = resolve_settings(architecture, spec.hyperparameters, {}, is_checkpoint=False)
    # Built without values: drawing the published initialisation would take longer than all the rest.
    model = _without_values(architecture, settings).to_empty(device="cpu")
    load_demo_weights(model)
    return _loaded(model, name, "demo", None, None, (DEMO_NOTE,), settings)


def _from_checkpoint(spec: ModelSpec, path: Path) -> LoadedModel:
    index = find_index(path)
    content, sha256 = read_checkpoint(path) if index is None else read_shards(index)
    state = state_dict_from_content(content, spec.weights, spec.ignore)
    name, notes = _identify(spec, state)
    classes = num_classes_of(state.tensors) or 0
    published = ARCHITECTURES[name]
    size, size_notes = choose_image_size(state.args, name, image_size_of(published, state.tensors), spec.image_size)
    architecture = published.replace(image_size=size, classes=classes)
    settings = resolve_settings(architecture, spec.hyperparameters, state.args, is_checkpoint=True)
    values, value_notes = _values(state.tensors)
    model = _without_values(architecture, settings)
    model.load_state_dict(_with_counters(model, values), strict=True, assign=True)
    files = [] if index is None else [f"read {len(index.shards)} files, as {index.path.name} says"]
    notes = [*files, *state.notes, *notes, *compare_classes(state.args, classes), *size_notes, *value_notes]
    return _loaded(model, name, "checkpoint", path if index is None else index.path, sha256, tuple(notes), settings)


def with_settings(loaded: LoadedModel, settings: tuple[Setting, ...]) -> LoadedModel:
    """A model with the same weights and other settings."""
    model = _without_values(loaded.architecture, settings)
    model.load_state_dict(loaded.model.state_dict(), strict=True, assign=True)
    model.requires_grad_(False).eval()
    return dataclasses.replace(loaded, model=model, settings=settings)


def _without_values(architecture: Architecture, settings: Iterable[Setting]) -> Spach:
    """The model of `architecture` with the values of `settings`, on the meta device."""
    with torch.device("meta"):
        return create_model(architecture.replace(**{setting.name: setting.value for setting in settings}))


def _identify(spec: ModelSpec, state: StateDict) -> tuple[str, list[str]]:
    """Name of the model whose tensors these are, and notes on what was inferred and compared."""
    notes: list[str] = []
    classes = num_classes_of(state.tensors)
    if spec.num_classes is not None and classes is not None and classes != spec.num_classes:
        raise CheckpointError(
            f"The checkpoint's head has {classes} classes, but {spec.num_classes} were asked for.",
            f"Give --num-classes {classes}, or leave it out.",
        )
    if spec.name is None:
        name = infer_model(state.tensors)
        notes.append(f"model {name}: inferred from the tensors' names and shapes")
        if ARCHITECTURES[name].shared:
            notes.append("its spatial tensors are the same in every block of a stage")
    else:
        name = resolve(spec.name)
        check_fit(name, state.tensors)
    if spec.num_classes is None:
        notes.append(f"{classes} classes: rows of the head")
    return name, notes + compare_model(state.args, name, asked=spec.name is not None)


def _values(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Float32 copies, independent of the file, and a note where values were converted."""
    counters = {name for name in tensors if name.endswith("num_batches_tracked")}
    floats = {name: tensor for name, tensor in tensors.items() if name not in counters}
    _check_plain(floats)
    values = {name: _float32(tensor) for name, tensor in floats.items()}
    _check_finite(values)
    kinds = collections.Counter(tensor.dtype for tensor in floats.values() if tensor.dtype != torch.float32)
    return values, [f"converted {count} {_FORMATS[dtype]} tensors to FP32" for dtype, count in kinds.items()]


def _check_plain(tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError for tensors that are sparse, quantized or on no device, or whose values FP32 would round."""

    def is_plain(tensor: Tensor) -> bool:
        return tensor.dtype in _FORMATS and tensor.layout == torch.strided and tensor.device.type == "cpu"

    if wrong := [name for name, tensor in tensors.items() if not is_plain(tensor)]:
        kinds = sorted({str(tensors[name].dtype).removeprefix("torch.") for name in wrong})
        raise CheckpointError(
            f"Weights must be plain FP32, FP16 or BF16 tensors, but {len(wrong)} are not "
            f"({', '.join(kinds)}): {shown(wrong)}.",
            "Save them as one of these, not quantized or sparse.",
        )


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError for NaN or infinity, seen in the smallest and largest value, which needs no second array."""
    wrong = [name for name, tensor in tensors.items() if not torch.stack(tensor.aminmax()).isfinite().all()]
    if wrong:
        raise CheckpointError(
            f"The checkpoint holds NaN or infinite values in {len(wrong)} tensors: {shown(wrong)}.",
            "Take one from before training diverged.",
        )


def _with_counters(model: Spach, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`values` with BatchNorm's counters of training steps set to zero: evaluation does not use them."""
    counters = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
    return values | {name: torch.zeros((), dtype=torch.int64) for name in counters}


def _loaded(
    model: Spach,
    name: str,
    origin: Literal["checkpoint", "demo"],
    path: Path | None,
    sha256: str | None,
    notes: tuple[str, ...],
    settings: tuple[Setting, ...],
) -> LoadedModel:
    model.requires_grad_(False).eval()
    return LoadedModel(model, name, origin, path, sha256, notes, settings)

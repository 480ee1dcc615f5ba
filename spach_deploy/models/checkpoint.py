"""Load a model with weights: those of a checkpoint, or demo weights."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from spach_deploy.bundle.inputs import ModelInputs
from spach_deploy.common.errors import CheckpointError
from spach_deploy.common.text import noun
from spach_deploy.models.checkpoint_content import StateDict, shown, state_dict_from_content
from spach_deploy.models.checkpoint_file import find_index, read_checkpoint, read_shards
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.hyperparameters import Setting, Source, published, resolve_settings, values_of
from spach_deploy.models.matching import (
    check_fit,
    compare_classes,
    compare_model,
    image_size_of,
    infer_model,
    num_classes_of,
)
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.models.registry import Match, check_spec, create_model, known_name, requested
from spach_deploy.options.architecture import Architecture, ImageSize, Sides, sides, size_of_sides
from spach_deploy.options.specs import Hyperparameters, ModelSpec, Preprocessing, channel_statistics

DEMO_NOTE = "demo weights: made up from the tensors' names, not trained, so its answers mean nothing"
_FORMATS = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to be exported: evaluation mode, float32, on the CPU, without gradients.

    `checkpoint_sha256`: of the file (of several files, see `read_shards`). `notes`: what was unwrapped, inferred,
    converted and compared, in sentences for the report. `settings`: values that tensors do not show, with their source.
    """

    model: SelectableOutputs
    name: str
    origin: Literal["checkpoint", "demo", "module"]
    checkpoint_path: Path | None
    checkpoint_sha256: str | None
    notes: tuple[str, ...]
    settings: tuple[Setting, ...] = ()

    @property
    def architecture(self) -> Architecture | None:
        """What the model computes, with the values of the settings; None for a module of the user's own."""
        known = getattr(self.model, "architecture", None)
        return known if isinstance(known, Architecture) else None

    @property
    def image_size(self) -> ImageSize:
        """In pixels: a square's side, or height and width."""
        return size_of_sides(*self._architecture.image_size)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self._architecture.classes

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self._architecture.channels

    @property
    def _architecture(self) -> Architecture:
        assert self.architecture is not None
        return self.architecture

    @property
    def takes(self) -> ModelInputs:
        """Its inputs: images alone, but for a module of the user's own."""
        known = getattr(self.model, "takes", None)
        return known if isinstance(known, ModelInputs) else ModelInputs()

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are resized, cropped and normalized for this model."""
        values = values_of(self.settings)
        mean, std = channel_statistics(self.channels)
        usual = self.architecture
        return Preprocessing.for_size(
            self.image_size,
            values.mean or mean,
            values.std or std,
            crop=values.crop or (None if usual is None else usual.crop),
            interpolation=values.interpolation or (None if usual is None else usual.interpolation),
        )

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
    match = _asked(spec)
    assert match is not None  # check_spec
    otherwise = Source.COMMAND_LINE if isinstance(spec.architecture, Path) else Source.PUBLISHED
    settings = resolve_settings(match.architecture, _hyperparameters(spec), {}, otherwise)
    # Built without values: drawing the published initialisation would take longer than all the rest.
    model = _without_values(match.architecture, settings).to_empty(device="cpu")
    load_demo_weights(model)
    return _loaded(model, match.name, "demo", None, None, (DEMO_NOTE,), settings)


def _from_checkpoint(spec: ModelSpec, path: Path) -> LoadedModel:
    index = find_index(path)
    content, sha256 = read_checkpoint(path) if index is None else read_shards(index)
    state = state_dict_from_content(content, spec.weights, spec.ignore)
    match, notes = _identify(spec, state)
    otherwise = Source.COMMAND_LINE if isinstance(spec.architecture, Path) else Source.ASSUMED
    heads = otherwise if match.is_published or spec.architecture is not None else Source.RULE
    settings = resolve_settings(match.architecture, _hyperparameters(spec), state.args, otherwise, heads=heads)
    values, value_notes = _values(state.tensors)
    model = _without_values(match.architecture, settings)
    model.load_state_dict(_with_counters(model, values), strict=True, assign=True)
    files = [] if index is None else [f"read {len(index.shards)} files, as {index.path.name} says"]
    notes = [*files, *state.notes, *notes, *value_notes]
    return _loaded(
        model, match.name, "checkpoint", path if index is None else index.path, sha256, tuple(notes), settings
    )


def _asked(spec: ModelSpec) -> Match | None:
    """The architecture that `spec` names or describes; None where it does not."""
    architecture = requested(spec)
    return None if architecture is None else Match(known_name(spec) or "", architecture)


def _hyperparameters(spec: ModelSpec) -> Hyperparameters:
    """The values that `spec` gives; an architecture from a file gives all of its own."""
    if not isinstance(spec.architecture, Path):
        return spec.hyperparameters
    own = published(Architecture.read(spec.architecture))
    return Hyperparameters(**{**own, **spec.hyperparameters.given()})


def read_values(spec: ModelSpec, stems: Sequence[str]) -> tuple[dict[str, Tensor], str, list[str]]:
    """Float32 values of a checkpoint for a module that one of the tensors `stems` is of, the file's SHA-256, and notes.

    Tensors of whole numbers stay as they are. Raises CheckpointError for a file that cannot be read or used.
    """
    assert spec.checkpoint is not None
    index = find_index(spec.checkpoint)
    content, sha256 = read_checkpoint(spec.checkpoint) if index is None else read_shards(index)
    state = state_dict_from_content(content, spec.weights, spec.ignore, stems)
    floats = {name: tensor for name, tensor in state.tensors.items() if tensor.is_floating_point()}
    values, notes = _values(floats)
    return {**state.tensors, **values}, sha256, [*state.notes, *notes]


def with_settings(loaded: LoadedModel, settings: tuple[Setting, ...]) -> LoadedModel:
    """A model with the same weights and outputs, and other settings."""
    assert loaded.architecture is not None
    model = _without_values(loaded.architecture, settings)
    model.load_state_dict(loaded.model.state_dict(), strict=True, assign=True)
    model.requires_grad_(False).eval()
    model.outputs = loaded.model.outputs
    return dataclasses.replace(loaded, model=model, settings=settings)


def _without_values(architecture: Architecture, settings: Iterable[Setting]) -> SelectableOutputs:
    """The model of `architecture` with the values of `settings`, on the meta device."""
    with torch.device("meta"):
        return create_model(architecture.replace(**{setting.name: setting.value for setting in settings}))


def _identify(spec: ModelSpec, state: StateDict) -> tuple[Match, list[str]]:
    """The architecture of these tensors, and notes on what was inferred and compared."""
    asked, classes = _asked(spec), num_classes_of(state.tensors)
    given = spec.num_classes if asked is None or spec.architecture is None else asked.architecture.classes
    if given is not None and classes is not None and classes != given:
        raise CheckpointError(
            f"The checkpoint's head has {classes} {noun(classes, 'class')}, but {given} were asked for.",
            f"Give --num-classes {classes}{'' if spec.num_classes is None else ', or leave it out'}.",
        )
    if asked is None:
        match, size_notes = infer_model(state.tensors, state.args, _size(spec), is_headless=spec.num_classes == 0)
        notes = _inferred(match)
    else:
        (match, size_notes), notes = _fitting(spec, asked, state), []
    if spec.num_classes is None:
        notes.append(f"{match.architecture.classes} {noun(match.architecture.classes, 'class')}: rows of the head")
    notes += compare_model(state.args, match.name, asked=asked is not None)
    return match, [*notes, *compare_classes(state.args, match.architecture.classes), *size_notes]


def _size(spec: ModelSpec) -> Sides | None:
    return None if spec.image_size is None else sides(spec.image_size)


def _fitting(spec: ModelSpec, asked: Match, state: StateDict) -> tuple[Match, list[str]]:
    """What was asked for, with the classes and image size of the file, and a note on the size."""
    size = _size(spec) if spec.architecture is None else asked.architecture.image_size
    classes = num_classes_of(state.tensors) or asked.architecture.classes
    size, notes = image_size_of(asked.architecture, state.tensors, state.args, size)
    architecture = asked.architecture.replace(image_size=size, classes=classes)
    check_fit(architecture, asked.name, state.tensors)
    return dataclasses.replace(asked, architecture=architecture), notes


def _inferred(match: Match) -> list[str]:
    shared = ["its spatial tensors are the same in every block of a stage"] if match.architecture.shared else []
    return [f"{'model ' if match.is_published else ''}{match}: inferred from the tensors' names and shapes", *shared]


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


def _with_counters(model: SelectableOutputs, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`values` with BatchNorm's counters of training steps set to zero: evaluation does not use them."""
    counters = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
    return values | {name: torch.zeros((), dtype=torch.int64) for name in counters}


def _loaded(
    model: SelectableOutputs,
    name: str,
    origin: Literal["checkpoint", "demo"],
    path: Path | None,
    sha256: str | None,
    notes: tuple[str, ...],
    settings: tuple[Setting, ...],
) -> LoadedModel:
    model.requires_grad_(False).eval()
    return LoadedModel(model, name, origin, path, sha256, notes, settings)

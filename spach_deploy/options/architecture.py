"""The architecture of a model as data: all that the published constructors can say, in Python, TOML and JSON.

    Architecture(patch_size=2, width=48, channel_ratio=2, heads=3, classes=10, image_size=(32, 32),
                 stages=((("conv", 2),), (("conv", 1), ("trans", 1)), (("trans", 3),), (("trans", 1),)))

The published models are a table of these (`spach_deploy.models.published`). This module imports no torch, and stands in
this package because a manifest holds one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spach_deploy.common.errors import ModelError, UsageError
from spach_deploy.common.files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ACTIVATIONS = ("gelu", "gelu-tanh", "relu", "silu")
"""Activations of channel and spatial MLPs: the exact GELU (erf), its tanh approximation, ReLU, SiLU."""

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
"""How pictures are resized: bicubic and bilinear with antialiasing, as Pillow and torchvision do."""

Sides = tuple[int, int]
"""Height and width."""

ImageSize = int | tuple[int, int]
"""Size of an image in pixels: the side of a square, or (height, width)."""

LARGEST_SIDE, MOST_CLASSES, MOST_CHANNELS = 16_384, 1_000_000, 4_096
"""Upper bounds of the image side in pixels, of the number of classes, and of channels in an image."""


def sides(size: ImageSize) -> tuple[int, int]:
    """(height, width) in pixels."""
    return (size, size) if isinstance(size, int) else size


def size_of_sides(height: int, width: int) -> ImageSize:
    """The size as options and manifests have it: one number for a square."""
    return height if height == width else (height, width)


def size_in_words(size: ImageSize) -> str:
    """`224`, or height and width as `192x256`."""
    return "x".join(map(str, dict.fromkeys(sides(size))))


CONV, TRANS, MLP = "conv", "trans", "mlp"
SMLP, SHIFT = "smlp", "shift"
STEMS = ("patch", "conv")

MIXERS: dict[str, tuple[str, ...]] = {"spach": (CONV, TRANS, MLP), "smlpnet": (SMLP,), "shiftvit": (SHIFT,)}
"""By family, how a block can mix tokens."""

ARCHITECTURE_VERSION = 1

_PUBLISHED_MIXERS = {"pass": CONV, "attn": TRANS}
_LARGEST = {
    "channels": MOST_CHANNELS,
    "classes": MOST_CLASSES,
    "patch_size": 1024,
    "width": 1 << 16,
    "heads": 1 << 16,
    "divisions": 1 << 16,
}
_LARGEST_RATIO = 64.0

Stages = tuple[tuple[tuple[str, int], ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """All that decides what a model computes, except for its weights. ModelError for values that contradict each other.

    `image_size`: height and width in pixels. `channels`: of the images. `classes`: 0 for a model without a head, whose
    output is the embedding. `stem`: `patch`, one convolution of kernel and stride `patch_size`, or `conv`, three
    convolutions before it. `width`: channels of the first stage; each further stage has twice those of the one before.
    `stages`: for each stage, how its blocks mix tokens, as (mixer, number of blocks) in order; mixers are `conv` (no
    spatial function, published as `pass`), `trans` (attention, `attn`) and `mlp`; of the family `smlpnet` `smlp` (a
    linear layer along each axis), of `shiftvit` `shift` (of the channels' `divisions` equal parts, the first four come
    from neighbours).

    `heads`: of every attention. `qkv_bias`: whether query, key and value have a bias. `qk_scale`: factor of q; None or
    0: head size ** -0.5. `channel_ratio`, `token_ratio`: hidden width of the MLPs over channels and over tokens.
    `position_encoding`: whether blocks have a depthwise convolution. `layer_scale`: whether the spatial function has a
    factor for each channel (gamma_1). `shared`: one spatial function for all blocks of a stage with a single mixer;
    with several stages, from the second on. `activation`: one of `specs.ACTIVATIONS`. `norm`, `norm_eps`: of every
    norm over channels.

    `mean`, `std`: of the pixels by channel, in 0..1, that training subtracted and divided by; None: ImageNet's.
    `crop`: the part of the resized shorter side that the centre crop keeps. `interpolation`: of the resize.
    """

    version: int = ARCHITECTURE_VERSION
    family: str = "spach"
    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    classes: int = 1000
    stem: str = "patch"
    patch_size: int
    width: int
    stages: Stages
    heads: int = 0
    qkv_bias: bool = True
    qk_scale: float | None = None
    channel_ratio: float
    token_ratio: float = 0.5
    position_encoding: bool = True
    layer_scale: bool = True
    shared: bool = False
    activation: str = "gelu"
    norm: str = "layer"
    norm_eps: float = 1e-6
    divisions: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        stages = tuple(
            tuple((_PUBLISHED_MIXERS.get(mixer, mixer), depth) for mixer, depth in stage) for stage in self.stages
        )
        size = sides(self.image_size)
        object.__setattr__(self, "image_size", tuple(size) if isinstance(size, list) else size)
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "qk_scale", self.qk_scale or None)
        object.__setattr__(self, "channel_ratio", float(self.channel_ratio))
        _check_names(self)
        _check_stages(self)
        _check_numbers(self)
        _check_heads(self)
        _check_divisions(self)
        _check_image_size(self)

    def replace(self, **changes: Any) -> Architecture:
        """The same architecture with other values."""
        return dataclasses.replace(self, **changes)

    @property
    def mixers(self) -> tuple[tuple[str, ...], ...]:
        """For each stage, how each of its blocks mixes tokens."""
        return tuple(tuple(mixer for mixer, depth in stage for _ in range(depth)) for stage in self.stages)

    @property
    def multi_stage(self) -> bool:
        """Whether the model has several stages, each with half the resolution of the one before."""
        return len(self.stages) > 1

    @property
    def stage_names(self) -> list[str]:
        """Attribute names of the stages, in order."""
        return [f"layer{i + 1}" for i in range(len(self.stages))] if self.multi_stage else ["blocks"]

    @property
    def stage_dims(self) -> list[int]:
        """Channels of each stage."""
        return [self.width << stage for stage in range(len(self.stages))]

    @property
    def attention_dims(self) -> list[int]:
        """Channels of each stage that has attention."""
        return [dim for dim, mixers in zip(self.stage_dims, self.mixers, strict=True) if TRANS in mixers]

    @property
    def has_spatial(self) -> bool:
        """Whether any block has a spatial function."""
        return any(mixer != CONV for mixers in self.mixers for mixer in mixers)

    @property
    def heads_that_fit(self) -> list[int]:
        """Numbers of heads that divide the channels of every stage with attention."""
        dims = self.attention_dims
        return [heads for heads in range(1, min(dims) + 1) if not any(dim % heads for dim in dims)] if dims else []

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Height and width of each stage's token grid: those of the patches, then halves; what is left over is cut."""
        height, width = (side // self.patch_size for side in self.image_size)
        return [(height >> stage, width >> stage) for stage in range(len(self.stages))]

    @property
    def smallest_image_size(self) -> int:
        """In pixels, one side. The last grid is at least 2 x 2, because one token cannot be mixed (a spatial MLP would
        halve it).
        """
        return 2 * self.patch_size << (len(self.stages) - 1)

    @property
    def divisions_that_fit(self) -> list[int]:
        """Numbers of divisions that a model with shifts may have; first those that divide the first stage's channels,
        as in every published model.
        """
        possible = range(4, self.width + 1) if self.divisions else ()
        return sorted(possible, key=lambda divisions: self.width % divisions > 0)

    def is_shared(self, stage: int) -> bool:
        """Whether the blocks of a stage have one spatial function."""
        kinds = {*self.mixers[stage]}
        return self.shared and len(kinds) == 1 and CONV not in kinds and (stage > 0 or not self.multi_stage)

    @property
    def description(self) -> str:
        """In a line: `spach 48 wide, patch 2, 2 conv | 1 conv, 1 trans | 3 trans | 1 trans`."""
        stem = "convolutional stem" if self.stem == "conv" else "patch"
        return f"{self.family} {self.width} wide, {stem} {self.patch_size}, {self.described_stages}"

    @property
    def described_stages(self) -> str:
        """`3 conv | 2 conv, 2 trans | ...`."""
        return " | ".join(", ".join(f"{depth} {mixer}" for mixer, depth in stage) for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        import msgspec

        content: dict[str, Any] = msgspec.to_builtins(self)
        return content

    def to_toml(self) -> str:
        """The text of a TOML file with every value; None is left out, which means the same."""
        lines = [f"{name} = {json.dumps(value)}" for name, value in self.to_dict().items() if value is not None]
        return "\n".join([*lines, ""])

    @classmethod
    def of(cls, content: Mapping[str, Any], where: str = "The architecture") -> Architecture:
        """The architecture in plain JSON or TOML. UsageError with one sentence, which begins with `where`, for an
        unknown key, a missing one, a value of the wrong kind, and for values that contradict each other.
        """
        _check_keys(content, where)
        import msgspec

        try:
            return msgspec.convert(_normal(content), cls)
        except msgspec.ValidationError as error:
            raise UsageError(f"{where} is wrong: {_readable(str(error))}.", _SEE) from None
        except ModelError as error:
            raise UsageError(f"{where} is wrong: {error.message}", error.hint) from None

    @classmethod
    def read(cls, path: Path) -> Architecture:
        """The architecture in a TOML file, or in a JSON file (.json). UsageError says what is wrong in it."""
        text = read_text(path, f"Architecture {path}", "Give a TOML file.")
        try:
            content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            kind = "JSON" if path.suffix == ".json" else "TOML"
            raise UsageError(f"Architecture {path} is not {kind} ({error}).", _SEE) from None
        if not isinstance(content, dict):
            raise UsageError(f"Architecture {path} holds no names with values.", _SEE)
        return cls.of(content, f"Architecture {path}")


_SEE = "docs/own_checkpoint.md shows one."


# Reading


def _check_keys(content: Mapping[str, Any], where: str) -> None:
    fields = dataclasses.fields(Architecture)
    known = {field.name for field in fields}
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(field.name for field in fields)}."
            raise UsageError(f"{where} has an unknown key {str(key)[:40]!r}.", hint)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    if lacking := [name for name in needed if name not in content]:
        raise UsageError(f"{where} lacks {', '.join(lacking)}.", _SEE)
    if content.get("version", ARCHITECTURE_VERSION) != ARCHITECTURE_VERSION:
        raise UsageError(
            f"{where} has version {str(content['version'])[:40]}, and this version of spach-deploy reads"
            f" {ARCHITECTURE_VERSION}.",
            "Install the spach-deploy that wrote it.",
        )


def _normal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with one number for a square image as two, one number for the pixels of all channels as one for each,
    and one stage, a plain list of blocks, as a list of it.
    """
    normal = dict(content)
    channels = normal.get("channels", Architecture.channels)
    for name in ("mean", "std"):
        if type(value := normal.get(name)) in (int, float) and type(channels) is int and 1 <= channels <= MOST_CHANNELS:
            normal[name] = [value] * channels
    if type(side := normal.get("image_size")) is int:
        normal["image_size"] = [side, side]
    stages = normal.get("stages")
    if isinstance(stages, list) and stages and all(_is_run(stage) for stage in stages):
        normal["stages"] = [stages]
    return normal


def _is_run(value: Any) -> bool:
    """Whether a value is a mixer with its number of blocks, `["conv", 2]`."""
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)


def _readable(message: str) -> str:
    """msgspec's message with the key first."""
    what, _, path = message.partition(" - at `$.")
    return f"{path.rstrip('`') or 'it'}: {what[:1].lower()}{what[1:120]}".replace("`", "")


# Checks


def _check_names(architecture: Architecture) -> None:
    known = {"family": tuple(MIXERS), "stem": STEMS, "activation": ACTIVATIONS, "norm": ("layer",)}
    for field, names in known.items():
        value = getattr(architecture, field)
        if value not in names:
            raise ModelError(f"There is no {field} {str(value)[:40]!r}.", f"One of {', '.join(names)}.")
    if architecture.stem == "conv" and architecture.patch_size % 2:
        raise ModelError(
            f"The convolutional stem halves the image before its patches, so patch_size {architecture.patch_size} must"
            " be even.",
            "Give an even patch_size, or stem = 'patch'.",
        )


def _check_stages(architecture: Architecture) -> None:
    known = MIXERS[architecture.family]
    if not architecture.stages or not all(architecture.stages):
        raise ModelError("The model has a stage without blocks.", "Give each stage at least one block.")
    for mixer, depth in (run for stage in architecture.stages for run in stage):
        if mixer not in known:
            raise ModelError(f"There is no mixer {str(mixer)[:40]!r} in {architecture.family}.", _one_of(known))
        if type(depth) is not int or not 1 <= depth <= 1000:
            raise ModelError(f"{str(depth)[:40]} blocks of {mixer} is not 1 to 1000.", "Leave the mixer out, or say 1.")
    if len(architecture.stages) > 10:
        raise ModelError(f"{len(architecture.stages)} stages is not 1 to 10.", "Give fewer stages.")


def _check_divisions(architecture: Architecture) -> None:
    if architecture.divisions and architecture.family != "shiftvit":
        raise ModelError(f"A {architecture.family} shifts no channels, so it has no divisions.", "Leave divisions out.")
    if architecture.family == "shiftvit" and not 4 <= architecture.divisions <= architecture.width:
        raise ModelError(
            f"divisions {architecture.divisions} is not 4 to {architecture.width}, the channels of the first stage.",
            "Give what training used; the published models have 12 or 16.",
        )


def _one_of(names: tuple[str, ...]) -> str:
    return f"One of {', '.join(names)}."


def _check_numbers(architecture: Architecture) -> None:
    for name, most in _LARGEST.items():
        value, least = getattr(architecture, name), 0 if name in ("classes", "heads", "divisions") else 1
        if type(value) is not int or not least <= value <= most:
            raise ModelError(f"{name} {str(value)[:40]} is not {least} to {most:,}.", "Give a whole number in between.")
    for name in ("channel_ratio", "token_ratio", "crop"):
        value = getattr(architecture, name)
        if not 0 < value <= (1 if name == "crop" else _LARGEST_RATIO):
            raise ModelError(f"{name} {value:g} is not over 0 and at most {1 if name == 'crop' else _LARGEST_RATIO:g}.")
    for name in ("norm_eps", "qk_scale"):
        value = getattr(architecture, name) or 0.0
        if not (math.isfinite(value) and value >= 0):
            raise ModelError(f"{value:g} is no {name}.", "Give a number that is not negative.")
    if int(architecture.width * architecture.channel_ratio) < 1:
        raise ModelError(
            f"channel_ratio {architecture.channel_ratio:g} leaves no hidden channel.", "Give a larger one."
        )


def _check_heads(architecture: Architecture) -> None:
    dims = architecture.attention_dims
    if dims and not architecture.heads:
        raise ModelError("The model has attention, and heads is missing.", f"Give {_heads_in_words(architecture)}.")
    if uneven := [dim for dim in dims if dim % architecture.heads]:
        raise ModelError(
            f"{architecture.heads} heads do not divide the model's {uneven[0]} channels.",
            f"Give {_heads_in_words(architecture)}.",
        )


def _heads_in_words(architecture: Architecture) -> str:
    return _one_of(tuple(str(heads) for heads in architecture.heads_that_fit if heads <= 64)).lower().rstrip(".")


def _check_image_size(architecture: Architecture) -> None:
    size, smallest = architecture.image_size, architecture.smallest_image_size
    if not (isinstance(size, tuple) and len(size) == 2 and all(type(side) is int for side in size)):
        raise ModelError(f"image_size {str(size)[:40]} is not height and width in pixels.", "Give two whole numbers.")
    if min(architecture.grids[-1]) < 2:
        raise ModelError(
            f"Image size {size_in_words(size)} is too small: mixing needs a grid of 2 by 2 tokens in the last stage.",
            f"Take {smallest} or more.",
        )
    if max(size) > LARGEST_SIDE:
        raise ModelError(f"Image size {size_in_words(size)} is too large.", f"Take {LARGEST_SIDE} or less.")
    halves = [(side + 1) // 2 // max(architecture.patch_size // 2, 1) for side in size]
    if architecture.stem == "conv" and tuple(halves) != architecture.grids[0]:
        step = architecture.patch_size
        raise ModelError(
            f"Image size {size_in_words(size)} gives the convolutional stem a row of patches more than the model has.",
            f"Take multiples of {step}.",
        )
    _check_tokens(architecture)


def _check_tokens(architecture: Architecture) -> None:
    for (height, width), mixers in zip(architecture.grids, architecture.mixers, strict=True):
        if MLP in mixers and int(height * width * architecture.token_ratio) < 1:
            raise ModelError(
                f"token_ratio {architecture.token_ratio:g} leaves no hidden token of {height * width}.",
                "Give a larger one.",
            )

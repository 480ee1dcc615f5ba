"""Settings: hyperparameters that no tensor shows (heads, qk scale, activation, epsilon, divisions of a ShiftViT,
normalization of pixels).

Each value comes from the first of these sources that has it, and its source is kept: the command line or a recipe; the
checkpoint's own `args`; the table of published models, which is an assumption. Sources that contradict each other are
an error. Only outputs that the user's own code computed can prove the values (`spach_deploy.validation.user_answers`).

This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from spach_deploy.bundle.schema import SettingEntry
from spach_deploy.common.errors import CheckpointError, ModelError
from spach_deploy.models.published import CHANNELS_PER_HEAD
from spach_deploy.options.architecture import ACTIVATIONS, INTERPOLATIONS, Architecture
from spach_deploy.options.specs import (
    CHANNELS_HINT,
    PUBLISHED_CROP,
    Channels,
    Hyperparameters,
    channel_statistics,
    channels_problem,
    crop_problem,
)


class Source(str, enum.Enum):
    """Where a value is from."""

    COMMAND_LINE = "command line"
    ARGS = "args"
    ANSWERS = "answers"
    CONFIRMED = "confirmed"
    PUBLISHED = "published"
    ASSUMED = "assumed"
    RULE = "published rule"
    USUAL = "usual"

    @property
    def sentence(self) -> str:
        """The source in words, for the export's output."""
        return {
            Source.COMMAND_LINE: "as asked for",
            Source.ARGS: "the file's own args say so",
            Source.ANSWERS: "your answers agree with no other",
            Source.CONFIRMED: "as published; your answers agree",
            Source.PUBLISHED: "as published",
            Source.ASSUMED: "assumed: as published, the file does not show it",
            Source.RULE: f"assumed: about one for each {CHANNELS_PER_HEAD} channels of width, as published models have;"
            " the file does not show it, --heads or --answers decide",
            Source.USUAL: "assumed: the usual values; your module does not say",
        }[self]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A value that tensors do not show, and its source. `name`: a field of `Hyperparameters`."""

    name: str
    value: Any
    source: Source

    @property
    def is_assumed(self) -> bool:
        """Whether nothing that belongs to the model says it."""
        return self.source in (Source.ASSUMED, Source.RULE, Source.USUAL)

    def __str__(self) -> str:
        return described(self.name, self.value)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for a manifest."""
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        return {"value": value, "source": self.source.value}


_OUTDATED = "If its args are out of date, save the weights alone, with torch.save(model.state_dict(), ...)."
_DEFAULT_SCALE = "head size ** -0.5"
_FIELDS: dict[str, tuple[str, ...]] = {  # names in the args of training code
    "heads": ("num_heads", "heads", "nhead", "n_heads"),
    "qk_scale": ("qk_scale",),
    "activation": ("act_layer", "activation", "hidden_act", "act"),
    "norm_eps": ("norm_eps", "layer_norm_eps", "ln_eps"),
    "divisions": ("n_div", "divisions"),
    "mean": ("mean",),
    "std": ("std",),
    "crop": ("crop_pct",),
    "interpolation": ("interpolation",),
}
OF_PIXELS = ("mean", "std", "crop", "interpolation")
"""Settings of preprocessing, with which the model itself does not compute."""
_SILENT = {"crop": PUBLISHED_CROP, "interpolation": "bicubic"}
"""Settings that are named only where they were given or are others than the published evaluation's."""
_ACTIVATION_NAMES = {
    **{name: name for name in ACTIVATIONS},
    **{"gelu-erf": "gelu", "gelu-none": "gelu", "gelu-new": "gelu-tanh", "gelu-pytorch-tanh": "gelu-tanh"},
    **{"gelutanh": "gelu-tanh", "quick-silu": "silu", "swish": "silu"},
}
_NORM_NAMES = ("layernorm", "layer-norm", "ln", "layer"), ("groupnorm", "group-norm", "gn", "gn1")
_INTERPOLATION_NAMES = {**{name: name for name in INTERPOLATIONS}, "0": "nearest", "2": "bilinear", "3": "bicubic"}


def with_hyperparameters(architecture: Architecture, given: Hyperparameters) -> Architecture:
    """`architecture` with the values of `given`. ModelError for a value that it does not allow."""
    _check(architecture, given)
    return architecture.replace(**for_channels(given, architecture.channels).given())


def for_channels(given: Hyperparameters, channels: int) -> Hyperparameters:
    """`given` with a mean and standard deviation for each channel, where there is one number for all."""
    spread = {name: _spread(value, channels) for name, value in given.given().items()}
    return dataclasses.replace(given, **spread)


def _spread(value: Any, channels: int) -> Any:
    return value * channels if isinstance(value, tuple) and len(value) == 1 else value


def published(architecture: Architecture) -> dict[str, Any]:
    """Values of a published model, without those that it does not use: heads without attention, divisions without
    shifts.
    """
    attention = {"heads": architecture.heads, "qk_scale": architecture.qk_scale} if architecture.attention_dims else {}
    shift = {"divisions": architecture.divisions} if architecture.divisions else {}
    mean, std = channel_statistics(architecture.channels)
    return {
        **attention,
        **shift,
        "activation": architecture.activation,
        "norm_eps": architecture.norm_eps,
        "mean": architecture.mean or mean,
        "std": architecture.std or std,
        "crop": architecture.crop,
        "interpolation": architecture.interpolation,
    }


def resolve_settings(
    architecture: Architecture,
    asked: Hyperparameters,
    args: Mapping[str, Any],
    otherwise: Source,
    *,
    heads: Source | None = None,
) -> tuple[Setting, ...]:
    """All settings of a model, each with its source; crop and interpolation only where they are given, or are not those
    of the published evaluation.

    `asked`: values from the command line or recipe. `args`: the checkpoint's. `otherwise`: the source of the values in
    `architecture`, and `heads` that of its heads, where it is another. Raises CheckpointError where `args`
    contradict `asked` or have an unknown value, ModelError for a value that the architecture does not allow.
    """
    _check(architecture, asked)
    asked, said = for_channels(asked, architecture.channels), _said(architecture, args)
    for name, value in asked.given().items():
        if name in said and not _same(said[name][1], value):
            raise _contradiction(name, value, *said[name])
    given = {name: value for name, (_, value) in said.items()}
    try:
        _check(architecture, Hyperparameters(**given), " (in the checkpoint's args)")
    except ModelError as error:
        raise CheckpointError(error.message, _OUTDATED) from None
    settings: list[Setting] = []
    for name, usual in published(architecture).items():
        if name in asked.given():
            settings.append(Setting(name, getattr(asked, name), Source.COMMAND_LINE))
        elif name in given:
            settings.append(Setting(name, given[name], Source.ARGS))
        elif name not in _SILENT or usual != _SILENT[name]:
            settings.append(Setting(name, usual, heads if name == "heads" and heads else otherwise))
    return tuple(settings)


def values_of(settings: Iterable[Setting]) -> Hyperparameters:
    """The settings' values."""
    return Hyperparameters(**{setting.name: setting.value for setting in settings})


def confirmed(settings: Iterable[Setting]) -> tuple[Setting, ...]:
    """The settings after the model agreed with the user's own outputs: assumed values are confirmed by that.

    Not those of preprocessing: the model does not compute with them.
    """
    return tuple(
        dataclasses.replace(setting, source=Source.CONFIRMED)
        if setting.is_assumed and setting.name not in OF_PIXELS
        else setting
        for setting in settings
    )


def settings_section(settings: Iterable[Setting]) -> dict[str, SettingEntry]:
    """The manifest's section of settings."""
    return {setting.name: SettingEntry(value=setting.value, source=setting.source.value) for setting in settings}


def read_section(section: Mapping[str, SettingEntry]) -> tuple[Setting, ...]:
    """Read what `settings_section` wrote. TypeError or ValueError for anything else."""
    settings: list[Setting] = []
    for name, entry in section.items():
        if name not in _FIELDS:
            raise ValueError(f"hyperparameter {name!r} is not known")
        value = None if entry.value is None else _parse(name, entry.value)
        settings.append(Setting(name, value, Source(entry.source)))
    return tuple(settings)


def lines(settings: Iterable[Setting]) -> list[str]:
    """The settings in words, one line for each source."""
    by_source: dict[Source, list[str]] = {}
    for setting in settings:
        by_source.setdefault(setting.source, []).append(str(setting))
    return [f"{', '.join(_together(values))} ({source.sentence})" for source, values in by_source.items()]


def described(name: str, value: Any) -> str:
    """A value with its name, in words."""
    if name == "heads":
        return f"{value} head{'' if value == 1 else 's'}"
    if name == "divisions":
        return f"{value} divisions of the channels"
    if name == "qk_scale":
        return f"qk scale {_DEFAULT_SCALE if not value else format(value, 'g')}"
    if name == "norm_eps":
        return f"epsilon {value:g}"
    if name in ("mean", "std"):
        return f"pixel {name} {_channels_in_words(value, channel_statistics(len(value))[name == 'std'])}"
    return f"{name} {value:g}" if name == "crop" else f"{name} {value}"


def _channels_in_words(value: Channels, usual: Channels) -> str:
    if value == usual and len(value) == 3:
        return "of ImageNet"
    is_even = len(value) > 3 and len(set(value)) == 1
    shown = f"{value[0]:g} in all channels" if is_even else " ".join(format(part, "g") for part in value)
    return f"{shown} (ImageNet's over its channels)" if value == usual else shown


def _together(names: list[str]) -> list[str]:
    """`names` with mean and std as one entry."""
    both = ["pixel mean of ImageNet", "pixel std of ImageNet"]
    if all(name in names for name in both):
        return [*(name for name in names if name not in both), "pixel mean and std of ImageNet"]
    return names


def _check(architecture: Architecture, given: Hyperparameters, where: str = "") -> None:
    """ModelError for what the architecture does not allow."""
    if (given.heads is not None or given.qk_scale) and not architecture.attention_dims:
        name = "heads" if given.heads is not None else "qk scale"
        raise ModelError(f"The model has no attention, so it has no {name}{where}.", "Leave it out.")
    dims = architecture.attention_dims
    uneven = [dim for dim in dims if given.heads and dim % given.heads]
    if given.heads is not None and (given.heads < 1 or uneven):
        fitting = [heads for heads in architecture.heads_that_fit if heads <= 64]
        raise ModelError(
            f"{given.heads} heads{where} do not divide the model's {(uneven or dims)[0]} channels.",
            f"Give one of {', '.join(map(str, fitting))}.",
        )
    _check_divisions(architecture, given.divisions, where)
    if given.activation is not None and given.activation not in ACTIVATIONS:
        raise ModelError(f"There is no activation {given.activation!r}{where}.", f"One of {', '.join(ACTIVATIONS)}.")
    for name, value in (("qk scale", given.qk_scale), ("epsilon", given.norm_eps)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ModelError(f"{value:g} is no {name}{where}.", "Give a number that is not negative.")
    check_pixels(given, architecture.channels, where)
    if given.crop is not None and (problem := crop_problem(given.crop)):
        raise ModelError(f"The crop {problem}{where}.", "It is the part of the resized picture that is kept.")


def _check_divisions(architecture: Architecture, divisions: int | None, where: str) -> None:
    if divisions is not None and not architecture.divisions:
        raise ModelError(f"The model shifts no channels, so it has no divisions{where}.", "Leave them out.")
    if divisions is not None and not 4 <= divisions <= architecture.width:
        raise ModelError(
            f"{divisions} divisions{where} is not 4 to {architecture.width}, the channels of the first stage.",
            "Give what training used; the published models have 12 or 16.",
        )


def check_pixels(given: Hyperparameters, channels: int, where: str = "") -> None:
    """ModelError for a mean or standard deviation that images of so many channels cannot have."""
    for name, values in (("mean", given.mean), ("std", given.std)):
        if values is not None and (problem := channels_problem(name, values)):
            raise ModelError(f"Pixel {name} {problem}{where}.", CHANNELS_HINT)
        if values is not None and len(values) not in (1, channels):
            raise ModelError(
                f"Pixel {name} has {len(values)} numbers{where}, and the model takes images of {channels}"
                f" channel{'' if channels == 1 else 's'}.",
                "Give a number for each channel, or one for all.",
            )


def _contradiction(name: str, asked: Any, field: str, said: Any) -> CheckpointError:
    return CheckpointError(
        f"{described(name, asked)} was asked for, but the checkpoint's args say {described(name, said)} ({field}).",
        "Leave the option out, or, if its args are out of date, save the weights alone, with"
        " torch.save(model.state_dict(), ...).",
    )


# Values in the checkpoint's own args


def _said(architecture: Architecture, args: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """By setting: (field of args, its value). CheckpointError for a value that is not known."""
    _check_visible(architecture, args)
    found: dict[str, tuple[str, Any]] = {}
    for name in published(architecture):
        for field in _FIELDS[name]:
            value = args.get(field)
            if _is_unsaid(value) or (name == "qk_scale" and value == 0):
                continue
            parsed = _spread(_known(name, field, value), architecture.channels)
            if name in found and not _same(found[name][1], parsed):
                raise CheckpointError(
                    f"The checkpoint's args contradict themselves: {found[name][0]} and {field} differ.",
                    "Save the weights alone, with torch.save(model.state_dict(), ...), and give the value as option.",
                )
            found[name] = field, parsed
    return found


def _is_unsaid(value: Any) -> bool:
    """Whether a value is None, or what command lines and YAML write for it."""
    return value is None or value == [] or (isinstance(value, str) and value.lower() in ("", "none", "null"))


def _known(name: str, field: str, value: Any) -> Any:
    try:
        return _parse(name, value)
    except (TypeError, ValueError, OverflowError, KeyError):
        names = {"activation": ACTIVATIONS, "interpolation": INTERPOLATIONS}.get(name, ())
        known = f": {', '.join(names)}" if names else ""
        raise CheckpointError(
            f"The checkpoint's args say {field} = {value!r}, which this version cannot export{known}.",
            _OUTDATED,
        ) from None


def _parse(name: str, value: Any) -> Any:
    """A value of args as the setting's type. TypeError or ValueError where that is not possible."""
    if isinstance(value, bool):
        raise TypeError(name)
    if name in ("heads", "divisions"):
        if int(value) != float(value):
            raise ValueError(name)
        return int(value)
    if name == "activation":
        if (folded := _folded(value)) not in _ACTIVATION_NAMES:
            raise ValueError(f"activation {folded[:40]} is not known")
        return _ACTIVATION_NAMES[folded]
    if name == "interpolation":
        return _INTERPOLATION_NAMES[str(value).lower()]
    if name in ("mean", "std"):
        return _channels(value)
    return float(value)


def _folded(value: Any) -> str:
    """A name in one spelling: without modules, in lower case, with hyphens for underscores."""
    if not isinstance(value, str):
        raise TypeError("an activation is a name")
    return value.removesuffix("()").rsplit(".", 1)[-1].lower().replace("_", "-")


def _channels(value: Any) -> Channels:
    values = value.split(",") if isinstance(value, str) else value
    numbers = tuple(float(part) for part in ([values] if isinstance(values, int | float) else values))
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError("not finite")
    return numbers


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return len(one) == len(other) and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) or isinstance(other, float):
        return math.isclose(float(one), float(other), rel_tol=1e-9)
    return bool(one == other)


def _check_visible(architecture: Architecture, args: Mapping[str, Any]) -> None:
    """CheckpointError for args that contradict what the tensors show: then neither can be trusted."""
    shown: dict[str, Callable[[Any], bool]] = {
        "hidden_dim": lambda value: int(value) == architecture.width,
        "patch_size": lambda value: _last(value) == architecture.patch_size,
        "in_chans": lambda value: int(value) == architecture.channels,
        "channel_ratio": lambda value: _hidden(architecture, float(value)) == _hidden(architecture),
        "token_ratio": lambda value: float(value) == architecture.token_ratio,
        "cpe": lambda value: bool(value) is architecture.position_encoding,
        "scaled": lambda value: bool(value) is architecture.layer_scale or not architecture.has_spatial,
        "qkv_bias": lambda value: bool(value) is architecture.qkv_bias or not architecture.attention_dims,
        "norm_layer": lambda value: _folded(value) in _NORM_NAMES[architecture.family == "shiftvit"],
        "stem_type": lambda value: (str(value) == "conv4") is (architecture.stem == "conv"),
    }
    for field, agrees in shown.items():
        value = args.get(field)
        if _is_unsaid(value):
            continue
        try:
            is_so = agrees(value)
        except (TypeError, ValueError, OverflowError):
            is_so = False
        if not is_so:
            raise CheckpointError(
                f"The checkpoint's args say {field} = {value!r}, and this version exports the published model's alone.",
                _OUTDATED,
            )


def _hidden(architecture: Architecture, ratio: float | None = None) -> list[int]:
    """Hidden channels of each stage with this ratio, by default its own."""
    return [int(dim * (architecture.channel_ratio if ratio is None else ratio)) for dim in architecture.stage_dims]


def _last(value: Any) -> int:
    return int(value[-1] if isinstance(value, (list, tuple)) else value)

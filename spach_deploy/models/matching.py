"""Find the model that a checkpoint's tensors belong to, and compare it with what the user and the file's `args` say.

Names and shapes of tensors are compared with `shapes.state_shapes` of every model. They do not show two things: the
number of attention heads (no two models differ in these alone), and whether blocks share spatial tensors, for which
values are compared.

`args` is the command line that published training code stores: `model` (its registry name), `input_size` (pixels) and
`nb_classes`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spach_deploy.common.errors import CheckpointError, ModelError
from spach_deploy.models.checkpoint_content import ignoring, shown
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.models.registry import reference_name, resolve
from spach_deploy.models.shapes import shared_groups, state_shapes
from spach_deploy.options.architecture import MLP, Architecture

if TYPE_CHECKING:
    from torch import Tensor


_OUTDATED_ARGS = "if its args are out of date, save the weights alone, with torch.save(model.state_dict(), ...)."
_WRONG_FILE = f"Is it the right file? Or, {_OUTDATED_ARGS}"


def compare_model(args: Mapping[str, Any], name: str, asked: bool) -> list[str]:
    """Compare the model in `args` with `name`, which was requested (`asked`) or inferred.

    Returns a note. CheckpointError when they conflict.
    """
    said = args.get("model")
    if not isinstance(said, str):
        return []
    if said in (name, reference_name(name), f"spach_{name}"):
        return [f"args say model {said}, which agrees"]
    try:
        other = resolve(str(said))
    except ModelError:
        return [f"args say model {said!r}, a name that is not known here; not compared"]
    meaning = "" if other == said else f" (here {other})"
    have = f"{name} was asked for" if asked else f"its tensors are those of {name}"
    raise CheckpointError(
        f"The checkpoint's args say model {said}{meaning}, but {have}.",
        f"Give --model {other}, or, {_OUTDATED_ARGS}" if asked else _WRONG_FILE,
    )


def compare_classes(args: Mapping[str, Any], num_classes: int) -> list[str]:
    """Compare the number of classes in `args` with the head's; returns notes. CheckpointError when they conflict."""
    notes: list[str] = []
    for field in ("nb_classes", "num_classes"):
        said = _number(args.get(field))
        if said is not None and said != num_classes:
            raise CheckpointError(
                f"The checkpoint's args say {said} classes ({field}), but its head has {num_classes}.",
                _WRONG_FILE,
            )
        notes += [f"args say {said} classes, which agrees"] if said is not None else []
    return notes[:1]


def choose_image_size(
    args: Mapping[str, Any], name: str, fixed: int | None, asked: int | None
) -> tuple[int, list[str]]:
    """Image size in pixels (one side), and a note on where it is from.

    `fixed`: the only size that a spatial MLP's weights allow. None for models that take any size: then it is `asked`,
    else that of `args`, else 224. CheckpointError when `asked` or `args` conflict with `fixed`.
    """
    said = _number(args.get("input_size"))
    if fixed is not None:
        _check_fixed(name, fixed, asked, said)
        agree = " and args" if said is not None else ""
        return fixed, [f"image size {fixed}: the spatial MLP's weights{agree} say so"]
    size = next(size for size in (asked, said, 224) if size is not None)
    ARCHITECTURES[name].replace(image_size=size)
    if said is None:
        return size, [
            f"image size {size}: {'as asked' if asked is not None else 'the default, as the file does not say'}"
        ]
    if size == said:
        return size, [f"image size {size}: args say so" + (", which agrees" if asked is not None else "")]
    return size, [f"image size {size} as asked, though args say that it was trained at {said}"]


def _check_fixed(name: str, fixed: int, asked: int | None, said: int | None) -> None:
    for size, who in ((asked, "was asked for"), (said, "is what its args say")):
        if size is not None and size != fixed:
            raise CheckpointError(
                f"The checkpoint is of {name} for {fixed} pixels, as its spatial MLP's weights fix the "
                f"number of tokens, but {size} {who}.",
                f"Give --image-size {fixed}." if size == asked else _WRONG_FILE,
            )


def _number(value: Any) -> int | None:
    """`value` if it is an integer, or the last of a sequence such as (3, 224, 224); None otherwise."""
    if isinstance(value, (list, tuple)) and value:
        value = value[-1]
    if isinstance(value, bool):
        return None
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


Tensors = Mapping[str, "Tensor"]


@dataclasses.dataclass(frozen=True)
class Differences:
    """How a state dict differs from a model's. `misshaped`: (name, shape in the file, shape needed)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def count(self) -> int:
        """Number of tensors that do not fit; 0 if all do."""
        return len(self.missing) + len(self.unexpected) + len(self.misshaped)

    def __str__(self) -> str:
        shapes = [f"{name} is {_by(there)} instead of {_by(needed)}" for name, there, needed in self.misshaped]
        groups = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes}
        return "; ".join(f"{len(names)} {what} ({shown(names)})" for what, names in groups.items() if names)


def differences(name: str, tensors: Tensors) -> Differences:
    """Compare `tensors` with model `name`, with the classes and image size that the tensors show."""
    config = ARCHITECTURES[name]
    image_size = image_size_of(config, tensors) or 224
    needed = state_shapes(config.replace(image_size=image_size, classes=num_classes_of(tensors) or 1000))
    shared = [key for key in needed if key in tensors]
    there = {key: tuple(tensors[key].shape) for key in shared}
    return Differences(
        missing=tuple(key for key in needed if key not in tensors and not _is_counter(key)),
        unexpected=tuple(key for key in tensors if key not in needed),
        misshaped=tuple((key, there[key], needed[key]) for key in shared if there[key] != needed[key]),
    )


def num_classes_of(tensors: Tensors) -> int | None:
    """Number of classes: rows of the head's weight. None without a head."""
    head = tensors.get("head.weight")
    return int(head.shape[0]) if head is not None and head.ndim == 2 else None


def image_size_of(config: Architecture, tensors: Tensors) -> int | None:
    """Image size in pixels (one side) that a spatial MLP's weights fix; None without one, or for no square grid."""
    for stage, mixers in enumerate(config.mixers):
        if MLP in mixers:
            block = mixers.index(MLP) + (1 if stage else 0)  # later stages begin with a downsampling
            weight = tensors.get(f"{config.stage_names[stage]}.{block}.spatial_func.fc1.weight")
            side = math.isqrt(weight.shape[1]) if weight is not None and weight.ndim == 2 else 0
            fits = weight is not None and side >= 2 and side * side == weight.shape[1]
            return (side << stage) * config.patch_size if fits else None
    return None


def infer_model(tensors: Tensors) -> str:
    """Name of the model that `tensors` fit. CheckpointError when they fit none, or several."""
    found = {name: differences(name, tensors) for name in ARCHITECTURES}
    fitting = [name for name, difference in found.items() if not difference.count]
    shared = [name for name in fitting if ARCHITECTURES[name].shared and not unequal_copies(name, tensors)]
    fitting = shared or [name for name in fitting if not ARCHITECTURES[name].shared]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CheckpointError(f"The checkpoint's tensors fit {' and '.join(fitting)} alike.", "Say which with --model.")
    near = _closest(found, tensors)
    if near is None:
        raise CheckpointError(
            f"The checkpoint's tensors are not those of a SPACH model: it holds {shown(tensors)}.",
            "spach-export --list shows the models that can be exported.",
        )
    raise CheckpointError(
        f"The checkpoint's tensors fit no model; nearest is {near}: {found[near]}.",
        _next_step(found[near], tensors) or f"See why with --model {near}.",
    )


def check_fit(name: str, tensors: Tensors) -> None:
    """CheckpointError that lists all differences, unless `tensors` fit model `name`."""
    difference = differences(name, tensors)
    if difference.count:
        found = {other: differences(other, tensors) for other in ARCHITECTURES}
        step = _next_step(difference, tensors) or _other_model(name, found, tensors)
        raise CheckpointError(f"The checkpoint does not fit {name}: {difference}.", step)
    if unequal := unequal_copies(name, tensors):
        plain = name.removesuffix("_shared")
        raise CheckpointError(
            f"{name} has one spatial function for the blocks of a stage, but {len(unequal)} differ "
            f"between blocks: {shown(unequal)}.",
            f"Try --model {plain}.",
        )


def unequal_copies(name: str, tensors: Tensors) -> list[str]:
    """Names of tensors that should equal those of the first block of their network stage, and do not."""
    groups = shared_groups(ARCHITECTURES[name])
    return [copy for first, *copies in groups for copy in copies if not tensors[first].equal(tensors[copy])]


def _next_step(difference: Differences, tensors: Tensors) -> str:
    """Hint if only the head is missing, or if there are only additional tensors; empty otherwise."""
    if difference.misshaped or set(difference.missing) - {"head.weight", "head.bias"}:
        return ""
    more = [name for name in difference.unexpected if name.rpartition(".")[0] != _other_head(difference, tensors)]
    drop = f"Drop what is not the model's with {ignoring(more, set(tensors) - set(more))}." if more else ""
    if not difference.missing:
        return drop
    if other := _other_head(difference, tensors):
        return f"Its head is called {other}: save it again as head.weight and head.bias. {drop}".rstrip()
    return f"A model without its head has no answer to export: give the file with its head. {drop}".rstrip()


def _other_head(difference: Differences, tensors: Tensors) -> str | None:
    """Name of a layer in the file that could be the head, if `head` is missing; None otherwise."""
    width = tensors["norm2.weight"].shape if "norm2.weight" in tensors else ()
    for name in difference.unexpected:
        weight, stem = tensors[name], name.removesuffix(".weight")
        if difference.missing and stem != name and weight.ndim == 2 and weight.shape[1:] == width:
            return stem if getattr(tensors.get(f"{stem}.bias"), "shape", ()) == weight.shape[:1] else None
    return None


def _other_model(name: str, found: Mapping[str, Differences], tensors: Tensors) -> str:
    """Hint: the model that fits better, if one does."""
    near = _closest(found, tensors)
    if near is None:
        return "It does not seem to be of a SPACH model; spach-export --list shows them."
    if found[near].count == 0:
        return f"It fits {near}: give --model {near}."
    if found[near].count < found[name].count:
        return f"Nearest is {near}, with {found[near].count} differences."
    return "No other model is nearer; was the file saved whole, and of this model?"


def _closest(found: Mapping[str, Differences], tensors: Tensors) -> str | None:
    """The model with the fewest differences, if it shares at least half of the names; None otherwise."""
    near = min(found, key=lambda name: found[name].count)
    common = len(tensors) - len(found[near].unexpected)
    most = max(len(tensors), common + len(found[near].missing))
    return near if 2 * common >= most else None


def _is_counter(name: str) -> bool:
    """Whether this is BatchNorm's counter of training steps, which evaluation does not read and old files lack."""
    return name.endswith("num_batches_tracked")


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"

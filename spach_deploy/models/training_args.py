"""What a training checkpoint's `args` say, held against what was asked and what the tensors show.

Published training code stores its command line: `model` (its registry name), `input_size` (pixels) and
`nb_classes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spach_deploy.common.errors import CheckpointError, ModelError
from spach_deploy.models.published import CONFIGS
from spach_deploy.models.registry import model_info, resolve

_OUTDATED_ARGS = "if its args are out of date, save the weights alone, with torch.save(model.state_dict(), ...)."
_WRONG_FILE = f"Is it the right file? Or, {_OUTDATED_ARGS}"


def compare_model(args: Mapping[str, Any], name: str, asked: bool) -> list[str]:
    """Note on `args.model` beside `name`, asked for or inferred; CheckpointError when they conflict."""
    said = args.get("model")
    if not isinstance(said, str):
        return []
    if said in (name, model_info(name).reference_name, f"spach_{name}"):
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
    """Note on `args.nb_classes` and the head's classes; CheckpointError when they conflict."""
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
    """Image side in pixels and the note on it.

    `fixed` is what a spatial MLP's weights allow, None for models that take any size; these are given what
    was asked, else what `args` say, else 224. CheckpointError when something conflicts with fixed weights.
    """
    said = _number(args.get("input_size"))
    if fixed is not None:
        _check_fixed(name, fixed, asked, said)
        agree = " and args" if said is not None else ""
        return fixed, [f"image size {fixed}: the spatial MLP's weights{agree} say so"]
    size = next(size for size in (asked, said, 224) if size is not None)
    CONFIGS[name].check_image_size(size)
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
    """An integer, or the last of a sequence (3, 224, 224); None for what is neither."""
    if isinstance(value, (list, tuple)) and value:
        value = value[-1]
    if isinstance(value, bool):
        return None
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None

"""A model of the user's own: any nn.Module, given as an object or made by the user's factory.

Its inputs are those of an example, its outputs what it returns for that: a tensor, or a tuple, list or dictionary of
them. Nothing of the user's module is changed, and its `forward` is called as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spach_deploy.common.errors import CheckpointError, ModelError, UsageError
from spach_deploy.models.checkpoint_content import shown

FORM = "package.module:factory"


def made_by(factory: str) -> nn.Module:
    """The module that the user's `factory`, `package.module:name`, makes or is. Runs the user's code.

    Modules are looked for in the current directory too, as `python -m` does. UsageError, with the user's own file and
    line, for one that cannot be imported, fails, or gives something else.
    """
    where, _, name = factory.partition(":")
    if not where or not name:
        raise UsageError(f"--module {factory!r} is not a factory.", f"Give --module {FORM}.")
    with _users_code(factory):
        found: Any = importlib.import_module(where)
        for part in name.split("."):
            found = getattr(found, part)
        made = found if isinstance(found, nn.Module) else found()
    if not isinstance(made, nn.Module):
        raise UsageError(f"--module {factory} gave a {type(made).__name__}, not an nn.Module.", f"Give {FORM}.")
    return made


@contextlib.contextmanager
def _users_code(factory: str) -> Iterator[None]:
    """Import from the current directory too; any exception becomes a UsageError with the user's line."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    except (Exception, SystemExit) as error:  # the user's code raises what it likes
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
        where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"--module {factory} cannot be made: {reason}{where}.", f"Give {FORM}.") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def load_values(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's tensors into the user's module. CheckpointError that lists what does not fit."""
    needed = module.state_dict()
    problems = {
        "missing": [name for name in needed if name not in values and not name.endswith("num_batches_tracked")],
        "not the module's": [name for name in values if name not in needed],
        "of another shape": [
            f"{name} is {list(values[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in needed.items()
            if name in values and values[name].shape != tensor.shape
        ],
    }
    found = [f"{len(names)} {what} ({shown(names)})" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"The checkpoint does not fit the module: {'; '.join(found)}.",
            "Give the checkpoint of this module; --ignore PATTERN drops tensors that are not its own.",
        )
    module.load_state_dict(dict(values), strict=False)


def input_names(module: nn.Module, count: int) -> list[str]:
    """Names of a graph's inputs: `input` for one, else those of forward's arguments."""
    if count == 1:
        return ["input"]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [
        name for name, parameter in inspect.signature(module.forward).parameters.items() if parameter.kind in kinds
    ]
    if len(names) < count:
        names = [f"input_{index}" for index in range(count)]
    return names[:count]


def output_names(outputs: Any, prefix: str = "") -> list[str]:
    """Names of what a module returned, in order: a dictionary's keys, `output` for one tensor, `output_0`, `output_1`
    for several; within these, joined by underscores.
    """
    if isinstance(outputs, Tensor):
        return [prefix or "output"]
    named = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    start = f"{prefix}_" if prefix else "" if isinstance(outputs, Mapping) else "output_"
    return [name for key, value in named for name in output_names(value, f"{start}{key}")]


def flattened(outputs: Any) -> list[Tensor]:
    """The tensors that a module returned: one, or those of a tuple, list or dictionary, in order. ModelError for what
    else is among them.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, tuple | list):
        return [tensor for part in outputs for tensor in flattened(part)]
    raise ModelError(
        f"The model returns {type(outputs).__name__}, and a graph returns tensors.",
        "Return a tensor, or a tuple or dictionary of tensors.",
    )


@dataclasses.dataclass(frozen=True)
class Example:
    """Example inputs of a module, a batch of one, by the graph's names, and what it returns for them, by name."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def run_example(module: nn.Module, inputs: Sequence[Tensor]) -> Example:
    """Run the module once. ModelError where it fails, or where an input or output is not a batch of tensors."""
    for tensor in inputs:
        if not isinstance(tensor, Tensor) or tensor.ndim < 2:
            raise ModelError("An example input is no tensor with a batch first.", "Give tensors such as (1, 3, H, W).")
    one = [tensor[:1].detach() for tensor in inputs]
    try:
        with torch.inference_mode():
            returned = module(*one)
    except Exception as error:  # the user's code raises what it likes
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in one)
        raise ModelError(
            f"The module fails on an input of {shapes}: {type(error).__name__}: {str(error).splitlines()[0]}.",
            "Give example inputs that it takes (--image-size, or example_inputs in Python).",
        ) from error
    tensors = flattened(returned)
    return Example(
        dict(zip(input_names(module, len(one)), one, strict=True)),
        dict(zip(output_names(returned), tensors, strict=True)),
    )

"""What every part of a network answers, kept while the whole is evaluated.

A part is the stem, a norm, a block, a downsampling or the head.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor, nn

Outputs = dict[str, npt.NDArray[np.floating]]
"""By the part's name, in the order in which they are computed."""


@dataclasses.dataclass(frozen=True)
class ActivationTrace:
    """Outputs for one image: in FP32, in FP64, and with every module's output rounded (empty where nothing is rounded).

    The latter two are filled by `tolerance.derive_tolerances`, which evaluates both anyway.
    """

    exact: Outputs = dataclasses.field(default_factory=dict)
    double: Outputs = dataclasses.field(default_factory=dict)
    rounded: Outputs = dataclasses.field(default_factory=dict)


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's children, stages taken apart into blocks."""
    from torch import nn

    for name, part in model.named_children():
        if isinstance(part, nn.Sequential):
            yield from ((f"{name}.{index}", layer) for index, layer in part.named_children())
        else:
            yield name, part


@contextlib.contextmanager
def recording_activations(model: nn.Module, outputs: Outputs | None) -> Iterator[None]:
    """What the parts of `model` answer to the first image within the block, put into `outputs`, if any."""

    def keeper(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            assert outputs is not None
            outputs[path] = output[:1].numpy().copy()

        return hook

    wanted = () if outputs is None else parts_of(model)
    with contextlib.ExitStack() as hooks:
        for path, part in wanted:
            hooks.enter_context(part.register_forward_hook(keeper(path)))
        yield

"""PyTorch models on the CPU, in FP32 or FP64: the reference that everything else is compared with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from spach_deploy.runtime import TensorSpec
from spach_deploy.runtime.batching import Arrays, BatchLimits, Feeds, check_feeds, run_in_batches

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


class TorchRunner:
    """Runs a module whose forward takes the tensors of `inputs` in order and returns one tensor or a tuple of them.

    `inputs` gives names, dtypes and shapes as callers feed them. Floating inputs are converted to `dtype`, in which
    the model computes and its floating outputs come; a model in another dtype or in training mode is copied first, so
    that the caller's stays as it is.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, TensorSpec],
        *,
        output_names: tuple[str, ...] = ("logits",),
        dtype: Literal["float32", "float64"] = "float32",
        max_batch: int = 32,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._output_names = output_names
        self._max_batch = max_batch
        self._module: torch.nn.Module | None = None
        self.input_specs: Mapping[str, TensorSpec] = dict(inputs)
        self.output_specs: Mapping[str, TensorSpec] = {}

    @property
    def name(self) -> str:
        """What it is."""
        return f"PyTorch ({self._dtype})"

    def __enter__(self) -> Self:
        self._module = _ready(self._model, self._dtype)
        outputs = self._run_once(self._zeros())
        self.output_specs = {
            name: TensorSpec(str(array.dtype), (None, *array.shape[1:])) for name, array in outputs.items()
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._module = None

    def run(self, feeds: Feeds) -> Arrays:
        """Outputs of `feeds`; larger batches are split."""
        check_feeds(self.name, self.input_specs, feeds)
        return run_in_batches(self._run_once, feeds, BatchLimits(1, self._max_batch))

    def _run_once(self, feeds: Arrays) -> Arrays:
        import torch

        assert self._module is not None, "outside the runner's context"
        wanted = getattr(torch, self._dtype)
        tensors = [torch.from_numpy(feeds[name]) for name in self.input_specs]
        with torch.inference_mode():
            outputs = self._module(*(t.to(wanted) if t.is_floating_point() else t for t in tensors))
        values = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
        return {name: value.numpy() for name, value in zip(self._output_names, values, strict=True)}

    def _zeros(self) -> Arrays:
        """One sample of zeros, by which the outputs' shapes are learned."""
        import numpy as np

        return {
            name: np.zeros((1, *(extent or 1 for extent in spec.shape[1:])), spec.dtype)
            for name, spec in self.input_specs.items()
        }


def _ready(model: torch.nn.Module, dtype: str) -> torch.nn.Module:
    import torch

    wanted = getattr(torch, dtype)
    floating = [tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    if not model.training and all(have == wanted for have in floating):
        return model
    return copy.deepcopy(model).to(wanted).eval()

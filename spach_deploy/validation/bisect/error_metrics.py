"""What a place loses by rounding alone, given right inputs: FP32's noise, and what a narrower format costs there.

Both are measured, by computing the place once more from the inputs that the reference had.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spach_deploy.common.metrics import relative_l2
from spach_deploy.validation.bisect.probe_points import Computation, ProbeRecord, Rounding
from spach_deploy.validation.rounding_error import StorageFormat, converted, rounding_of
from spach_deploy.validation.tolerance import ROUNDING_FACTOR

MODULE_FP32_FACTOR = 4.0
"""Other kernels and other orders of summation than PyTorch's, for one place: errors of a network's depth do not add up
here, for which `validation.tolerance` allows its outputs more.
"""

_LEAST_NOISE = 1e-7
"""Somewhat more than FP32's unit roundoff of 6e-8: no place is computed better than that."""


@dataclasses.dataclass(frozen=True)
class RoundingErrors:
    """Relative L2 of one place: `noise` of FP32 against FP64, `loss` of the graph's precision against FP32."""

    noise: float
    loss: float

    @property
    def allowed(self) -> float:
        """Beyond it, given right inputs, it is no rounding."""
        return MODULE_FP32_FACTOR * self.noise + ROUNDING_FACTOR * self.loss


def measure(recorded: ProbeRecord, arithmetic: StorageFormat) -> RoundingErrors:
    """Noise and loss of a place, on the images it was recorded with."""
    exact = evaluate(recorded.computation, lambda tensor: tensor.double(), _nothing)
    noise = relative_l2(recorded.value, exact)
    loss = 0.0
    if arithmetic is not StorageFormat.FP32:
        rounding = rounding_of(arithmetic)
        loss = relative_l2(evaluate(recorded.computation, rounding, rounding), recorded.value)
    return RoundingErrors(max(noise, _LEAST_NOISE), loss)


def evaluate(computation: Computation, convert: Rounding, rounding: Rounding) -> NDArray[np.floating]:
    """The place's value (B, N, C) once more: weights and inputs through `convert`, results through `rounding`."""
    with torch.inference_mode():
        module = None if computation.module is None else converted(computation.module, convert)
        inputs = tuple(convert(tensor) for tensor in computation.inputs)
        value = rounding(computation.apply(module, inputs, rounding))
        result: NDArray[np.floating] = computation.rows.of(value).numpy()
    return result


def _nothing(tensor: Tensor) -> Tensor:
    return tensor

"""Demo weights: random weights in which every branch of a model contributes to its logits.

The logits of a freshly initialised SPACH model are exactly zero (its head is zero and gamma_1 is 1e-4), so comparing
them would prove nothing. Demo weights keep activations near unit variance.
"""

from __future__ import annotations

import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import nn

Float32Array = npt.NDArray[np.float32]


def load_demo_weights(model: nn.Module, seed: int = 0) -> None:
    """Overwrite every parameter and statistic of `model`, float32 on the CPU, in place.

    Values depend only on the tensor's name, its shape and the seed. Matrices and kernels are N(0, 1 / fan-in), gamma_1
    uniform in 0.1 to 1, norm weights near 1, biases N(0, 0.01), running variances uniform in 0.5 to 1.5. Shared tensors
    stay shared, with the values of the first of their names.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    with ThreadPoolExecutor() as pool:  # NumPy releases the interpreter's lock
        list(pool.map(lambda name: _fill(name, arrays[name], seed), arrays))


def _fill(name: str, array: Float32Array, seed: int) -> None:
    """Draw `array`, the tensor called `name`, in place."""
    stream = np.random.SeedSequence([seed, zlib.crc32(name.encode()), *array.shape])
    rng = np.random.Generator(np.random.PCG64(stream))
    if name.endswith("num_batches_tracked"):
        array[...] = 0
    elif name.endswith("running_var"):
        _uniform(rng, array, 0.5, 1.5)
    elif name.endswith("gamma_1"):
        _uniform(rng, array, 0.1, 1.0)
    elif array.ndim == 4 and array.shape[1] == 1:
        # Depthwise kernels are smaller: with each residual addition the stream grows, and late blocks must still count.
        _normal(rng, array, 0.0, 0.1)
    elif array.ndim >= 2:
        _normal(rng, array, 0.0, 1 / math.sqrt(math.prod(array.shape[1:])))
    else:
        _normal(rng, array, 1.0 if name.endswith("weight") else 0.0, 0.1)


def _normal(rng: np.random.Generator, array: Float32Array, mean: float, std: float) -> None:
    rng.standard_normal(dtype=np.float32, out=array)
    array *= np.float32(std)
    if mean:
        array += np.float32(mean)


def _uniform(rng: np.random.Generator, array: Float32Array, low: float, high: float) -> None:
    rng.random(dtype=np.float32, out=array)
    array *= np.float32(high - low)
    array += np.float32(low)

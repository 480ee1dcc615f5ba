"""A graph's inputs as data: one batch of images, or several inputs, of which some are images and others are not.

    takes = ModelInputs()                       # one input, images: a batch is an array (N, ...)
    takes = ModelInputs(("image", "vector"), ("image",), {"vector": rows})
    batch = takes.of(images, start=0)           # `Inputs`: arrays (N, ...) by name, whose rows are chosen together

Images are the pictures that a validation or calibration runs on. Of what is no image there are `rows`, which come from
the example inputs; picture i of a set gets row i, and after the last row the first one again. A second input of the
pictures' shape gets the picture mirrored, a third one upside down.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.outputs import INPUT
from spach_deploy.bundle.schema import IMAGE_LAYOUTS, TensorInfo

Array: TypeAlias = npt.NDArray[Any]
Chosen: TypeAlias = slice | list[int] | npt.NDArray[np.intp]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch of a graph with several inputs: arrays (N, ...) by name. `image`: the input that pictures go to.

    Indexed like an array, by a slice or numbers of rows, it gives a batch of these rows.
    """

    arrays: Mapping[str, Array]
    image: str

    def __len__(self) -> int:
        return len(self.arrays[self.image])

    def __getitem__(self, chosen: Chosen, /) -> Inputs:
        return Inputs({name: array[chosen] for name, array in self.arrays.items()}, self.image)


Batch: TypeAlias = Array | Inputs
"""A batch of inputs: an array (N, ...) where a graph has one, `Inputs` where it has several."""


def feeds_of(batch: Batch) -> dict[str, Array]:
    """The batch as a runner takes it: contiguous arrays by name."""
    named = batch.arrays if isinstance(batch, Inputs) else {INPUT: batch}
    return {name: np.ascontiguousarray(array) for name, array in named.items()}


def arrays_of(batch: Batch) -> tuple[Array, ...]:
    """The batch's arrays, in the order of the inputs."""
    return tuple(batch.arrays.values()) if isinstance(batch, Inputs) else (batch,)


def image_of(batch: Batch) -> Array:
    """The images among a batch's arrays."""
    return batch.arrays[batch.image] if isinstance(batch, Inputs) else batch


def changed(batch: Batch, change: Callable[[Array], Array]) -> Batch:
    """The batch with `change` applied to every array of it."""
    if isinstance(batch, Inputs):
        return Inputs({name: change(array) for name, array in batch.arrays.items()}, batch.image)
    return change(batch)


def as_floats(batch: Batch, dtype: type[np.floating[Any]]) -> Batch:
    """The batch with its floats in another dtype; integers and booleans stay."""
    return changed(batch, lambda array: array.astype(dtype) if array.dtype.kind == "f" else array)


def joined(parts: Sequence[Batch]) -> Batch:
    """Batches one after the other, as one."""
    first = parts[0]
    if isinstance(first, Inputs):
        named = [part.arrays for part in parts if isinstance(part, Inputs)]
        return Inputs({name: np.concatenate([part[name] for part in named]) for name in first.arrays}, first.image)
    return np.concatenate([image_of(part) for part in parts])


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """What a model takes: names of its inputs in order, those that are `images`, and `rows` (R, ...) of the others.

    The first of `images` is the one that pictures go to. `shape`: (C, H, W) of images, where no architecture says it.
    """

    names: tuple[str, ...] = (INPUT,)
    images: tuple[str, ...] = (INPUT,)
    rows: Mapping[str, Array] = dataclasses.field(default_factory=dict, repr=False)
    shape: tuple[int, ...] = ()

    @classmethod
    def of_batch(cls, batch: Batch, tensors: Sequence[TensorInfo]) -> ModelInputs:
        """Those of a bundle: `batch` is its golden pack's, whose values are the rows; `tensors` are its inputs."""
        if not isinstance(batch, Inputs):
            return cls()
        images = image_names(tensors)
        others = as_floats(batch, np.float32)
        assert isinstance(others, Inputs)
        rows = {name: array for name, array in others.arrays.items() if name not in images}
        pixels = image_of(batch)
        shape = (pixels.shape[3], *pixels.shape[1:3]) if pixels.dtype == np.uint8 else pixels.shape[1:]
        return cls(tuple(batch.arrays), images, rows, shape)

    @property
    def is_single(self) -> bool:
        """Whether a batch is an array."""
        return self.names == (INPUT,)

    @property
    def digest(self) -> str:
        """Hash of the names and rows, for what depends on them; empty for a single input."""
        if self.is_single:
            return ""
        found = hashlib.sha256(" ".join(self.names).encode())
        for name, array in self.rows.items():
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()[:16]

    def of(self, images: Array, start: int = 0) -> Batch:
        """The batch for images (n, C, H, W), or uint8 pixels (n, H, W, C), that are number `start` and following of
        their set. Other floats get the images' dtype where these are halves.
        """
        return self.at(images, range(start, start + len(images)))

    def at(self, images: Array, numbers: Sequence[int]) -> Batch:
        """The batch for images that have these numbers in their set."""
        if self.is_single:
            return images
        rows = self.rows_for(numbers)
        views = {name: _view(images, number) for number, name in enumerate(self.images)}
        batch = Inputs({name: views[name] if name in views else rows[name] for name in self.names}, self.images[0])
        return as_floats(batch, np.float16) if images.dtype == np.float16 else batch

    def rows_for(self, numbers: Sequence[int]) -> dict[str, Array]:
        """Rows of the inputs that are no images, for images that have these numbers in their set."""
        return {name: array[np.array(numbers) % len(array)] for name, array in self.rows.items()}


def _view(images: Array, number: int) -> Array:
    """The images for the image input of this number: as they are, mirrored, upside down, both, and so on."""
    height, width = (1, 2) if images.dtype == np.uint8 else (2, 3)  # (n, H, W, C), (n, C, H, W)
    axes = tuple(axis for axis, bit in ((width, 1), (height, 2)) if number & bit)
    return np.ascontiguousarray(np.flip(images, axes)) if axes else images


def image_names(tensors: Sequence[TensorInfo]) -> tuple[str, ...]:
    """Names of the inputs that are images; of one input alone its name."""
    if len(tensors) == 1:
        return (tensors[0].name,)
    return tuple(tensor.name for tensor in tensors if tensor.layout in IMAGE_LAYOUTS)


ROWS = 8
"""Rows that are made of an example of one row: as many as a golden pack has images."""


def rows_of(example: Array) -> Array:
    """Rows (R, ...) of an input that is no image, from an example of it (n, ...).

    Several rows that differ are taken as they are. Of one row, row i has its values rotated by i places, so that rows
    differ and no value is new. A row of floats that are all the same tells a shape and a magnitude alone: its rows are
    random numbers between half of it and it, or between 0 and 1 for zeros.
    """
    first = example[:1]
    if len(example) > 1 and not (example == first).all():
        return example
    if first.dtype.kind == "f" and (first == first.flat[0]).all():
        size = float(first.flat[0])
        drawn = np.random.default_rng(0).uniform(size=(ROWS, *first.shape[1:]))
        return np.asarray(size * (0.5 + drawn / 2) if size else drawn, first.dtype)
    flat = first.reshape(-1)
    return np.stack([np.roll(flat, row) for row in range(ROWS)]).reshape(ROWS, *first.shape[1:])

"""Split a batch of any size into pieces that a runner accepts, and check a runner's inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from spach_deploy.common.batches import ranges
from spach_deploy.common.errors import MismatchError
from spach_deploy.runtime import TensorSpec

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]
Feeds: TypeAlias = Mapping[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True)
class BatchLimits:
    """Smallest and largest batch that one call accepts."""

    min: int = 1
    max: int = 32

    @classmethod
    def of_shape(cls, leading: int | None, max_batch: int) -> BatchLimits:
        """Limits of an input whose first extent is `leading`: exactly that, or with None anything up to `max_batch`."""
        return cls(1, max_batch) if leading is None else cls(leading, leading)


def run_in_batches(run: Callable[[Arrays], Arrays], feeds: Feeds, limits: BatchLimits) -> Arrays:
    """Call `run` on pieces of `feeds` within `limits`, and concatenate the outputs along axis 0.

    A last piece that is too small is padded with copies of its last image, whose outputs are dropped.
    """
    pieces = [_run_piece(run, piece, limits.min) for piece in _pieces(feeds, limits.max)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _pieces(feeds: Feeds, size: int) -> Iterator[Arrays]:
    batch = len(next(iter(feeds.values())))
    for start, stop in ranges(batch, size):
        yield {name: array[start:stop] for name, array in feeds.items()}


def _run_piece(run: Callable[[Arrays], Arrays], piece: Arrays, smallest: int) -> Arrays:
    size = len(next(iter(piece.values())))
    filled = {name: _fill(array, smallest) for name, array in piece.items()}
    return {name: array[:size] for name, array in run(filled).items()}


def _fill(array: np.ndarray[Any, Any], smallest: int) -> np.ndarray[Any, Any]:
    missing = smallest - len(array)
    return array if missing <= 0 else np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])


def check_feeds(runner: str, specs: Mapping[str, TensorSpec], feeds: Feeds) -> None:
    """MismatchError unless `feeds` has exactly the inputs of `specs`, with their dtypes, shapes and one batch size."""
    if feeds.keys() != specs.keys():
        raise MismatchError(f"{runner} takes inputs {sorted(specs)}, not {sorted(feeds)}.")
    for name, spec in specs.items():
        _check_one(runner, name, spec, feeds[name])
    sizes = {name: array.shape[0] for name, array in feeds.items()}
    if len(set(sizes.values())) != 1 or not all(sizes.values()):
        raise MismatchError(f"{runner} needs one batch size of at least 1 for all inputs, not {sizes}.")


def _check_one(runner: str, name: str, spec: TensorSpec, array: np.ndarray[Any, Any]) -> None:
    # Axis 0 is the batch: `run_in_batches` splits or pads it.
    fits = array.ndim == len(spec.shape) and all(
        want in (None, have) for want, have in zip(spec.shape[1:], array.shape[1:], strict=True)
    )
    if str(array.dtype) != spec.dtype or not fits or not array.ndim:
        raise MismatchError(
            f"{runner} takes {name} as {spec.dtype} {_shown(spec.shape)}, not {array.dtype} {_shown(array.shape)}."
        )


def _shown(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("batch" if extent is None else str(extent) for extent in shape) + ")"

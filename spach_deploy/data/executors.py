"""Work on a set of images in parts, wherever the parts are worked on: the seam between what is computed and a cluster.

What is computed knows `Executor` and `Pool` alone. `spach_deploy.distributed` has them for Ray.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.data.images import ImageEntry, Skipped


class Executor(Protocol):
    """Where tasks run."""

    @property
    def workers(self) -> int:
        """How many at once."""

    def map(self, function: Callable[[Any, Any], Any], common: Any, items: Iterable[Any]) -> Iterator[Any]:
        """`function(common, item)` of each item, in the items' order."""


class Pool(Protocol):
    """Workers that were prepared once, each with a state of its own."""

    @property
    def workers(self) -> int:
        """How many there are."""

    def map(self, function: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """`function(state, item)` of each item, in the items' order; of a few items before their results are taken."""


class Cluster(Protocol):
    """Where tasks run and pools are made. Both raise UnavailableError where there is no room for one worker."""

    def executor(self, memory_bytes: float) -> Executor:
        """Tasks of a core and so much memory each."""

    def pool(self, prepare: Callable[[Any], Any], common: Any, memory_bytes: float) -> AbstractContextManager[Pool]:
        """Workers of a core and so much memory each, whose states are `prepare(common)`, while the block lasts."""


@dataclasses.dataclass(frozen=True)
class LocalExecutor:
    """This process as the one worker of a `Pool`."""

    state: Any
    workers: int = 1

    def map(self, function: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """One item after the other."""
        return (function(self.state, item) for item in items)


def chunked(entries: Iterator[ImageEntry], size: int) -> Iterator[tuple[ImageEntry, ...]]:
    """Runs of `size` entries; the last may be shorter."""
    while chunk := tuple(itertools.islice(entries, size)):
        yield chunk


def check_unreadable(entry: ImageEntry, problem: Skipped) -> None:
    """UsageError where an image that a task could not read can be read here."""
    try:
        entry.load()
    except ImageError:
        return
    raise UsageError(
        f"A node cannot read {entry.name}, which this machine can ({problem.reason.rstrip('.')}).",
        "Put the images where every node finds them under the same path, or into a tar or npz.",
    )

"""Where work runs that is done in parts: this process, or a cluster that a command hands in.

What is computed knows these interfaces alone; `spach_deploy.distributed` has them for Ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol


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


class ClusterAddress(Protocol):
    """A cluster that is not connected to yet. Both raise UnavailableError where none answers."""

    def check(self) -> None:
        """Refuse what can be refused soon, before any work."""

    def connected(self) -> AbstractContextManager[Cluster]:
        """The cluster, while the block lasts."""


@dataclasses.dataclass(frozen=True)
class LocalExecutor:
    """This process as the one worker of a `Pool`."""

    state: Any
    workers: int = 1

    def map(self, function: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """One item after the other."""
        return (function(self.state, item) for item in items)

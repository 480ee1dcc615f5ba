"""Interfaces for running the same function on many items: in this process, or on a cluster that a command passes in.

Calibration, validation and the choice of layers use these interfaces only; `spach_deploy.distributed` implements them
with Ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Executor(Protocol):
    """Runs stateless tasks."""

    @property
    def workers(self) -> int:
        """How many tasks run at once."""

    def map(self, function: Callable[[Any, Any], Any], common: Any, items: Iterable[Any]) -> Iterator[Any]:
        """`function(common, item)` of each item, in the items' order."""


class Pool(Protocol):
    """Workers that are prepared once and keep a state of their own, such as a model in memory."""

    @property
    def workers(self) -> int:
        """How many workers there are."""

    def map(self, function: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """`function(state, item)` of each item, in the items' order. Reads a few items ahead of the results taken."""


class Cluster(Protocol):
    """A connected cluster. Both methods raise UnavailableError where it has no room for one worker."""

    def executor(self, memory_bytes: float) -> Executor:
        """An executor whose tasks take one core and `memory_bytes` each."""

    def pool(self, prepare: Callable[[Any], Any], common: Any, memory_bytes: float) -> AbstractContextManager[Pool]:
        """Workers of one core and `memory_bytes` each, with the state `prepare(common)`; they stop with the block."""


class ClusterAddress(Protocol):
    """A cluster that is not connected yet. Both methods raise UnavailableError where none answers."""

    def check(self) -> None:
        """A quick check that the cluster answers, before any work."""

    def connected(self) -> AbstractContextManager[Cluster]:
        """Connect to the cluster for the duration of the block."""


@dataclasses.dataclass(frozen=True)
class LocalExecutor:
    """A `Pool` whose only worker is this process."""

    state: Any
    workers: int = 1

    def map(self, function: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """One item after the other."""
        return (function(self.state, item) for item in items)

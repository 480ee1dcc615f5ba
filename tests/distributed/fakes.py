"""What stands for a cluster in tests without one: all in this process, in an order of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any


class Elsewhere:
    """An executor that computes parts in an order of its own, and hands results over in the items' order."""

    def __init__(self, workers: int = 2) -> None:
        self.workers = workers
        self.called: list[str] = []

    def map(self, function: Callable[[Any, Any], Any], common: Any, items: Iterable[Any]) -> Iterator[Any]:
        listed = list(items)
        order = list(range(len(listed)))
        random.Random(7).shuffle(order)
        self.called.append(function.__name__)
        results = {place: function(common, listed[place]) for place in order}
        return (results[place] for place in range(len(listed)))


@dataclasses.dataclass
class FakePool:
    """Two workers, of which each has a state of its own; what goes between is a copy, as between machines."""

    states: list[Any]
    watch: Callable[[Any], None] = lambda item: None

    @property
    def workers(self) -> int:
        return len(self.states)

    def map(self, function: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """One item at a time, by another worker than the one before."""
        for number, item in enumerate(items):
            self.watch(item)
            yield pickle.loads(pickle.dumps(function(self.states[number % self.workers], item)))


@dataclasses.dataclass
class FakeCluster:
    """An executor and pools; `pools` are the memory that each pool's workers asked for."""

    watch: Callable[[Any], None] = lambda item: None
    pools: list[float] = dataclasses.field(default_factory=list)

    def executor(self, memory_bytes: float) -> Elsewhere:
        return Elsewhere()

    @contextlib.contextmanager
    def pool(self, prepare: Callable[[Any], Any], common: Any, memory_bytes: float) -> Iterator[FakePool]:
        self.pools.append(memory_bytes)
        sent = pickle.dumps(common)
        yield FakePool([prepare(pickle.loads(sent)), prepare(pickle.loads(sent))], self.watch)

    def check(self) -> None:
        """It answers."""

    def connected(self) -> AbstractContextManager[FakeCluster]:
        """Its own address, too."""
        return contextlib.nullcontext(self)

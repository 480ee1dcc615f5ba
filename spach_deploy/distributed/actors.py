"""A pool of Ray actors: workers that are prepared once, for example with a model in memory, and take many items.

Neither Ray Data nor Ray's own actor pool fits. Ray Data needs pyarrow and pandas, where plain Python objects in order
are enough. Ray's restart of actors (`max_restarts`, `max_task_retries`) keeps the items of a dead actor waiting until a
node has room for it, for ever where none is added. This pool gives the items of a dead actor to the others, and starts
a new actor, which joins when there is room.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from spach_deploy.common.errors import SpachError, UnavailableError
from spach_deploy.common.versions import tool_versions
from spach_deploy.distributed.cluster import (
    RayExecutor,
    check_address,
    check_code,
    checked_worker_slots,
    connected,
    worker_slots,
)
from spach_deploy.pipeline.cache import code_digest

TRIES = 5
"""How often an item is tried before it is blamed for the deaths of its workers."""

_EACH = 2
"""Items at each actor: one that runs, and one that is ready to follow."""

_WINDOW = 4
"""Largest number of items for each actor ahead of the one whose result comes next."""

_POLL_S = 1.0


@dataclasses.dataclass(frozen=True)
class RayCluster:
    """The cluster that the package `ray` is connected to. See `spach_deploy.common.executors.Cluster`."""

    ray: Any

    def executor(self, memory_bytes: float) -> RayExecutor:
        """An executor whose tasks take one core and `memory_bytes` each."""
        return RayExecutor(self.ray, memory_bytes)

    @contextlib.contextmanager
    def pool(self, prepare: Callable[[Any], Any], common: Any, memory_bytes: float) -> Iterator[ActorPool]:
        """Actors of one core and `memory_bytes` each, as many as the cluster has room for."""
        pool = ActorPool(self.ray, prepare, common, memory_bytes)
        try:
            yield pool
        finally:
            pool.close()


@contextlib.contextmanager
def cluster_at(address: str) -> Iterator[RayCluster]:
    """Connect to the cluster at an address for the block. Raises what `cluster.connected` raises."""
    check_address(address)
    with connected(address) as ray:
        yield RayCluster(ray)


@dataclasses.dataclass(frozen=True)
class RayAddress:
    """See `spach_deploy.common.executors.ClusterAddress`. `address`: as `cluster.connected` takes it."""

    address: str

    def check(self) -> None:
        """Raises MissingPackageError without ray, UnavailableError where nothing listens at the address."""
        check_address(self.address)

    def connected(self) -> AbstractContextManager[RayCluster]:
        """Connect to the cluster for the block. Raises what `cluster.connected` raises."""
        return cluster_at(self.address)


@dataclasses.dataclass
class _Item:
    number: int
    value: Any
    tries: int = 0


class _Queue:
    """Items that no actor has: first those given back, then those not taken yet."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._remaining = (_Item(number, value) for number, value in enumerate(items))
        self._first: collections.deque[_Item] = collections.deque()

    def __bool__(self) -> bool:
        if not self._first and (item := next(self._remaining, None)) is not None:
            self._first.append(item)
        return bool(self._first)

    def take(self, end: int) -> _Item | None:
        """The next item, where its number is below `end`."""
        return self._first.popleft() if self and self._first[0].number < end else None

    def give_back(self, items: Iterable[_Item]) -> None:
        """Put items in front of all others."""
        self._first.extendleft(sorted(items, key=lambda item: -item.number))


class ActorPool:
    """See `spach_deploy.common.executors.Pool`. Raises UnavailableError where there is no room for one actor."""

    def __init__(self, ray: Any, prepare: Callable[[Any], Any], common: Any, memory_bytes: float) -> None:
        self._ray, self._memory_bytes = ray, memory_bytes
        self.workers = checked_worker_slots(ray, memory_bytes)
        options = {"num_cpus": 1, "memory": int(memory_bytes), "max_restarts": 0}
        self._remote = ray.remote(**options)(ActorWorker)
        self._arguments = (prepare, ray.put(common), SoftwareVersions.here())
        self._starting: dict[Any, Any] = {}
        self._failed_starts = 0
        self._alive: list[Any] = []
        self._running: dict[Any, tuple[Any, _Item]] = {}
        for _ in range(self.workers):
            self._start()

    def map(self, function: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """`function(state, item)` of each item, in the items' order.

        Raises the SpachError of a worker, and UnavailableError where no node is left or an item ends every worker.
        """
        queue, done, number = _Queue(items), dict[int, Any](), 0
        try:
            while queue or self._running or done:
                self._hand_out(function, queue, number + _WINDOW * self.workers)
                done.update(self._ended(queue))
                while number in done:
                    yield done.pop(number)
                    number += 1
        finally:
            for reference in self._running:
                self._ray.cancel(reference)
            self._running.clear()

    def close(self) -> None:
        """Kill all actors."""
        for actor in (*self._alive, *self._starting.values()):
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)

    def _start(self) -> None:
        """Start one more actor, which gets items once its `ready` returns."""
        actor = self._remote.remote(*self._arguments)
        self._starting[actor.ready.remote()] = actor

    def _hand_out(self, function: Callable[[Any, Any], Any], queue: _Queue, end: int) -> None:
        """Give items with numbers below `end` to actors with room; every actor gets one before any gets a second."""
        load = collections.Counter(id(actor) for actor, _ in self._running.values())
        for depth in range(_EACH):
            for actor in self._alive:
                if load[id(actor)] > depth:
                    continue
                if (item := queue.take(end)) is None:
                    return
                item.tries += 1
                self._running[actor.run.remote(function, item.value)] = (actor, item)
                load[id(actor)] += 1

    def _ended(self, queue: _Queue) -> dict[int, Any]:
        """Wait up to a second for a result, and return it by its item's number. Items of dead actors go back."""
        waited = [*self._running, *self._starting]
        ready, _ = self._ray.wait(waited, num_returns=1, timeout=_POLL_S)
        if not ready and not self._alive and not worker_slots(self._ray, self._memory_bytes):
            raise UnavailableError("The cluster has no node left that could go on.", "Add nodes and run again.")
        for reference in ready:
            if reference in self._starting:
                self._join(reference)
            else:
                return self._result(reference, queue)
        return {}

    def _join(self, reference: Any) -> None:
        """Handle an actor whose start ended: it joins the others, or another is started where it died."""
        actor = self._starting.pop(reference)
        try:
            problem = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:  # an exception of our own code, no dead node
            raise
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            self._check_tries(self._failed_starts, error)
            self._start()
            return
        if isinstance(problem, SpachError):
            raise problem
        self._alive.append(actor)
        self._failed_starts = 0

    def _result(self, reference: Any, queue: _Queue) -> dict[int, Any]:
        actor, item = self._running[reference]
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:  # an exception of our own code, no dead node
            raise
        except self._ray.exceptions.RayError as error:
            self._lost(actor, queue, error)
            return {}
        del self._running[reference]
        if isinstance(result, SpachError):
            raise result
        return {item.number: result}

    def _lost(self, actor: Any, queue: _Queue, error: Exception) -> None:
        """Handle an actor that died or whose results are lost: its items go back, and another actor is started."""
        lost = [reference for reference, (owner, _) in self._running.items() if owner is actor]
        items = [self._running.pop(reference)[1] for reference in lost]
        self._check_tries(max(item.tries for item in items), error)
        queue.give_back(items)
        self._alive.remove(actor)
        self._ray.kill(actor)
        self._start()

    def _check_tries(self, tries: int, error: Exception) -> None:
        if tries >= TRIES:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise UnavailableError(f"Workers end again and again ({reason}).", "Give the nodes more memory.")


@dataclasses.dataclass(frozen=True)
class SoftwareVersions:
    """This package's code and the versions of packages, which must be the same on every node."""

    code: str
    tools: dict[str, str]

    @classmethod
    def here(cls) -> SoftwareVersions:
        """The versions in this process."""
        return cls(code_digest(), tool_versions())

    def check(self) -> None:
        """On a node: UnavailableError where code or a package differs from the machine that made this object."""
        check_code(self.code)
        installed = tool_versions()
        for package, version in self.tools.items():
            if (own := installed.get(package, "none")) != version:
                raise UnavailableError(
                    f"A node of the cluster has {package} {own}, this machine has {version}.",
                    "Install the same packages on every node.",
                )


class ActorWorker:
    """The actor on a node: it prepares its state, then applies functions to it and to items."""

    def __init__(self, prepare: Callable[[Any], Any], common: Any, versions: SoftwareVersions) -> None:
        self._state: Any = None
        self._error: Exception | None = None
        try:
            versions.check()
            self._state = prepare(common)
        except Exception as error:  # raised in a constructor, Ray would report a dead actor
            self._error = error

    def ready(self) -> SpachError | None:
        """Returns None when the state is prepared, or a SpachError from preparing it. Raises any other error."""
        if self._error is None or isinstance(self._error, SpachError):
            return self._error
        raise self._error

    def run(self, function: Callable[[Any, Any], Any], item: Any) -> Any:
        """The function's result, or its SpachError."""
        try:
            return function(self._state, item)
        except SpachError as error:
            return error

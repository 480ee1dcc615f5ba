"""A pool of Ray actors: workers that were prepared once, such as with a model in memory, and take many items.

Neither Ray Data nor Ray's own pool is used: Ray Data needs pyarrow and pandas for what are here Python objects in their
order, and Ray's restart of an actor (`max_restarts`, `max_task_retries`) keeps the actor's items waiting until a node
has room for it, for ever where none is added. Here the items of an actor that died go to those that live, and another
actor is asked for, which joins them once there is room.
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
from spach_deploy.distributed.cluster import RayExecutor, check_address, check_code, checked_places, connected, places
from spach_deploy.pipeline.cache import code_digest

TRIES = 5
"""How often an item is tried before it counts as what kills its workers."""

_EACH = 2
"""Items at an actor: the next one is there when one ends."""

_WINDOW = 4
"""For each actor: items ahead of the one whose result is waited for, at most."""

_POLL_S = 1.0


@dataclasses.dataclass(frozen=True)
class RayCluster:
    """The cluster that `ray` is connected to."""

    ray: Any

    def executor(self, memory_bytes: float) -> RayExecutor:
        """Tasks of a core and so much memory each."""
        return RayExecutor(self.ray, memory_bytes)

    @contextlib.contextmanager
    def pool(self, prepare: Callable[[Any], Any], common: Any, memory_bytes: float) -> Iterator[ActorPool]:
        """Actors of a core and so much memory each, as many as there is room for."""
        pool = ActorPool(self.ray, prepare, common, memory_bytes)
        try:
            yield pool
        finally:
            pool.close()


@contextlib.contextmanager
def cluster_at(address: str) -> Iterator[RayCluster]:
    """The cluster at an address, while the block lasts. Raises what `connect.connected` raises."""
    check_address(address)
    with connected(address) as ray:
        yield RayCluster(ray)


@dataclasses.dataclass(frozen=True)
class RayAddress:
    """See `spach_deploy.common.executors.ClusterAddress`. `address`: as `cluster.connected` takes it."""

    address: str

    def check(self) -> None:
        """Raises MissingPackageError without ray, UnavailableError where nobody listens."""
        check_address(self.address)

    def connected(self) -> AbstractContextManager[RayCluster]:
        """The cluster, while the block lasts. Raises what `cluster.connected` raises."""
        return cluster_at(self.address)


@dataclasses.dataclass
class _Item:
    number: int
    value: Any
    tries: int = 0


class _Queue:
    """Items that no actor has: those that came back, then those that were not taken yet."""

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
        """Items, to be taken before all others."""
        self._first.extendleft(sorted(items, key=lambda item: -item.number))


class ActorPool:
    """See `spach_deploy.common.executors.Pool`. Raises UnavailableError where there is no room for one actor."""

    def __init__(self, ray: Any, prepare: Callable[[Any], Any], common: Any, memory_bytes: float) -> None:
        self._ray, self._memory_bytes = ray, memory_bytes
        self.workers = checked_places(ray, memory_bytes)
        options = {"num_cpus": 1, "memory": int(memory_bytes), "max_restarts": 0}
        self._remote = ray.remote(**options)(ActorWorker)
        self._arguments = (prepare, ray.put(common), Identity.here())
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
        """End all actors."""
        for actor in (*self._alive, *self._starting.values()):
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)

    def _start(self) -> None:
        """Ask for one more actor; it takes items once it says that it is ready."""
        actor = self._remote.remote(*self._arguments)
        self._starting[actor.ready.remote()] = actor

    def _hand_out(self, function: Callable[[Any, Any], Any], queue: _Queue, end: int) -> None:
        """Give items below the number `end` to actors that have room, one each before a second one."""
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
        """Results of what was done within a moment, by item; items of an actor that died go back."""
        waited = [*self._running, *self._starting]
        ready, _ = self._ray.wait(waited, num_returns=1, timeout=_POLL_S)
        if not ready and not self._alive and not places(self._ray, self._memory_bytes):
            raise UnavailableError("The cluster has no node left that could go on.", "Add nodes and run again.")
        for reference in ready:
            if reference in self._starting:
                self._join(reference)
            else:
                return self._result(reference, queue)
        return {}

    def _join(self, reference: Any) -> None:
        """An actor is ready, or died before it was."""
        actor = self._starting.pop(reference)
        try:
            problem = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:  # a fault of this program
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
        except self._ray.exceptions.RayTaskError:  # a fault of this program
            raise
        except self._ray.exceptions.RayError as error:
            self._lost(actor, queue, error)
            return {}
        del self._running[reference]
        if isinstance(result, SpachError):
            raise result
        return {item.number: result}

    def _lost(self, actor: Any, queue: _Queue, error: Exception) -> None:
        """An actor, or what it had done, is gone: its items go back, and another actor is asked for."""
        mine = [reference for reference, (owner, _) in self._running.items() if owner is actor]
        items = [self._running.pop(reference)[1] for reference in mine]
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
class Identity:
    """What decides the numbers on a node: this package's code, and versions by package."""

    code: str
    tools: dict[str, str]

    @classmethod
    def here(cls) -> Identity:
        """Of this process."""
        return cls(code_digest(), tool_versions())

    def check(self) -> None:
        """On a node: UnavailableError where something is another than there."""
        check_code(self.code)
        here = tool_versions()
        for package, version in self.tools.items():
            if (found := here.get(package, "none")) != version:
                raise UnavailableError(
                    f"A node of the cluster has {package} {found}, this machine has {version}.",
                    "Install the same packages on every node.",
                )


class ActorWorker:
    """On a node: the state, and the items that it is applied to."""

    def __init__(self, prepare: Callable[[Any], Any], common: Any, identity: Identity) -> None:
        self._state: Any = None
        self._error: Exception | None = None
        try:
            identity.check()
            self._state = prepare(common)
        except Exception as error:  # raised here it would look as if the node had died
            self._error = error

    def ready(self) -> SpachError | None:
        """Once it can begin: None, or the error that a user can act on. Raises any other."""
        if self._error is None or isinstance(self._error, SpachError):
            return self._error
        raise self._error

    def run(self, function: Callable[[Any, Any], Any], item: Any) -> Any:
        """The function's result, or the error that a user can act on."""
        try:
            return function(self._state, item)
        except SpachError as error:
            return error

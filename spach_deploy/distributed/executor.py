"""Tasks on a Ray cluster, which Ray does again elsewhere when a node dies."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from spach_deploy.common.errors import SpachError, UnavailableError
from spach_deploy.pipeline.cache import code_digest

RETRIES = 5
_AHEAD = 2
"""Tasks that are handed over for each that can run: the next one is there when one ends."""


class RayExecutor:
    """Tasks on the cluster that `ray` is connected to, a core each."""

    def __init__(self, ray: Any, memory_bytes: float) -> None:
        self._ray = ray
        options = {"num_cpus": 1, "memory": int(memory_bytes), "max_retries": RETRIES}
        self._remote = ray.remote(**options)(in_a_task)
        self.workers = checked_places(ray, memory_bytes)

    def map(self, function: Callable[[Any, Any], Any], common: Any, items: Iterable[Any]) -> Iterator[Any]:
        """Results in the items' order; a few tasks are ahead of the one that is waited for."""
        shared, code = self._ray.put(common), code_digest()
        waiting: collections.deque[Any] = collections.deque()
        remaining = iter(items)
        try:
            while True:
                while len(waiting) < _AHEAD * self.workers and (item := next(remaining, None)) is not None:
                    waiting.append(self._remote.remote(function, shared, item, code))
                if not waiting:
                    return
                result = self._ray.get(waiting[0])
                waiting.popleft()
                if isinstance(result, SpachError):
                    raise result
                yield result
        finally:
            for reference in waiting:
                self._ray.cancel(reference, force=True)


def places(ray: Any, memory_bytes: float) -> int:
    """How many workers of a core and so much memory the cluster has room for."""
    total = 0.0
    for node in ray.nodes():
        resources = node["Resources"] if node["Alive"] else {}
        total += min(resources.get("CPU", 0.0), resources.get("memory", 0.0) // memory_bytes)
    return int(total)


def checked_places(ray: Any, memory_bytes: float) -> int:
    """The same. UnavailableError where that is none."""
    found = places(ray, memory_bytes)
    if found < 1:
        raise UnavailableError(
            f"No node of the cluster has a core and {memory_bytes / 1e9:.1f} GB of memory for a task.",
            "Add nodes, or do it without --ray.",
        )
    return found


def check_code(code: str) -> None:
    """On a node: UnavailableError where its code is another."""
    if code_digest() != code:
        raise UnavailableError(
            "A node of the cluster has another version of spach-deploy.", "Install the same one on every node."
        )


def in_a_task(function: Callable[[Any, Any], Any], common: Any, item: Any, code: str) -> Any:
    """On a node: the function's result, or the error that a user can act on."""
    try:
        check_code(code)
        return function(common, item)
    except SpachError as error:
        return error

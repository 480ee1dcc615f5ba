"""Calibration on a Ray cluster: parts of the set as tasks, which Ray does again elsewhere when a node dies."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from onnx import ModelProto

from spach_deploy.cache.key import code_digest
from spach_deploy.cluster.connect import check_address, connected
from spach_deploy.data.readers import ImageSource
from spach_deploy.engine.worker import Failed
from spach_deploy.errors import SpachError, UnavailableError
from spach_deploy.quantization.calibrate import Run, Seen
from spach_deploy.quantization.shards import collect_in_parts
from spach_deploy.quantization.statistics import Wanted
from spach_deploy.specs import Preprocessing

RETRIES = 5
_AHEAD = 2
"""Tasks that are handed over for each that can run: the next one is there when one ends."""

_BASE_BYTES = 700e6
"""Memory of a task beside its graph: Python, ONNX Runtime, one image's activations, statistics."""

_COPIES = 3
"""Of the graph in a task: as it came, read, and in ONNX Runtime."""


class RayExecutor:
    """Tasks on the cluster that `ray` is connected to, a core each."""

    def __init__(self, ray: Any, memory_bytes: float) -> None:
        self._ray = ray
        options = {"num_cpus": 1, "memory": int(memory_bytes), "max_retries": RETRIES}
        self._remote = ray.remote(**options)(in_a_task)
        self.workers = self._places(memory_bytes)

    def _places(self, memory_bytes: float) -> int:
        """How many tasks the cluster runs at once. UnavailableError where that is none."""
        total = 0.0
        for node in self._ray.nodes():
            resources = node["Resources"] if node["Alive"] else {}
            total += min(resources.get("CPU", 0.0), resources.get("memory", 0.0) // memory_bytes)
        if total < 1:
            raise UnavailableError(
                f"No node of the cluster has a core and {memory_bytes / 1e9:.1f} GB of memory for a task.",
                "Add nodes, or calibrate without --ray.",
            )
        return int(total)

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
                if isinstance(result, Failed):
                    raise result.error()
                yield result
        finally:
            for reference in waiting:
                self._ray.cancel(reference, force=True)


def in_a_task(function: Callable[[Any, Any], Any], common: Any, item: Any, code: str) -> Any:
    """On a node: the function's result, or the error that a user can act on."""
    try:
        if code_digest() != code:
            raise UnavailableError(
                "A node of the cluster has another version of spach-deploy.", "Install the same one on every node."
            )
        return function(common, item)
    except SpachError as error:
        return Failed(type(error), dict(vars(error)))


def collect_on_cluster(
    address: str,
    model: ModelProto,
    wanted: Sequence[Wanted],
    source: ImageSource,
    preprocessing: Preprocessing,
    run: Run,
) -> Seen:
    """What `calibrate.collect` gives, from the nodes of the cluster at `address`.

    Raises MissingPackageError without ray, UnavailableError where no cluster answers, and what `collect` raises.
    """
    check_address(address)
    run = dataclasses.replace(run, threads=1)  # a task has one core
    with connected(address) as ray:
        executor = RayExecutor(ray, _BASE_BYTES + _COPIES * model.ByteSize())
        return collect_in_parts(model, wanted, source, preprocessing, run, executor)

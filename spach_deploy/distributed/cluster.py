"""Connecting to a Ray cluster, stateless tasks on it, and cores of one machine shared among processes.

`connected` connects to a running cluster, or starts one on this machine, for a block. `RayExecutor` runs tasks, which
Ray repeats elsewhere when a node dies. `cores` reserves cores for a process where several exports run on one node.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from spach_deploy.common import operating_system
from spach_deploy.common.errors import MissingPackageError, SpachError, UnavailableError
from spach_deploy.common.files import lock_file, private_folder
from spach_deploy.common.machine import available_threads
from spach_deploy.common.versions import refuse_old
from spach_deploy.pipeline.cache import code_digest

RETRIES = 5
"""How often Ray repeats a task whose worker died."""

_AHEAD = 2
"""Tasks submitted for each one that can run, so that another is ready when one ends."""


class RayExecutor:
    """Runs tasks of one core each on the cluster that `ray` is connected to. See `common.executors.Executor`."""

    def __init__(self, ray: Any, memory_bytes: float) -> None:
        self._ray = ray
        options = {"num_cpus": 1, "memory": int(memory_bytes), "max_retries": RETRIES}
        self._remote = ray.remote(**options)(in_a_task)
        self.workers = checked_worker_slots(ray, memory_bytes)

    def map(self, function: Callable[[Any, Any], Any], common: Any, items: Iterable[Any]) -> Iterator[Any]:
        """`function(common, item)` of each item, in the items' order. Raises the SpachError of a task."""
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


def worker_slots(ray: Any, memory_bytes: float) -> int:
    """How many workers with one core and `memory_bytes` each the cluster has room for."""
    total = 0.0
    for node in ray.nodes():
        resources = node["Resources"] if node["Alive"] else {}
        total += min(resources.get("CPU", 0.0), resources.get("memory", 0.0) // memory_bytes)
    return int(total)


def checked_worker_slots(ray: Any, memory_bytes: float) -> int:
    """`worker_slots`, or UnavailableError where there is none."""
    slots = worker_slots(ray, memory_bytes)
    if slots < 1:
        raise UnavailableError(
            f"No node of the cluster has a core and {memory_bytes / 1e9:.1f} GB of memory for a task.",
            "Add nodes, or do it without --ray.",
        )
    return slots


def check_code(code: str) -> None:
    """On a node: UnavailableError where it has another version of this package's code than `code`, a digest."""
    if code_digest() != code:
        raise UnavailableError(
            "A node of the cluster has another version of spach-deploy.", "Install the same one on every node."
        )


def in_a_task(function: Callable[[Any, Any], Any], common: Any, item: Any, code: str) -> Any:
    """On a node: the function's result, or its SpachError."""
    try:
        check_code(code)
        return function(common, item)
    except SpachError as error:
        return error


LOCAL = "local"
"""Address of a cluster on this machine alone, started for the command and stopped with it."""

INSTALL = "pip install 'spach-deploy[ray]'"
_ANSWER_S, _HEALTH_S = 5.0, 30.0


def import_ray() -> Any:
    """Import ray. MissingPackageError without it, OldPackageError where it is too old."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    refuse_old("ray")
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise MissingPackageError("ray", "--ray", INSTALL) from None


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The package `ray`, connected to the cluster at `address` for the block.

    `address`: host:port, `auto` for a cluster that runs on this machine, or LOCAL. Call `check_address` first, because
    Ray waits for minutes where nothing answers. Raises MissingPackageError without ray, UnavailableError where no
    cluster answers or the connection is lost. Within the block, standard output goes to standard error, because Ray
    prints messages about dead nodes there.
    """
    ray = import_ray()
    logging = {"log_to_driver": False, "logging_level": "ERROR"}
    local = {"include_dashboard": False, "num_cpus": available_threads()} if address == LOCAL else {}
    with contextlib.redirect_stdout(sys.stderr):
        try:
            ray.init(address=address, **logging, **local)
        except Exception as error:  # of many types, by version of Ray and by cause
            raise _no_cluster(address, str(error)) from error
        try:
            yield ray
        except ray.exceptions.RayError as error:
            raise UnavailableError(
                f"The Ray cluster was lost ({_first_line(str(error))}).",
                "Run the same command again.",
            ) from error
        finally:
            ray.shutdown()


def check_address(address: str) -> None:
    """Check quickly that a Ray cluster answers at `address`.

    Raises MissingPackageError without ray, UnavailableError where nothing listens or it is not Ray.
    """
    import_ray()
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), _ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(getattr(error, "strerror", "") or error)) from None
    if "://" not in address:
        _check_health(address)


def _check_health(address: str) -> None:
    """UnavailableError unless Ray listens at `address`, by Ray's own health check in a child process with a timeout."""
    call = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        healthy = subprocess.run(call, capture_output=True, timeout=_HEALTH_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        healthy = False
    if not healthy:
        raise _no_cluster(address, "something listens there, and does not answer as Ray does")


def _no_cluster(address: str, reason: str) -> UnavailableError:
    return UnavailableError(
        f"No Ray cluster answers at {address} ({_first_line(reason)}).",
        "Start one with `ray start --head`, give its address, or --ray alone for this machine.",
    )


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason was given"])[0].rstrip(".")


@contextlib.contextmanager
def cores(count: int) -> Iterator[frozenset[int]]:
    """Reserve `count` cores among this user's processes on this machine; all cores where too few are free.

    Each core has a lock file, which the kernel releases when a process ends for any reason. The files are in a private
    directory of this user; where another user has made that directory, all cores are returned.
    """
    known = operating_system.usable_cores()
    with contextlib.ExitStack() as stack:
        held: list[int] = []
        with contextlib.suppress(OSError):
            folder = private_folder(Path(tempfile.gettempdir()) / f"spach-deploy-cores-{operating_system.user_name()}")
            for core in known:
                if len(held) < count and _taken(folder / str(core), stack):
                    held.append(core)
        yield frozenset(held) if len(held) == count else frozenset(known)


def _taken(file: Path, stack: contextlib.ExitStack) -> bool:
    try:
        operating_system.lock(stack.enter_context(lock_file(file)), wait=False)
    except OSError:
        return False
    return True

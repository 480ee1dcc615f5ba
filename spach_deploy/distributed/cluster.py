"""Tasks on a Ray cluster, which Ray does again elsewhere when a node dies.

A Ray cluster, for as long as a block lasts: one that runs already, or this machine as one.

Cores of a machine, shared out among processes that do not know of each other.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import importlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from spach_deploy.common.errors import MissingPackageError, SpachError, UnavailableError
from spach_deploy.common.files import lock_file, private_folder
from spach_deploy.common.machine import available_threads
from spach_deploy.common.versions import refuse_old
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


LOCAL = "local"
"""Address of a cluster that is this machine, started for the command and ended with it."""

INSTALL = "pip install 'spach-deploy[ray]'"
_ANSWER_S, _HEALTH_S = 5.0, 30.0


def import_ray() -> Any:
    """The package. MissingPackageError without it, OldPackageError where it is too old."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    refuse_old("ray")
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise MissingPackageError("ray", "--ray", INSTALL) from None


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The package `ray`, connected to the cluster at `address`: host:port, `auto` for one on this machine, or LOCAL.

    `check_address` first: Ray waits for minutes where nobody answers. Raises MissingPackageError without ray,
    UnavailableError where no cluster answers or where it is lost. Within the block standard output is standard error:
    Ray prints there when a node dies, in the middle of what a command prints.
    """
    ray = import_ray()
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    local = {"include_dashboard": False, "num_cpus": available_threads()} if address == LOCAL else {}
    with contextlib.redirect_stdout(sys.stderr):
        try:
            ray.init(address=address, **quiet, **local)
        except Exception as error:  # of many kinds, by version and by what is wrong
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
    """Refuse what can be refused soon.

    Raises MissingPackageError without ray, UnavailableError where nobody listens.
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
    """Whether it is Ray that listens there, by Ray's own check in a process that can be ended."""
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
    """`count` cores that no other block on this machine holds; all where there are too few free ones.

    A lock on a file stands for each core: the kernel gives it back when a process ends, however it does. They lie in a
    directory of this user; where somebody else has made it, all cores are given.
    """
    known = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        held: list[int] = []
        with contextlib.suppress(OSError):
            folder = private_folder(Path(tempfile.gettempdir()) / f"spach-deploy-cores-{os.getuid()}")
            for core in known:
                if len(held) < count and _taken(folder / str(core), stack):
                    held.append(core)
        yield frozenset(held) if len(held) == count else frozenset(known)


def _taken(file: Path, stack: contextlib.ExitStack) -> bool:
    try:
        fcntl.flock(stack.enter_context(lock_file(file)), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

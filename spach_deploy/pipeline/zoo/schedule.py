"""Running the exports of a zoo on this machine, as many at once as its cores and its free memory allow.

The longest come first, so that none of them runs alone at the end. A build begins when its estimated memory
(`pipeline.estimate`) and that of the running ones fit into the memory that was free at the start. A build that needs
more than all of it runs alone; one that does not fit on the disk does not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from spach_deploy.common.machine import available_threads, find_memory
from spach_deploy.common.operating_system import usable_cores
from spach_deploy.pipeline.zoo.child import ProcessEnd, RunningExport
from spach_deploy.pipeline.zoo.plan import Build

_POLL_S = 0.05
_MEMORY_SHARE = 0.9
NOT_BEGUN = 3
"""Exit code of a build that could not begin: this machine cannot do it."""

Start = Callable[[Build, frozenset[int]], RunningExport]
"""Starts a build on the given cores. OSError where that fails."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many builds may run at once. `memory_bytes` None: not known, so that only `jobs` counts."""

    jobs: int
    memory_bytes: float | None

    @classmethod
    def here(cls, jobs: int | None, builds: int) -> Limits:
        """The limits of this machine: `jobs` builds, or one for each core, within the free memory.

        Much of an export runs on one core, so several exports at once are faster than one after another on all cores:
        two exports of ms_trans_xxs on two cores took 41 s at the same time and 59 s in sequence.
        """
        memory = find_memory()
        free = None if memory is None else _MEMORY_SHARE * memory.available_bytes
        return cls(max(1, min(jobs or available_threads(), builds)), free)

    def allow(self, build: Build, running: Sequence[Build]) -> bool:
        """Whether `build` may begin while the others run."""
        if not running:
            return True
        needed = build.memory_bytes + sum(other.memory_bytes for other in running)
        return len(running) < self.jobs and (self.memory_bytes is None or needed <= self.memory_bytes)


def longest_first(builds: Sequence[Build]) -> list[Build]:
    """The builds in the order in which they begin."""
    return sorted(builds, key=lambda build: -build.seconds)


def run_builds(
    builds: Sequence[Build], limits: Limits, start: Start, folder: Path, began: Callable[[Build], None]
) -> Generator[tuple[Build, ProcessEnd], None, None]:
    """Run all builds, and yield each with how it ended. Leaving the iteration early interrupts the running ones.

    `folder`: where bundles are written. `began` is called for each build that begins.
    """
    pending = longest_first(builds)
    running: dict[Build, tuple[RunningExport, int]] = {}
    cores = _shares(limits.jobs)
    try:
        while pending or running:
            while (build := _next(pending, limits, list(running))) is not None:
                pending.remove(build)
                slot = min(set(range(len(cores))) - {taken for _, taken in running.values()})
                try:
                    _check_disk(build, list(running), folder)
                    running[build] = (start(build, cores[slot]), slot)
                except OSError as error:
                    yield build, ProcessEnd(NOT_BEGUN, (f"Error: Not begun: {error.strerror or error}.",), 0.0)
                else:
                    began(build)
            yield from _ended(running)
            time.sleep(_POLL_S if running else 0.0)
    finally:
        end_all([process for process, _ in running.values()])


def _next(pending: Sequence[Build], limits: Limits, running: Sequence[Build]) -> Build | None:
    return next((build for build in pending if limits.allow(build, running)), None)


def _ended(running: dict[Build, tuple[RunningExport, int]]) -> Iterator[tuple[Build, ProcessEnd]]:
    for build, (process, _) in list(running.items()):
        if (ended := process.poll()) is not None:
            del running[build]
            yield build, ended


def end_all(processes: Sequence[RunningExport]) -> None:
    """Interrupt all processes, then wait for each, so that they end at the same time."""
    for process in processes:
        process.interrupt()
    for process in processes:
        process.stop()


def _shares(jobs: int) -> list[frozenset[int]]:
    """Cores for each job: disjoint where there are enough, else one core each, some shared."""
    cores = usable_cores()
    return [frozenset(cores[job::jobs]) or frozenset({cores[job % len(cores)]}) for job in range(jobs)]


def _check_disk(build: Build, running: Sequence[Build], folder: Path) -> None:
    """OSError where this bundle and those being made do not fit on the disk together."""
    with contextlib.suppress(FileNotFoundError):
        free = shutil.disk_usage(folder).free - sum(other.disk_bytes for other in running)
        if build.disk_bytes > free:
            raise OSError(f"it needs about {build.disk_bytes / 1e6:,.0f} MB, and {max(free, 0) / 1e6:,.0f} MB are free")

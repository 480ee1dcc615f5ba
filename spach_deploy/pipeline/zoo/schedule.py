"""Builds in an order and in a number that the machine bears: by its cores, and by what memory is free.

The longest come first, so that none of them is alone at the end. Memory is that of `pipeline.estimate`:
a build begins when what is free at the start holds it beside those that run. One that is larger than all of it runs
alone. One that the disk cannot hold does not begin at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from spach_deploy.common.machine import available_threads, find_memory
from spach_deploy.pipeline.zoo.child import ProcessEnd, RunningExport
from spach_deploy.pipeline.zoo.plan import Build

_POLL_S = 0.05
_MEMORY_SHARE = 0.9
NOT_BEGUN = 3
"""Exit code of a build that did not begin: this machine cannot do it."""

Start = Callable[[Build, frozenset[int]], RunningExport]
"""Begins a build on these cores. OSError where it cannot."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much may run at once. `memory_bytes` None: not known, so that `jobs` alone decides."""

    jobs: int
    memory_bytes: float | None

    @classmethod
    def here(cls, jobs: int | None, builds: int) -> Limits:
        """Of this machine: as many as asked for, else one for every core, within what memory is free.

        Much of an export computes on one core, so that more exports at once take less time in all than one on more
        cores: two of ms_trans_xxs on two cores took 41 s beside each other, 59 s one after the other.
        """
        memory = find_memory()
        free = None if memory is None else _MEMORY_SHARE * memory.available_bytes
        return cls(max(1, min(jobs or available_threads(), builds)), free)

    def allow(self, build: Build, running: Sequence[Build]) -> bool:
        """Whether `build` may begin beside those that run."""
        if not running:
            return True
        needed = build.memory_bytes + sum(other.memory_bytes for other in running)
        return len(running) < self.jobs and (self.memory_bytes is None or needed <= self.memory_bytes)


def longest_first(builds: Sequence[Build]) -> list[Build]:
    """In the order in which they begin."""
    return sorted(builds, key=lambda build: -build.seconds)


def run_builds(
    builds: Sequence[Build], limits: Limits, start: Start, place: Path, began: Callable[[Build], None]
) -> Generator[tuple[Build, ProcessEnd], None, None]:
    """Every build with how it ended, as they end. Leaving the iteration early interrupts those that run.

    `place`: where bundles are written. `began` is told of each build that begins.
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
                    _check_disk(build, list(running), place)
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
    """All at once, so that they end in the time of one."""
    for process in processes:
        process.interrupt()
    for process in processes:
        process.stop()


def _shares(jobs: int) -> list[frozenset[int]]:
    """Disjoint cores for each job where there are enough, else one core for each, some shared."""
    cores = sorted(os.sched_getaffinity(0))
    return [frozenset(cores[job::jobs]) or frozenset({cores[job % len(cores)]}) for job in range(jobs)]


def _check_disk(build: Build, running: Sequence[Build], place: Path) -> None:
    """OSError where the disk does not hold this bundle beside those that are being made."""
    with contextlib.suppress(FileNotFoundError):
        free = shutil.disk_usage(place).free - sum(other.disk_bytes for other in running)
        if build.disk_bytes > free:
            raise OSError(f"it needs about {build.disk_bytes / 1e6:,.0f} MB, and {max(free, 0) / 1e6:,.0f} MB are free")

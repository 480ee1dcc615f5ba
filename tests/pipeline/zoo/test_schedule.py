"""How many builds run at once, in which order, and what happens to them at the end: without any process."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, ModelSpec
from spach_deploy.pipeline.zoo import schedule
from spach_deploy.pipeline.zoo.child import ProcessEnd
from spach_deploy.pipeline.zoo.plan import Build, build_matrix, choices
from spach_deploy.pipeline.zoo.schedule import Limits, run_builds

MODELS = ("ms_conv_xxs", "ms_trans_xxs", "ms_conv_s", "ms_hybrid_s")


class Fake:
    """An export that ends when it was looked at a few times."""

    def __init__(self, world: World, name: str, looks: int) -> None:
        self._world, self._name, self._looks = world, name, looks
        self.interrupted = self.stopped = False

    def poll(self) -> ProcessEnd | None:
        self._looks -= 1
        if self._looks > 0:
            return None
        self._world.running.discard(self._name)
        return ProcessEnd(0, (), 1.0)

    def interrupt(self) -> None:
        self.interrupted = True

    def stop(self) -> None:
        self._world.told_at_stop.append(sum(fake.interrupted for fake in self._world.fakes))
        self.stopped = True


class World:
    """What runs, and what ran beside each other."""

    def __init__(self, broken: str = "") -> None:
        self.running: set[str] = set()
        self.begun: list[str] = []
        self.most = 0
        self.cores: list[frozenset[int]] = []
        self.fakes: list[Fake] = []
        self.told_at_stop: list[int] = []
        self._broken = broken

    def start(self, build: Build, cores: frozenset[int]) -> Fake:
        if build.name.startswith(self._broken) and self._broken:
            raise OSError(28, "No space left on device")
        self.running.add(build.name)
        self.begun.append(build.choice.model)
        self.cores.append(cores)
        self.most = max(self.most, len(self.running))
        self.fakes.append(Fake(self, build.name, 3))
        return self.fakes[-1]


def builds() -> tuple[Build, ...]:
    def options_of(choice: object) -> ExportOptions:
        return ExportOptions(ModelSpec(choice.model), engine=EngineTarget(Flavour.NONE))  # type: ignore[attr-defined]

    return build_matrix(choices(",".join(MODELS), ("fp32",), None), options_of)


def run(world: World, limits: Limits, made: tuple[Build, ...] | None = None) -> dict[str, ProcessEnd]:
    finished = run_builds(made or builds(), limits, world.start, Path.cwd(), lambda build: None)
    return {build.choice.model: ended for build, ended in finished}


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(schedule, "_POLL_S", 0.0)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("jobs", [1, 2, 3, 9])
def test_no_more_than_jobs_run_at_once_and_all_are_done(jobs: int) -> None:
    world = World()
    assert set(run(world, Limits(jobs, None))) == set(MODELS)
    assert world.most == min(jobs, len(MODELS))


def test_the_longest_begin_first() -> None:
    world = World()
    run(world, Limits(1, None))
    assert world.begun[0] == "ms_hybrid_s"
    assert set(world.begun[2:]) == {"ms_conv_xxs", "ms_trans_xxs"}


def test_memory_bounds_what_runs_beside_each_other() -> None:
    made = tuple(dataclasses.replace(build, memory_bytes=10.0) for build in builds())
    for free, most in ((39.0, 3), (25.0, 2), (19.0, 1)):
        world = World()
        assert len(run(world, Limits(9, free), made)) == len(MODELS)
        assert world.most == most


def test_one_that_is_larger_than_all_memory_runs_alone() -> None:
    made = tuple(dataclasses.replace(build, memory_bytes=100.0) for build in builds())
    world = World()
    assert len(run(world, Limits(9, 50.0), made)) == len(MODELS)
    assert world.most == 1


def test_one_that_cannot_begin_is_a_result_and_the_others_are_done() -> None:
    world = World(broken="ms_conv_s")
    found = run(world, Limits(2, None))
    assert found["ms_conv_s"].code == 3
    assert found["ms_conv_s"].sentence == "Not begun: No space left on device."
    assert [name for name, ended in found.items() if ended.code == 0] != []
    assert len(found) == len(MODELS)


def test_one_that_the_disk_cannot_hold_does_not_begin() -> None:
    made = builds()
    large = dataclasses.replace(made[0], disk_bytes=1e18)
    world = World()
    found = run(world, Limits(2, None), (large, *made[1:]))
    assert "MB are free" in found[MODELS[0]].sentence
    assert world.begun.count(MODELS[0]) == 0
    assert sum(ended.code == 0 for ended in found.values()) == len(MODELS) - 1


def test_leaving_early_ends_all_that_run() -> None:
    world = World()
    finished = run_builds(builds(), Limits(3, None), world.start, Path.cwd(), lambda build: None)
    next(finished)
    finished.close()
    stopped = sum(fake.stopped for fake in world.fakes)
    assert stopped >= 2
    assert world.told_at_stop == [stopped] * stopped  # all are told before one is waited for


def test_jobs_have_cores_of_their_own_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)))
    world = World()
    run(world, Limits(2, None))
    assert set(world.cores) == {frozenset({0, 2, 4}), frozenset({1, 3})}
    assert Limits.here(None, 100).jobs == 5
    assert Limits.here(None, 3).jobs == 3
    assert Limits.here(2, 100).jobs == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    world = World()
    run(world, Limits(3, None))
    assert set(world.cores) == {frozenset({0})}

"""Work in a copy of this process: its answer, its errors, its end, and what is done where there is no copy."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spach_deploy.common.errors import PrecisionError, SpachError
from spach_deploy.runtime import beside
from spach_deploy.runtime.beside import Beside, can_be_copied

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no Ray, which other tests of this process may have loaded."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(beside, "available_threads", lambda: 2)


def where(value: Any = 1) -> tuple[int, Any]:
    return os.getpid(), value


def test_the_answer_comes_from_another_process() -> None:
    with Beside(lambda: where(np.arange(3))) as work:
        assert work.is_under_way
        pid, value = work.result(1)
    assert pid != os.getpid()
    assert list(value) == [0, 1, 2]
    assert work.seconds is not None


def test_it_has_what_this_process_had_and_leaves_that_alone() -> None:
    model = torch.nn.Linear(8, 8)
    image = torch.ones(1, 8)
    expected = model(image).detach().numpy()

    def spoil() -> Any:
        answer = model(image).detach().numpy().copy()
        model.weight.data.zero_()
        return answer, torch.get_num_threads()

    with Beside(spoil) as work:
        answer, threads = work.result(1)
    assert threads == 1
    np.testing.assert_allclose(answer, expected, rtol=1e-6)
    assert model.weight.abs().sum() > 0


def test_large_products_behind_a_threaded_one_do_not_hang() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one = torch.rand(512, 512)
        expected = (one @ one).numpy()
        with Beside(lambda: (one @ one).numpy()) as work:
            found = work.result(1)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_its_errors_are_raised_here() -> None:
    def fail() -> int:
        raise PrecisionError("Not finite.", "Do this.")

    with Beside(fail) as work, pytest.raises(SpachError, match=r"Not finite\. Do this\."):
        work.result(1)


@pytest.mark.parametrize("how", ["a bug", "killed"])
def test_what_ends_without_an_answer_is_done_here(how: str) -> None:
    here = os.getpid()

    def end() -> tuple[int, Any]:
        if os.getpid() != here:
            if how == "killed":
                os.kill(os.getpid(), 9)
            raise RuntimeError
        return where()

    with Beside(end) as work:
        assert work.result(1) == (here, 1)
        assert work.seconds is None


@pytest.mark.parametrize(("is_urgent", "niceness"), [(False, beside.YIELDING), (True, 0)])
def test_only_one_that_is_waited_for_takes_its_full_share(is_urgent: bool, niceness: int) -> None:
    with Beside(lambda: os.nice(0), is_urgent=is_urgent) as work:
        assert work.result(1) == os.nice(0) + niceness


def test_an_answer_comes_from_a_copy_or_not_at_all() -> None:
    def fail() -> int:
        raise PrecisionError("Not finite.", "Do this.")

    with Beside(where) as work:
        assert work.answer() != (os.getpid(), 1)
    with Beside(fail) as work_in_vain:
        assert work_in_vain.answer() is None
    assert Beside(where).answer() is None


class WaitsForItsThread:
    """Ends, as a session of ONNX Runtime does, only with a thread of its own; part of a cycle."""

    def __init__(self) -> None:
        self.itself = self
        self.stop, self.ended = threading.Event(), threading.Event()
        threading.Thread(target=self._run, args=(self.stop, self.ended), daemon=True).start()

    @staticmethod
    def _run(stop: threading.Event, ended: threading.Event) -> None:
        stop.wait()
        ended.set()

    def __del__(self) -> None:
        self.stop.set()
        self.ended.wait()


def test_it_takes_nothing_apart_that_it_has_from_this_process() -> None:
    gc.disable()
    try:
        WaitsForItsThread()
        with Beside(lambda: (gc.collect(), os.getpid())[1]) as work:
            assert work.result(1) != os.getpid()
    finally:
        gc.enable()


def test_one_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "LOOK_S", 0.05)
    monkeypatch.setattr(beside, "PATIENCE_S", 0.3)
    here = os.getpid()

    def work() -> tuple[int, Any]:
        if os.getpid() != here:
            threading.Event().wait()
        return where()

    with Beside(work) as copy:
        assert copy.result(1) == (here, 1)


def test_one_that_computes_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever share of a busy machine it gets: it computes whenever somebody looks."""
    monkeypatch.setattr(beside, "LOOK_S", 0.05)
    monkeypatch.setattr(beside, "PATIENCE_S", 0.3)
    assert beside.processor_seconds(os.getpid()) > 0
    seconds = itertools.count()
    monkeypatch.setattr(beside, "processor_seconds", lambda pid: next(seconds))

    def work() -> tuple[int, Any]:
        time.sleep(0.6)
        return where()

    with Beside(work) as copy:
        assert copy.result(1)[0] != os.getpid()
    assert next(seconds) > 1


def test_leaving_ends_it() -> None:
    def sleep() -> int:
        time.sleep(60)
        return 1

    start = time.monotonic()
    with Beside(sleep) as work:
        pid = work._process.pid
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_does_not_outlive_this_process() -> None:
    program = """
import os, time
from spach_deploy.runtime import beside
beside.available_threads = lambda: 2
with beside.Beside(lambda: time.sleep(60) or 1) as work:
    print(work._process.pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    pid, end = int(done.stdout), time.monotonic() + 30
    while time.monotonic() < end and runs(pid):
        time.sleep(0.05)
    assert not runs(pid)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_no_copy_is_made_with_one_core_in_another_thread_or_beside_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_be_copied()
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(can_be_copied()))
    thread.start()
    thread.join()
    assert found == [False]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", object())
        assert not can_be_copied()
    monkeypatch.setattr(beside, "available_threads", lambda: 1)
    assert not can_be_copied()
    with Beside(where) as work:
        assert not work.is_under_way
        assert work.result(1) == (os.getpid(), 1)


def test_a_machine_without_room_for_a_copy_does_it_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory() -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", no_memory)
    with Beside(where) as work:
        assert work.result(1) == (os.getpid(), 1)

"""Commands in forks of this process, which has loaded everything once, or in processes of their own.

A fork ends without Python's own end: threads of C++ libraries did not come along, and nobody could wait for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from benchmarks.robustness import audit
from benchmarks.robustness.box import Box

TIME_LIMIT_S = 90.0
MEMORY_LIMIT = 24 << 30
"""Bytes of address space: what an input claims to need beyond that is an error of the command, not of this machine."""

_POLL_S = 0.01


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended. `code` is negative for a signal; `events` are the audit's; `left` are processes it left."""

    code: int
    seconds: float
    peak_bytes: int
    stdout: str
    stderr: str
    events: tuple[str, ...] = ()
    left: tuple[int, ...] = ()
    timed_out: bool = False


@dataclasses.dataclass(frozen=True)
class Way:
    """How to run a command: in a process of its own or a fork, whether it may connect, on which core (None: any)."""

    own_process: bool = False
    may_connect: bool = False
    core: int | None = None


class Running:
    """A command under way in a box, in a session of its own."""

    def __init__(self, box: Box, command: tuple[str, ...], way: Way) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="spach-robustness-", dir=box.root.parent)
        self._files = {name: Path(self._folder.name, name) for name in ("stdout", "stderr", "events")}
        self._start = time.monotonic()
        launch: Callable[[Box, tuple[str, ...]], NoReturn] = _exec if way.own_process else _call
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(box, self._files, way)
            launch(box, command)

    def poll(self) -> Outcome | None:
        """The outcome, once there is one."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self._start
        if pid:
            return self._outcome(os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * 1024)
        if seconds > TIME_LIMIT_S:
            os.killpg(self.pid, signal.SIGKILL)
            _, _, usage = os.wait4(self.pid, 0)
            found = self._outcome(-signal.SIGKILL, seconds, usage.ru_maxrss * 1024)
            return dataclasses.replace(found, timed_out=True)
        return None

    def wait(self) -> Outcome:
        """The outcome."""
        while (outcome := self.poll()) is None:
            time.sleep(_POLL_S)
        return outcome

    def _outcome(self, code: int, seconds: float, peak: int) -> Outcome:
        left = tuple(_settled(self.pid))
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        texts = {name: path.read_bytes().decode(errors="backslashreplace") for name, path in self._files.items()}
        self._folder.cleanup()
        events = tuple(dict.fromkeys(texts["events"].splitlines()))
        return Outcome(code, seconds, peak, texts["stdout"], texts["stderr"], events, left)


def _settled(session: int) -> list[int]:
    """Processes of the session that are still there after a moment."""
    end = time.monotonic() + 3.0
    while (found := list(of_session(session))) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def of_session(session: int) -> Iterator[int]:
    """Processes of a session, and those that began sessions of their own below it, zombies left out."""
    parents: dict[int, tuple[int, int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                state, parent, _, belongs = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z":
                    parents[int(entry)] = (int(parent), int(belongs))
    known = {session}
    while more := {pid for pid, (parent, belongs) in parents.items() if {parent, belongs} & known} - known:
        known |= more
    yield from known & parents.keys() - {session}


def _become(box: Box, files: dict[str, Path], way: Way) -> None:
    """In the fork: a session, folders, descriptors and limits of its own."""
    os.setsid()
    if way.core is not None:
        os.sched_setaffinity(0, {way.core})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(files["stdout"], flags), 1)
    os.dup2(os.open(files["stderr"], flags), 2)
    events = os.open(files["events"], flags | os.O_APPEND)
    os.chdir(box.work)
    os.environ.update(box.environment())
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    if way.own_process:
        os.set_inheritable(events, True)
        os.environ["SPACH_ROBUSTNESS"] = f"{box.root}\n{events}\n{int(way.may_connect)}"
    else:
        audit.install(box.root, events, may_connect=way.may_connect)


def _call(box: Box, command: tuple[str, ...]) -> NoReturn:
    """Call the function behind a console script, as the script does."""
    from tests.commands import entry_points

    code = 1
    try:
        module, _, function = entry_points()[command[0]].partition(":")
        sys.argv = list(command)
        getattr(importlib.import_module(module), function)()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _exec(box: Box, command: tuple[str, ...]) -> NoReturn:
    """Become the console script that pip would make."""
    from tests.commands import ROOT, console_script

    scripts = box.root.parent / f"{box.root.name}-bin"
    scripts.mkdir(exist_ok=True)
    script = console_script(command[0], scripts, before=_BEFORE)
    os.environ["PYTHONPATH"] = str(ROOT)
    os.execv(sys.executable, [sys.executable, str(script), *command[1:]])


_BEFORE = """
import os
import pathlib
from benchmarks.robustness import audit, seeds
root, events, may_connect = os.environ.pop("SPACH_ROBUSTNESS").split("\\n")
seeds.register()
audit.install(pathlib.Path(root), int(events), may_connect=may_connect == "1")
"""

"""Other processes: how they are started, whom they end with, and how they are ended.

Each has no input, and a session of its own: Ctrl-C at a terminal goes to this process, which then ends the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1


def environment(threads: int | None = None) -> dict[str, str]:
    """Ours, with this package importable, nothing imported from where a user stands, and `threads` to compute with."""
    path = os.pathsep.join(filter(None, (str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH"))))
    limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **limit}


def start(
    command: Sequence[str],
    *,
    stdout: int | None = None,
    stderr: int | None = None,
    threads: int | None = None,
    folder: Path | None = None,
    pass_fds: Sequence[int] = (),
    first: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command`, which finds this package, in `folder`. `first` runs in the new process. OSError where it cannot.

    `stdout`, `stderr`: file descriptors or what `subprocess` has in their place; None is ours. `threads`: how many it
    computes with; None leaves it to the environment.
    """
    return subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        cwd=folder,
        env=environment(threads),
        pass_fds=pass_fds,
        start_new_session=True,
        preexec_fn=first,
    )


def start_worker(
    code: str,
    *arguments: str,
    stdout: int | None = None,
    stderr: int | None = None,
    threads: int | None = None,
    pass_fds: Sequence[int] = (),
) -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start Python with `code`, which finds in `sys.argv[1]` the file descriptor of the other end of the connection."""
    ours, theirs = Pipe()
    with theirs, contextlib.ExitStack() as unless_started:
        unless_started.callback(ours.close)
        command = [sys.executable, "-c", code, str(theirs.fileno()), *arguments]
        process = start(command, stdout=stdout, stderr=stderr, threads=threads, pass_fds=(theirs.fileno(), *pass_fds))
        unless_started.pop_all()
    return ours, process


def end(process: subprocess.Popen[bytes], patience_s: float = 0.0) -> None:
    """Ask it to end and wait for so long, then kill it, and wait until it is gone."""
    if patience_s:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    process.kill()
    process.wait()


def end_with(parent: int, number: int) -> None:
    """In a new process: be sent the signal `number` when `parent` dies, however it does. Linux alone can do that."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before that was asked for
        os._exit(1)


def signal_name(number: int) -> str:
    """`SIGKILL`; also for those that have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def is_alive(pid: int) -> bool:
    """Whether a process of this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True

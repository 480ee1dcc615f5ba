"""Starting and ending child processes.

Each child has no standard input and a session of its own, so that Ctrl-C at a terminal reaches only this process, which
then ends its children.
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
    """Environment of a child: ours, with this package importable and nothing imported from the working directory.

    `threads`: OMP_NUM_THREADS of the child, if given.
    """
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
    prepare: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command` in `folder`, with this package importable. OSError where that fails.

    `stdout`, `stderr`: file descriptors or constants of `subprocess`; None inherits ours. `threads`: see `environment`.
    `prepare`: called in the new process before the command.
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
        preexec_fn=prepare,
    )


def start_worker(
    code: str,
    *arguments: str,
    stdout: int | None = None,
    stderr: int | None = None,
    threads: int | None = None,
    pass_fds: Sequence[int] = (),
) -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start Python with `code`, and a connection to it whose file descriptor `code` finds in `sys.argv[1]`."""
    ours, theirs = Pipe()
    with theirs, contextlib.ExitStack() as unless_started:
        unless_started.callback(ours.close)
        command = [sys.executable, "-c", code, str(theirs.fileno()), *arguments]
        process = start(command, stdout=stdout, stderr=stderr, threads=threads, pass_fds=(theirs.fileno(), *pass_fds))
        unless_started.pop_all()
    return ours, process


def end(process: subprocess.Popen[bytes], patience_s: float = 0.0) -> None:
    """End a process: SIGTERM and up to `patience_s` seconds of waiting, then SIGKILL; returns when it is gone."""
    if patience_s:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    process.kill()
    process.wait()


def end_with(parent: int, number: int) -> None:
    """In a new process: have the kernel send signal `number` when `parent` dies, for whatever reason. Linux only."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before prctl was called
        os._exit(1)


def signal_name(number: int) -> str:
    """Name of a signal, such as `SIGKILL`, or `signal 64` where it has none."""
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

"""Starting and ending child processes.

Each child has no standard input, and Ctrl-C at a terminal reaches only this process, which then ends its children.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import TYPE_CHECKING

from spach_deploy.common import operating_system

if TYPE_CHECKING:
    from spach_deploy.common.operating_system import Connection

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


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
    shared: Sequence[int] = (),
    cores: frozenset[int] | None = None,
    is_tied: bool = False,
) -> subprocess.Popen[bytes]:
    """Start `command` in `folder`, with this package importable. OSError where that fails.

    `stdout`, `stderr`: file descriptors or constants of `subprocess`; None inherits ours. `threads`: see `environment`.
    `shared`: numbers of descriptors and connections that it uses (`operating_system.shared_number`). `cores`: those
    that it may use; None for all. `is_tied`: it ends when this process dies.
    """
    return operating_system.start(
        list(command),
        shared=shared,
        is_tied=is_tied,
        cores=cores,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        cwd=folder,
        env=environment(threads),
    )


def start_worker(
    code: str,
    *arguments: str,
    stdout: int | None = None,
    stderr: int | None = None,
    threads: int | None = None,
    shared: Sequence[int] = (),
) -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start Python with `code`, and a connection to it, of which `code` finds the number in `sys.argv[1]`.

    The worker opens it with `operating_system.shared_connection`.
    """
    ours, theirs = Pipe()
    with theirs, contextlib.ExitStack() as unless_started:
        unless_started.callback(ours.close)
        command = [sys.executable, "-c", code, str(theirs.fileno()), *arguments]
        process = start(command, stdout=stdout, stderr=stderr, threads=threads, shared=(theirs.fileno(), *shared))
        unless_started.pop_all()
    return ours, process


def end(process: subprocess.Popen[bytes], patience_s: float = 0.0) -> None:
    """End a process: SIGTERM and up to `patience_s` seconds of waiting, then SIGKILL; returns when it is gone.

    Windows has no SIGTERM: the process is killed at once.
    """
    if patience_s:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    process.kill()
    process.wait()

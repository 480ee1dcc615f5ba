"""One export of a zoo in a process of its own, so that a crash or a lack of memory ends only that export."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from spach_deploy.common.processes import end_with, signal_name, start

_GRACE_S = 8.0
"""Seconds to wait for an interrupted export, which takes at most five."""

_SAID_BYTES = 8192
_SAID_LINES = 20


@dataclasses.dataclass(frozen=True)
class ProcessEnd:
    """How a process ended. `code`: its exit code, negative for a signal; `said`: its last lines on stderr.

    `node`: the machine that it ran on, if not this one.
    """

    code: int
    said: tuple[str, ...]
    seconds: float
    peak_bytes: int | None = None
    node: str | None = None

    @property
    def sentence(self) -> str:
        """The reason why it failed; empty where it succeeded."""
        if self.code == 0:
            return ""
        errors = [line.removeprefix("Error: ") for line in self.said if line.startswith("Error: ")]
        if errors:
            return errors[-1]
        if self.code < 0:
            return f"Ended by {signal_name(-self.code)}{_REASONS.get(-self.code, '.')}"
        return f"Ended with exit code {self.code}{f', saying: {self.said[-1]}' if self.said else ' without a word.'}"


_REASONS: dict[int, str] = {
    signal.SIGKILL: ", which mostly means too little memory. Run again with a smaller --jobs.",
    signal.SIGSEGV: ": a crash in native code.",
    signal.SIGABRT: ": a crash in native code.",
}


class RunningExport(Protocol):
    """A running export."""

    def poll(self) -> ProcessEnd | None:
        """How it ended; None while it runs."""

    def interrupt(self) -> None:
        """Ask the export to end and to clean up."""

    def stop(self) -> None:
        """Wait a few seconds after `interrupt`, then kill the export."""


class ExportProcess:
    """A process that runs `command` on `cores` (None: all). It is interrupted when this process dies."""

    def __init__(
        self, command: Sequence[str], *, cores: frozenset[int] | None = None, folder: Path | None = None
    ) -> None:
        self._start = time.monotonic()
        self._ended: ProcessEnd | None = None
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by _end)
        parent = os.getpid()

        def prepare() -> None:
            _end_with_parent(parent)
            if cores:
                os.sched_setaffinity(0, cores)

        self._process = start(
            command,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr.fileno(),
            threads=None if cores is None else len(cores),
            folder=folder,
            prepare=prepare,
        )

    def poll(self) -> ProcessEnd | None:
        """How it ended; None while it runs."""
        if self._ended is None:
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                self._ended = self._end(usage.ru_maxrss * 1024)
        return self._ended

    def _end(self, peak_bytes: int) -> ProcessEnd:
        with self._stderr as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _SAID_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
        said = tuple(line.rstrip() for line in lines[-_SAID_LINES:] if line.strip())
        return ProcessEnd(self._process.returncode, said, time.monotonic() - self._start, peak_bytes)

    def interrupt(self) -> None:
        """Send SIGINT, as Ctrl-C does, so that the export removes what it has begun."""
        if self.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """Wait a few seconds after `interrupt`, then kill the process."""
        end = time.monotonic() + _GRACE_S
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            while self.poll() is None:
                time.sleep(0.01)


def _end_with_parent(parent: int) -> None:
    """In the new process: receive SIGINT when the parent dies, and do not ignore SIGINT and SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in a shell's background jobs, and inherited from them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    end_with(parent, signal.SIGINT)

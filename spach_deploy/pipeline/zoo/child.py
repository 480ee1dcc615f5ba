"""One export of a zoo in a process of its own, so that a crash or a lack of memory ends only that export."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from spach_deploy.common import operating_system
from spach_deploy.common.processes import start

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
        if crash := operating_system.crash(self.code):
            return f"Ended by {crash.name}{_reason(crash)}"
        return f"Ended with exit code {self.code}{f', saying: {self.said[-1]}' if self.said else ' without a word.'}"


def _reason(crash: operating_system.Crash) -> str:
    if crash.of_memory:
        return ", which mostly means too little memory. Run again with a smaller --jobs."
    return ": a crash in native code." if crash.of_native_code else "."


class RunningExport(Protocol):
    """A running export."""

    def poll(self) -> ProcessEnd | None:
        """How it ended; None while it runs."""

    def interrupt(self) -> None:
        """Ask the export to end and to clean up."""

    def stop(self) -> None:
        """Wait a few seconds after `interrupt`, then kill the export."""


class ExportProcess:
    """A process that runs `command` on `cores` (None: all). It ends when this process dies."""

    def __init__(
        self, command: Sequence[str], *, cores: frozenset[int] | None = None, folder: Path | None = None
    ) -> None:
        self._start = time.monotonic()
        self._ended: ProcessEnd | None = None
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by _end)
        self._process = start(
            command,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr.fileno(),
            threads=None if cores is None else len(cores),
            folder=folder,
            cores=cores,
            is_tied=True,
        )

    def poll(self) -> ProcessEnd | None:
        """How it ended; None while it runs."""
        if self._ended is None and (ended := operating_system.ended(self._process)) is not None:
            self._ended = self._end(ended)
        return self._ended

    def _end(self, ended: operating_system.Ended) -> ProcessEnd:
        with self._stderr as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _SAID_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
        said = tuple(line.rstrip() for line in lines[-_SAID_LINES:] if line.strip())
        return ProcessEnd(ended.code, said, time.monotonic() - self._start, ended.peak_bytes)

    def interrupt(self) -> None:
        """Do what Ctrl-C does, so that the export removes what it has begun."""
        if self.poll() is None:
            operating_system.interrupt(self._process)

    def stop(self) -> None:
        """Wait a few seconds after `interrupt`, then kill the process."""
        end = time.monotonic() + _GRACE_S
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if self.poll() is None:
            operating_system.kill_with_children(self._process)
            while self.poll() is None:
                time.sleep(0.01)

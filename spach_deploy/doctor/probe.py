"""Probes: questions asked in a child process with a time limit, because a driver may hang and a library may crash.

A question is a module of this package with a function `answer(*arguments)` that returns plain JSON. A child that hangs
is killed and not waited for: one that hangs inside the driver's kernel code cannot be killed, and waiting for it would
never end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from spach_deploy.common.processes import signal_name, start

if TYPE_CHECKING:
    from typing_extensions import Self

_CHILD = (
    "import importlib, json, sys; module, *arguments = sys.argv[1:];"
    "found = importlib.import_module(module).answer(*arguments);"
    "sys.stdout.write('\\n' + json.dumps(found))"
)


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """A child's answer; `failure` says why there is none. `timed_out`: the child may only have been slow."""

    content: dict[str, Any] | None
    failure: str = ""
    timed_out: bool = False


class Probe:
    """A child process that answers one question. It starts at once, so that several run in parallel."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._started = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError):  # no memory left for a process: no answer
            command = [sys.executable, "-c", _CHILD, module, *arguments]
            self._process = start(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def answer(self, limit_s: float) -> ProbeResult:
        """The answer, if it comes within `limit_s` seconds of the start."""
        if self._process is None:
            return ProbeResult(None, "no process could be started")
        try:
            left_s = max(0.0, self._started + limit_s - time.monotonic())
            output, _ = self._process.communicate(timeout=left_s)
        except subprocess.TimeoutExpired:
            self._end()
            return ProbeResult(None, f"nothing within {limit_s:g} s", timed_out=True)
        return _parse(output, self._process.returncode)

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(OSError):
                self._process.kill()


def _parse(output: bytes, returncode: int) -> ProbeResult:
    """The last line of the output; libraries may print others before it."""
    if returncode < 0:
        return ProbeResult(None, f"it crashed ({signal_name(-returncode)})")
    try:
        content = json.loads(output.rsplit(b"\n", 1)[-1])
    except ValueError:
        return ProbeResult(None, f"it ended with exit code {returncode}")
    return ProbeResult(content) if isinstance(content, dict) else ProbeResult(None, "its answer cannot be read")

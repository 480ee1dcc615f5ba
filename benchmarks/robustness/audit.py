"""What a process opens for writing, starts and connects to, seen through Python's audit events.

What native code does is not seen here; the tree of files before and after shows it where it happens in the box.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.robustness.box import is_allowed, is_folder_of_torch

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FIRST_PATH = ("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "shutil.rmtree", "os.utime")
_OF_FOLDERS = ("os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.utime", "shutil.rmtree")
"""Events whose last argument may be an open folder that the path is relative to."""

_BOTH_PATHS = ("os.rename", "shutil.move", "shutil.copyfile")
_SECOND_PATH = ("os.link", "os.symlink")
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "webbrowser.open")
_CONNECTS = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "urllib.Request")
_PROGRAMS = ("nvidia-smi", "ldconfig", "uname")
"""Other programs that spach-doctor and the libraries below ask about the machine."""

_DEVICES = ("/dev/null", "/dev/shm", "/dev/tty", "/proc/self", "/memfd")


def install(root: Path, report: int, *, may_connect: bool) -> None:
    """Write a line to the descriptor `report` for every event that a case in the box `root` should not cause."""
    watch = _Watch(os.path.realpath(root), report, may_connect)
    sys.addaudithook(watch)


class _Watch:
    def __init__(self, root: str, report: int, may_connect: bool) -> None:
        self._root, self._report, self._may_connect = root, report, may_connect
        self._busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy or (handle := _HANDLERS.get(event)) is None:
            return
        self._busy = True
        try:
            handle(self, event, arguments)
        finally:
            self._busy = False

    def say(self, text: str) -> None:
        os.write(self._report, text.encode("utf-8", "backslashreplace")[:500].replace(b"\n", b" ") + b"\n")

    def path(self, event: str, path: Any, folder: Any = None) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a descriptor, which was opened under a name before
        where = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
        given = os.path.abspath(os.path.join(where, os.fsdecode(path)))
        real = os.path.join(os.path.realpath(os.path.dirname(given)), os.path.basename(given))
        if real.startswith(_DEVICES) or real.startswith(os.environ.get("MPLCONFIGDIR", "/dev/null")):
            return
        inside = real.startswith(f"{self._root}/")
        relative = os.path.relpath(real, self._root)
        if is_folder_of_torch(real) and event == "os.mkdir":
            return
        if _is_probe(real) and event in ("os.mkdir", "os.rmdir"):
            return
        if not inside or not (is_allowed(relative) or _is_draft_of_report(relative)):
            self.say(f"{event} {relative if inside else real}")

    def open(self, event: str, arguments: tuple[Any, ...]) -> None:
        path, mode, flags = arguments
        text = mode if isinstance(mode, str) else ""
        if any(letter in text for letter in "wax+") or (mode is None and isinstance(flags, int) and flags & _WRITING):
            self.path(f"open for writing ({text or hex(flags)})", path)

    def first(self, event: str, arguments: tuple[Any, ...]) -> None:
        of_folder = arguments[-1] if event in _OF_FOLDERS else None
        self.path(event, arguments[0], of_folder)

    def second(self, event: str, arguments: tuple[Any, ...]) -> None:
        self.path(event, arguments[1])

    def both(self, event: str, arguments: tuple[Any, ...]) -> None:
        paths = arguments[1:2] if event == "shutil.copyfile" else arguments[:2]
        for path in paths:
            self.path(event, path)

    def start(self, event: str, arguments: tuple[Any, ...]) -> None:
        program = arguments[0]
        command = arguments[1] if event == "subprocess.Popen" and len(arguments) > 1 else ()
        first = program or (command[0] if command else "")
        name = os.path.basename(os.fsdecode(first) if isinstance(first, (str, bytes, os.PathLike)) else str(first))
        if name not in _PROGRAMS and os.path.realpath(str(first)) != os.path.realpath(sys.executable):
            self.say(f"{event} {program!r} {command!r}")

    def connect(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._may_connect:
            self.say(f"{event} {arguments[1:]!r}")


def _is_probe(path: str) -> bool:
    """A folder that is made and removed to learn whether that is possible, beside the target wherever that is."""
    name = os.path.basename(path)
    return name.startswith(".spach-doctor-") or (name.startswith(".") and ".partial-" in name)


def _is_draft_of_report(relative: str) -> bool:
    return relative.startswith("work/") and os.path.basename(relative).startswith((".report.json.", ".report.html."))


_Handler = Callable[[_Watch, str, "tuple[Any, ...]"], None]

_HANDLERS: dict[str, _Handler] = {
    "open": _Watch.open,
    **dict.fromkeys(_FIRST_PATH, _Watch.first),
    **dict.fromkeys(_SECOND_PATH, _Watch.second),
    **dict.fromkeys(_BOTH_PATHS, _Watch.both),
    **dict.fromkeys(_STARTS, _Watch.start),
    **dict.fromkeys(_CONNECTS, _Watch.connect),
}

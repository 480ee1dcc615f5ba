"""Ctrl-C while modules load. Nothing but what Python has loaded by then is imported here: until this has run, Ctrl-C is
a traceback.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

INTERRUPTED = 130


def is_our_script() -> bool:
    """Whether this process is one of the commands that pip installs, or `python -m` with a command's module."""
    return os.path.basename(sys.argv[0]).startswith("spach-") or module_run().startswith("spach_deploy.cli.")


def module_run() -> str:
    """M of `python -m M`; empty in other processes."""
    words = sys.orig_argv
    return words[-len(sys.argv)] if len(words) > len(sys.argv) and words[-len(sys.argv) - 1] == "-m" else ""


def quiet_until_a_command_begins() -> None:
    """In one of our scripts, Ctrl-C while modules load, and after the command, is no traceback of Python's."""
    if is_our_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_: Any) -> NoReturn:
    try:  # noqa: SIM105  (contextlib would have to be imported)
        os.write(2, b"Interrupted.\n")
    except OSError:  # nobody reads it
        pass
    os._exit(INTERRUPTED)

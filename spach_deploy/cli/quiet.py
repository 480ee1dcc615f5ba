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
    """Whether this process is one of the commands that pip installs."""
    return os.path.basename(sys.argv[0]).startswith("spach-")


def quiet_until_a_command_begins() -> None:
    """In one of our scripts, Ctrl-C while modules load, and after the command, is no traceback of Python's."""
    if is_our_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_: Any) -> NoReturn:
    os.write(sys.stderr.fileno(), b"Interrupted.\n")
    os._exit(INTERRUPTED)

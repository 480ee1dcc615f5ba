"""Processes that end with the one that made them."""

from __future__ import annotations

import ctypes
import os

_PR_SET_PDEATHSIG = 1


def end_with(parent: int, number: int) -> None:
    """In a new process: be sent the signal `number` when `parent` dies, however it does. Linux alone can do that."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before that was asked for
        os._exit(1)

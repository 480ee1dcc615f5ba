"""Fewer searches for garbage in a command that is a process of its own.

Loading PyTorch and tracing a model make millions of objects that stay. Python looks through all of them for unreachable
cycles again and again, and once more when it ends: a sixth of an export's time. Memory that only cycles hold is large
in one place, behind the exporter, where it is looked for by itself (`phases.return_freed_memory`).
"""

from __future__ import annotations

import atexit
import gc

THRESHOLDS = (50_000, 20, 100)
"""New objects between two searches among the youngest, and how many of those before older ones are searched too."""


def search_less() -> None:
    """From here on in this process, and not at all at its end: the system takes back everything at once."""
    gc.set_threshold(*THRESHOLDS)
    atexit.register(gc.freeze)

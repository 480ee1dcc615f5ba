"""How many threads to compute with.

OpenMP threads wait for each other by spinning: where another process uses a core, or the work is small, two threads
take several times as long as one. So proofs on small tensors take one thread, and what PyTorch computes beside other
work leaves that a core.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def available_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def worker_threads(is_busy: bool) -> int:
    """All cores, less the one that other work takes while it is under way."""
    return max(1, available_threads() - is_busy)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch's operators with `count` threads within the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

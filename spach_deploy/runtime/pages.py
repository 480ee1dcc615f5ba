"""Small pages for what makes a buffer for each tensor and drops it.

Large pages (`spach_deploy.cli.large_pages`) suit arithmetic. TensorRT's builder makes millions of small objects, and
is slower with them; what helps it is that glibc keeps freed ones at hand instead of merging them with their neighbours.
Protobuf and onnxsim copy weights from buffer to buffer, and each new one of a few hundred KB then has the kernel clear
2 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator, Mapping

VARIABLE = "GLIBC_TUNABLES"
LARGE = "glibc.malloc.hugetlb=1"
"""What makes glibc ask for large pages, in the environment of a process that starts."""

SMALL_OBJECTS = "glibc.malloc.tcache_count=65535:glibc.malloc.mxfast=0"
"""What makes glibc keep every freed small object of a thread for that thread's next one of its size."""

_PR_SET_THP_DISABLE, _PR_GET_THP_DISABLE = 41, 42


@contextlib.contextmanager
def small_pages() -> Iterator[None]:
    """This process is given no large page within the block; nothing happens where the system has none."""
    if sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    before = prctl(_PR_GET_THP_DISABLE, 0, 0, 0, 0)
    prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        if before == 0:
            prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)


def for_small_objects(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that makes millions of them, in small pages; a user's own wishes stay."""
    ours = environment.get(VARIABLE, LARGE) == LARGE
    return {**environment, VARIABLE: SMALL_OBJECTS} if ours else dict(environment)

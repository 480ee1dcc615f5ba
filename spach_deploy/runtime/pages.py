"""Small pages for what makes a buffer for each tensor and drops it.

Large pages (`spach_deploy.cli.large_pages`) suit arithmetic. TensorRT's builder makes millions of small objects, and
is slower with them. Protobuf and onnxsim copy weights from buffer to buffer,
and each new one of a few hundred KB then has the kernel clear 2 MB: of ms_hybrid_s's graph onnxsim takes 1.0 s so, and
0.4 s with pages of 4 KB.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator, Mapping

VARIABLE = "GLIBC_TUNABLES"
LARGE = "glibc.malloc.hugetlb=1"
"""What makes glibc ask for large pages, in the environment of a process that starts."""

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


def with_small_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is given no large page; what a user set in it stays as it is."""
    return {**environment, VARIABLE: ""} if environment.get(VARIABLE) == LARGE else dict(environment)

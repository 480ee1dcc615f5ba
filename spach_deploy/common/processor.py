"""What this machine's processor can compute: the features that matter for the arithmetic of networks."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
"""Where the system describes its processors."""

_TELLING = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "f16c", "fma"),
    *("asimd", "bf16", "i8mm", "sve"),
)
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


def cpu_flags() -> set[str]:
    """Features of this processor that matter for its arithmetic; empty where the system does not say."""
    return {flag for flag in _TELLING if flag in all_cpu_flags().split()}


def all_cpu_flags() -> str:
    """Every feature of this processor, as the system lists them; empty where it does not say."""
    return _described("flags", "Features")


def processor_name() -> str:
    """As the system names it."""
    return _described("model name") or platform.machine()


def has_bf16() -> bool:
    """Whether it multiplies bfloat16."""
    return bool(cpu_flags() & _BF16)


def has_vnni() -> bool:
    """Whether it multiplies unsigned by signed eight-bit integers and sums them in 32 bits."""
    return bool(cpu_flags() & _VNNI)


def _described(*keys: str) -> str:
    """The first line with one of these keys; empty where there is none."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in keys)
    return next(found, "")

"""What this machine's processor can compute: the features that matter for the arithmetic of networks."""

from __future__ import annotations

import platform
from pathlib import Path

_TELLING = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "f16c", "fma"),
    *("asimd", "bf16", "i8mm", "sve"),
)
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Features of this processor that matter for its arithmetic; empty where the system does not say."""
    return {flag for flag in _TELLING if flag in _described(cpuinfo, "flags", "Features").split()}


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the system names it."""
    return _described(cpuinfo, "model name") or platform.machine()


def has_bf16() -> bool:
    """Whether it multiplies bfloat16."""
    return bool(cpu_flags() & _BF16)


def has_vnni() -> bool:
    """Whether it multiplies unsigned by signed eight-bit integers and sums them in 32 bits."""
    return bool(cpu_flags() & _VNNI)


def _described(cpuinfo: Path, *keys: str) -> str:
    """The first line of `cpuinfo` with one of these keys; empty where there is none."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in keys)
    return next(found, "")

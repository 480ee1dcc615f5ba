"""What ran: processor, threads, versions, load and GPU; and what the processor can do at best, measured now."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spach_deploy.runtime.threads import available_threads
from spach_deploy.tool_versions import tool_versions

_TELLING = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "f16c", "fma"),
    *("asimd", "bf16", "i8mm", "sve"),
)
_GPU_QUERY = "name,driver_version,clocks.sm,clocks.max.sm,temperature.gpu,power.draw"
_GEMM, _COPY_BYTES, _PEAK_S = 1536, 256 << 20, 0.5


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Features of this processor that matter for its arithmetic; empty where the system does not say."""
    return {flag for flag in _TELLING if flag in _cpuinfo(cpuinfo, "flags", "Features").split()}


def _cpuinfo(cpuinfo: Path, *keys: str) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in keys)
    return next(found, "")


def machine_facts(threads: int) -> dict[str, Any]:
    """Plain JSON: what a figure from this machine depends on."""
    return {
        "processor": _cpuinfo(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "flags": sorted(cpu_flags()),
        "cores": available_threads(),
        "threads": threads,
        "load_before": load(),
        "versions": tool_versions(),
        "gpus": _gpus(),
    }


def load() -> float:
    """Processes that wanted a core in the last minute, on average."""
    return round(os.getloadavg()[0], 2)


def _gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU, clocks included."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    command = [program, f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # a driver that hangs is no reason not to measure
        return []
    keys = _GPU_QUERY.split(",")
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]


def peaks(threads: int, device: str = "cpu") -> dict[str, float]:
    """The best of half a second each: FP32 matrix products (FLOP/s), copies in memory (bytes/s, read and written).

    Empty for a GPU that PyTorch here cannot use.
    """
    import torch

    torch.set_num_threads(threads)
    if device != "cpu" and not torch.cuda.is_available():
        return {}
    size = _GEMM if device == "cpu" else 4 * _GEMM
    left, right = (torch.rand(size, size, device=device) for _ in range(2))
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "flops": 2 * size**3 / _best(lambda: torch.mm(left, right), device),
        "bytes": 2 * _COPY_BYTES / _best(lambda: target.copy_(source), device),
    }


def _best(work: Callable[[], Any], device: str) -> float:
    """The shortest of the runs in half a second, at least three; a GPU's are waited for."""
    import torch

    wait: Callable[[], Any] = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    work()
    wait()
    times: list[float] = []
    end = time.perf_counter() + _PEAK_S
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)

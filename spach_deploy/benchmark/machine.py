"""The machine of a benchmark: processor, threads, versions, load and GPUs, and its measured peak FLOP/s and
bandwidth.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

from spach_deploy.common.machine import available_threads, cpu_flags, processor_name, torch_threads
from spach_deploy.common.versions import installed, tool_versions

_GPU_QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,memory.used"
_GEMM, _COPY_BYTES, _PEAK_S = 1024, 256 << 20, 0.15


def machine_facts(threads: int) -> dict[str, Any]:
    """Everything about this machine that latencies depend on, before the benchmark. Plain JSON."""
    return {
        "processor": processor_name(),
        "flags": sorted(cpu_flags()),
        "cores": available_threads(),
        "threads": threads,
        "load_before": load(),
        "versions": tool_versions() | ({"openvino": found} if (found := installed("openvino")) else {}),
        "gpus": gpus(),
    }


def facts_after() -> dict[str, Any]:
    """The load after the benchmark, and clocks and memory of the GPUs while the runners are still open. Plain JSON."""
    return {"load_after": load(), "gpus_after": gpus()}


def load() -> float:
    """The load average of the last minute: processes that wanted a core."""
    return round(os.getloadavg()[0], 2)


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi reports of each GPU, clocks included; empty without nvidia-smi, or where it does not answer."""
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


class Peaks:
    """Peak performance of a device: FP32 matrix products (FLOP/s) and copies in its memory (bytes/s, read plus
    written).

    Measured again between the rounds, because the machine may be busy at any one time; the best result counts. Empty
    for a GPU that the installed PyTorch cannot use.
    """

    def __init__(self, threads: int, device: str = "cpu") -> None:
        self.best: dict[str, float] = {}
        self._threads = threads
        self._device = device
        self._work: dict[str, tuple[float, Callable[[], Any]]] = {}

    def measure(self) -> None:
        """Measure once, which takes some tenths of a second. The first call imports torch and allocates half a
        gigabyte.
        """
        import torch

        if self._device != "cpu" and not torch.cuda.is_available():
            return
        self._work = self._work or self._prepared()
        with torch_threads(self._threads):
            for name, (amount, work) in self._work.items():
                self.best[name] = max(self.best.get(name, 0.0), amount / _shortest(work, self._device))

    def release(self) -> None:
        """Free the memory that `measure` allocated."""
        self._work = {}

    def _prepared(self) -> dict[str, tuple[float, Callable[[], Any]]]:
        """For each peak: how many operations or bytes its piece of work has, and the work."""
        import torch

        size = _GEMM if self._device == "cpu" else 4 * _GEMM
        left, right = (torch.rand(size, size, device=self._device) for _ in range(2))
        source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return {
            "flops": (2.0 * size**3, lambda: torch.mm(left, right)),
            "bytes": (2.0 * _COPY_BYTES, lambda: target.copy_(source)),
        }


def _shortest(work: Callable[[], Any], device: str) -> float:
    """Seconds of the shortest of at least three runs; on a GPU each run is synchronized."""
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

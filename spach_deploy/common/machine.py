"""What this machine has: cores for threads, instructions of its CPU, free memory, and folders that can be written.

About threads: OpenMP threads wait for each other by spinning. Where another process uses a core, or the work is small,
two threads take several times as long as one. So proofs on small tensors use one thread, and PyTorch leaves one core to
work that runs at the same time.

Sources for memory: Linux kernel, "The /proc Filesystem" (meminfo), "Control Group v2" and "Memory Resource Controller"
(v1).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from spach_deploy.common import operating_system

MOST_THREADS = 1024
"""Most CPU threads that can be asked for: far more than cores, and few enough that starting them works."""


def available_threads() -> int:
    """How many cores this process may use."""
    return len(operating_system.usable_cores())


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch's operators use `count` threads within the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


CPUINFO = Path("/proc/cpuinfo")
"""The file in which Linux describes its processors."""

_ARITHMETIC_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "f16c", "fma"),
    *("asimd", "bf16", "i8mm", "sve"),
)
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


def cpu_flags() -> set[str]:
    """CPU flags that matter for the arithmetic of networks, such as avx512_vnni; empty where they are not known."""
    return {flag for flag in _ARITHMETIC_FLAGS if flag in all_cpu_flags().split()}


def all_cpu_flags() -> str:
    """All CPU flags as the system lists them; empty where it does not say."""
    return _cpuinfo("flags", "Features")


def processor_name() -> str:
    """The CPU's model name, or its architecture where the system gives no name."""
    return operating_system.processor_name() or _cpuinfo("model name") or platform.machine()


def has_bf16() -> bool:
    """Whether the CPU has bfloat16 multiplication."""
    return bool(cpu_flags() & _BF16)


VNNI_ONLY = "It is for CPUs with VNNI: without it, sums of INT8 overflow and the answers are wrong."
"""What packages say of an INT8 graph that was exported with --vnni."""


def has_vnni() -> bool:
    """Whether the CPU multiplies unsigned by signed 8-bit integers and accumulates in 32 bits."""
    return bool(cpu_flags() & _VNNI)


def _cpuinfo(*keys: str) -> str:
    """The value of the first line with one of these keys; empty where there is none."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in keys)
    return next(values, "")


_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"
_ROOT = Path("/")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory in bytes. `limited`: the limit is a control group's, such as a container's, not the machine's."""

    available_bytes: int
    total_bytes: int
    limited: bool = False


@dataclasses.dataclass(frozen=True)
class FolderCheck:
    """A folder that exports write to. `problem`: why writing would fail, as a clause; empty where it works."""

    path: Path
    free_bytes: int
    problem: str = ""


def find_memory(root: Path = _ROOT) -> Memory | None:
    """The least memory that the machine and the control groups of this process leave free; None where not known."""
    machine = _meminfo(root)
    groups = list(_groups(root))
    known = [*groups, *([machine] if machine else [])]
    return min(known, key=lambda memory: memory.available_bytes) if known else None


def _meminfo(root: Path) -> Memory | None:
    if (known := operating_system.memory_of_machine()) is not None:
        return Memory(known.available, known.total)
    fields = _numbers(root / "proc/meminfo")
    if "MemAvailable" not in fields:
        return None
    return Memory(fields["MemAvailable"] * 1024, fields.get("MemTotal", 0) * 1024)


def _groups(root: Path) -> Iterator[Memory]:
    """Memory of this process's control group and its parents, of cgroup v1 and v2."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0":
            limit, usage, mount = "memory.max", "memory.current", "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            limit, usage, mount = "memory.limit_in_bytes", "memory.usage_in_bytes", "sys/fs/cgroup/memory"
        else:
            continue
        memories = (_group(folder, limit, usage) for folder in _upwards(root / mount, path))
        yield from (memory for memory in memories if memory is not None)


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """A group's folder and its parents up to `mount`. In a container `path` may be the host's and not exist here."""
    folder = mount / path.lstrip("/")
    while folder != mount and mount in folder.parents:
        yield folder
        folder = folder.parent
    yield mount


def _group(folder: Path, limit: str, usage: str) -> Memory | None:
    """Memory of one control group, None without a limit. Inactive file pages count as free: the kernel drops them."""
    most, used = _text(folder / limit), _text(folder / usage)
    if not most.isdigit() or not used.isdigit() or int(most) >= _NO_LIMIT:
        return None
    reclaimable = _numbers(folder / "memory.stat").get("inactive_file", 0)
    return Memory(max(0, int(most) - int(used) + reclaimable), int(most), limited=True)


def _numbers(file: Path) -> dict[str, int]:
    """Numbers by name, from lines such as `MemAvailable:  123 kB` or `inactive_file 123`."""
    words = (line.replace(":", " ").split() for line in _text(file).splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) > 1 and pair[1].isdigit()}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def find_folder(path: Path) -> FolderCheck:
    """Whether files can be created in `path`, or in the nearest folder above it that exists."""
    folder = path
    try:
        folder = _nearest(path)
        free = shutil.disk_usage(folder).free
        # Tried, because permission bits are not enough: root passes them on read-only file systems.
        os.rmdir(tempfile.mkdtemp(prefix=".spach-doctor-", dir=folder))
    except OSError as error:
        return FolderCheck(folder, 0, f"it cannot be written ({(error.strerror or str(error)).lower()})")
    return FolderCheck(folder, free)


def _nearest(path: Path) -> Path:
    folder = path.absolute()  # OSError where the working directory was deleted
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def temporary_folder() -> FolderCheck:
    """The folder for temporary files, and whether it can be written."""
    try:
        return find_folder(Path(tempfile.gettempdir()))
    except OSError as error:  # not one of the usual folders can be written
        wanted = Path(os.environ.get("TMPDIR", "/tmp"))
        return FolderCheck(wanted, 0, f"no folder for temporary files can be written ({error.strerror or error})")

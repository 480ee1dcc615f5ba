"""How many threads to compute with.

OpenMP threads wait for each other by spinning: where another process uses a core, or the work is small, two threads
take several times as long as one. So proofs on small tensors take one thread, and what PyTorch computes beside other
work leaves that a core.

What this machine's processor can compute: the features that matter for the arithmetic of networks.

Memory and disk that an export may take, and the folders that it must write to.

Source: Linux kernel, "The /proc Filesystem" (meminfo), "Control Group v2" and "Memory Resource Controller" (v1).
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


_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"
_ROOT = Path("/")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a new process may take. `limited`: by a control group, such as a container's, not by the machine."""

    available_bytes: int
    total_bytes: int
    limited: bool = False


@dataclasses.dataclass(frozen=True)
class FolderCheck:
    """A folder that exports write to; `problem` says why that would fail, in a clause."""

    path: Path
    free_bytes: int
    problem: str = ""


def find_memory(root: Path = _ROOT) -> Memory | None:
    """The least of what the machine and every control group around this process leave; None where nothing tells."""
    machine = _meminfo(root)
    groups = list(_groups(root))
    found = [*groups, *([machine] if machine else [])]
    return min(found, key=lambda memory: memory.available_bytes) if found else None


def _meminfo(root: Path) -> Memory | None:
    fields = _numbers(root / "proc/meminfo")
    if "MemAvailable" not in fields:
        return None
    return Memory(fields["MemAvailable"] * 1024, fields.get("MemTotal", 0) * 1024)


def _groups(root: Path) -> Iterator[Memory]:
    """Limits of this process's control group and of those above it, of both versions."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0":
            limit, usage, mount = "memory.max", "memory.current", "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            limit, usage, mount = "memory.limit_in_bytes", "memory.usage_in_bytes", "sys/fs/cgroup/memory"
        else:
            continue
        found = (_group(folder, limit, usage) for folder in _upwards(root / mount, path))
        yield from (memory for memory in found if memory is not None)


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """A group's folder and its parents. Inside a container the path may be the host's and not exist: the mount does."""
    folder = mount / path.lstrip("/")
    while folder != mount and mount in folder.parents:
        yield folder
        folder = folder.parent
    yield mount


def _group(folder: Path, limit: str, usage: str) -> Memory | None:
    """Pages of files that the kernel would give back at once count as free."""
    most, used = _text(folder / limit), _text(folder / usage)
    if not most.isdigit() or not used.isdigit() or int(most) >= _NO_LIMIT:
        return None
    reclaimable = _numbers(folder / "memory.stat").get("inactive_file", 0)
    return Memory(max(0, int(most) - int(used) + reclaimable), int(most), limited=True)


def _numbers(file: Path) -> dict[str, int]:
    """Lines such as `MemAvailable:  123 kB` or `inactive_file 123`."""
    words = (line.replace(":", " ").split() for line in _text(file).splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) > 1 and pair[1].isdigit()}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def find_folder(path: Path) -> FolderCheck:
    """Whether files can be made in `path`, or in the nearest folder above it that exists."""
    place = path
    try:
        place = _nearest(path)
        free = shutil.disk_usage(place).free
        os.rmdir(tempfile.mkdtemp(prefix=".spach-doctor-", dir=place))  # permissions do not tell: root may, and cannot
    except OSError as error:
        return FolderCheck(place, 0, f"it cannot be written ({(error.strerror or str(error)).lower()})")
    return FolderCheck(place, free)


def _nearest(path: Path) -> Path:
    place = path.absolute()  # OSError where the user stands in a folder that was deleted
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def temporary_folder() -> FolderCheck:
    """Where temporary files go."""
    try:
        return find_folder(Path(tempfile.gettempdir()))
    except OSError as error:  # not one of the usual folders can be written
        wanted = Path(os.environ.get("TMPDIR", "/tmp"))
        return FolderCheck(wanted, 0, f"no folder for temporary files can be written ({error.strerror or error})")

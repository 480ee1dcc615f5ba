"""Memory under every kind of limit, and folders that can and cannot be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from spach_deploy.common.machine import Memory, find_folder, find_memory, temporary_folder

MEGABYTE = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 8 GiB, 6 of them available."""
    write(tmp_path, "proc/meminfo", f"MemTotal: {8 << 20} kB\nMemFree: 1000 kB\nMemAvailable: {6 << 20} kB\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def group_v2(root: Path, path: str, limit: str, used: int, inactive: int = 0) -> None:
    write(root, f"sys/fs/cgroup{path}/memory.max", f"{limit}\n")
    write(root, f"sys/fs/cgroup{path}/memory.current", f"{used}\n")
    write(root, f"sys/fs/cgroup{path}/memory.stat", f"anon 5\ninactive_file {inactive}\n")


def test_without_limits(root: Path) -> None:
    assert find_memory(root) == Memory(6 << 30, 8 << 30)


def test_no_limit_in_words_of_either_version(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:memory:/a\n0::/a\n")
    group_v2(root, "/a", "max", 5)
    write(root, "sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712")
    write(root, "sys/fs/cgroup/memory/a/memory.usage_in_bytes", "5")
    assert find_memory(root) == Memory(6 << 30, 8 << 30)


def test_a_limit_counts_pages_of_files_as_free(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/user/job\n")
    group_v2(root, "/user/job", str(2 << 30), 1 << 30, inactive=512 * MEGABYTE)
    assert find_memory(root) == Memory((1 << 30) + 512 * MEGABYTE, 2 << 30, limited=True)


def test_the_limit_of_a_group_above(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/user/job\n")
    group_v2(root, "/user/job", "max", 5)
    group_v2(root, "/user", str(1 << 30), 256 * MEGABYTE)
    assert find_memory(root) == Memory(768 * MEGABYTE, 1 << 30, limited=True)


def test_a_limit_in_a_container_whose_path_is_the_hosts(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:cpu,memory:/docker/0123\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", str(1 << 30))
    write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", str(2 << 30))
    assert find_memory(root) == Memory(0, 1 << 30, limited=True)


def test_a_limit_larger_than_what_the_machine_has_free(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    group_v2(root, "", str(64 << 30), 0)
    assert find_memory(root) == Memory(6 << 30, 8 << 30)


@pytest.mark.parametrize("text", ["", "no colons", "0::/../..\n", "x:y:z\n"])
def test_what_cannot_be_read_limits_nothing(root: Path, text: str) -> None:
    write(root, "proc/self/cgroup", text)
    assert find_memory(root) == Memory(6 << 30, 8 << 30)


def test_nothing_tells(tmp_path: Path) -> None:
    assert find_memory(tmp_path) is None


def test_this_machine() -> None:
    memory = find_memory()
    assert memory is None or 0 <= memory.available_bytes <= memory.total_bytes


def test_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    found = find_folder(tmp_path / "build" / "deeper")
    assert (found.path, found.problem) == (tmp_path, "")
    assert found.free_bytes > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "build"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, below: str) -> None:
    """Permissions say nothing to root; a file where a folder should be stops everybody."""
    (tmp_path / "file").touch()
    found = find_folder(tmp_path / "file" / below)
    assert found.problem.startswith("it cannot be written (")


def test_a_current_folder_that_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert find_folder(Path("build")).problem.startswith("it cannot be written")


def test_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert temporary_folder().path == tmp_path


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert "no folder for temporary files" in temporary_folder().problem

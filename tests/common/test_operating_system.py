"""What Linux and Windows do differently, on the system that runs this; tests/windows runs it on Windows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spach_deploy.common import operating_system, processes
from spach_deploy.common.files import Destination, is_own, lock_file, private_folder

HOLD = """
import sys, time
from pathlib import Path
from spach_deploy.common import operating_system
from spach_deploy.common.files import lock_file

with lock_file(Path(sys.argv[1])) as descriptor:
    operating_system.lock(descriptor, wait=True)
    print("locked", flush=True)
    time.sleep(600)
"""

OPEN_SHARED = """
import sys
from spach_deploy.common import operating_system

connection = operating_system.shared_connection(int(sys.argv[1]))
number, text = connection.recv()
with open(operating_system.shared_descriptor(number), "wb") as file:
    file.write(text)
connection.send(("written", len(text)))
connection.recv()
"""

SPAWN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""

INTERRUPTED = """
import signal, sys, threading
from spach_deploy.cli.interrupts import ending_on_interrupt

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with ending_on_interrupt(lambda: "The old one is kept.", grace_s=0.5):
        print("ready", flush=True)
        threading.Event().wait()
except KeyboardInterrupt:
    sys.exit(130)
"""

PARENT = """
import subprocess, sys, time
from spach_deploy.common import processes

code = "import time; time.sleep(600)"
child = processes.start([sys.executable, "-c", code], stdout=subprocess.DEVNULL, is_tied=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def started(code: str, *arguments: str, is_tied: bool = False) -> tuple[subprocess.Popen[bytes], str]:
    """A process that runs `code`, and the first line that it printed."""
    command = [sys.executable, "-c", code, *arguments]
    process = processes.start(command, stdout=subprocess.PIPE, is_tied=is_tied)
    assert process.stdout is not None
    return process, process.stdout.readline().decode().strip()


def is_gone(pid: int) -> bool:
    """Whether the process ends within a minute."""
    end = time.monotonic() + 60
    while operating_system.is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not operating_system.is_alive(pid)


def take(path: Path) -> None:
    """Lock a file at once, or raise BlockingIOError."""
    with lock_file(path) as descriptor:
        operating_system.lock(descriptor, wait=False)


def test_a_lock_is_one_process_s_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process, said = started(HOLD, str(path))
    try:
        assert said == "locked"
        with pytest.raises(BlockingIOError):
            take(path)
    finally:
        processes.end(process)
    with lock_file(path) as descriptor:
        operating_system.lock(descriptor, wait=True)


def test_a_lock_that_is_given_back_can_be_taken_again(tmp_path: Path) -> None:
    take(tmp_path / "lock")
    take(tmp_path / "lock")


def test_a_file_is_replaced_in_one_step_and_the_old_one_kept_at_the_draft(tmp_path: Path) -> None:
    draft, path = tmp_path / "draft", tmp_path / "report.json"
    draft.write_bytes(b"new")
    path.write_bytes(b"old")
    assert operating_system.exchange(draft, path)
    assert (path.read_bytes(), draft.read_bytes()) == (b"new", b"old")
    assert sorted(os.listdir(tmp_path)) == ["draft", "report.json"]


def test_a_directory_is_replaced_by_another_and_an_empty_one_too(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for number in range(3):
        draft = tmp_path / f"draft-{number}"
        draft.mkdir()
        (draft / "manifest.json").write_text(str(number), encoding="utf-8")
        if not number:
            target.mkdir()
        Destination.of(target).put(draft)
        assert (target / "manifest.json").read_text(encoding="utf-8") == str(number)


def test_a_directory_with_content_is_not_replaced_by_one_that_expects_none(tmp_path: Path) -> None:
    target, draft = tmp_path / "bundle", tmp_path / "draft"
    destination = Destination.of(target)
    for folder in (target, draft):
        folder.mkdir()
        (folder / "manifest.json").write_text(folder.name, encoding="utf-8")
    with pytest.raises(FileExistsError):
        destination.put(draft)
    assert (target / "manifest.json").read_text(encoding="utf-8") == "bundle"


def test_a_text_is_written_with_the_same_bytes_on_every_system(tmp_path: Path) -> None:
    destination = Destination.of(tmp_path / "read me.txt").write_text("a\né\n")
    destination.write_text("b\né\n")
    assert (tmp_path / "read me.txt").read_bytes() == b"b\n\xc3\xa9\n"


def test_files_and_directories_are_flushed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    operating_system.flush(tmp_path / "file")
    operating_system.flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        operating_system.flush(tmp_path / "missing")


def test_a_private_folder_is_the_user_s_own(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "mine")
    assert is_own(folder)
    (folder / "file").write_bytes(b"")
    assert is_own(folder / "file")


def test_a_worker_has_the_connection_and_the_open_file_of_its_parent() -> None:
    descriptor = operating_system.memory_file("spach-test")
    number = operating_system.shared_number(descriptor)
    connection, process = processes.start_worker(OPEN_SHARED, shared=(number,))
    try:
        connection.send((number, b"a plan\n" * 1000))
        assert connection.recv() == ("written", 7000)
        os.lseek(descriptor, 0, os.SEEK_SET)
        assert os.read(descriptor, 8000) == b"a plan\n" * 1000
    finally:
        connection.close()
        processes.end(process)
        os.close(descriptor)


def test_a_worker_sees_the_connection_close() -> None:
    connection, process = processes.start_worker(OPEN_SHARED, stderr=subprocess.DEVNULL)
    connection.close()
    assert process.wait(60) != 0


def test_a_process_is_killed_with_all_that_it_started() -> None:
    process, said = started(SPAWN, is_tied=True)
    operating_system.kill_with_children(process)
    assert process.wait(60) != 0
    assert is_gone(int(said))


def test_a_tied_process_ends_when_its_parent_is_killed() -> None:
    parent, said = started(PARENT)
    assert operating_system.is_alive(int(said))
    processes.end(parent)
    assert is_gone(int(said))


def test_a_process_that_waits_for_a_lock_ends_when_it_is_interrupted() -> None:
    process, said = started(INTERRUPTED)
    assert said == "ready"
    operating_system.interrupt(process)
    assert process.wait(60) in ((130, 1) if sys.platform == "win32" else (130,))  # 1: killed, where no console is


def test_an_ended_process_tells_its_code_and_memory() -> None:
    process = processes.start([sys.executable, "-c", "import sys; sys.exit(3)"])
    end = time.monotonic() + 60
    while (found := operating_system.ended(process)) is None and time.monotonic() < end:
        time.sleep(0.02)
    assert found is not None
    assert found.code == 3
    if sys.platform != "win32":  # Wine does not keep it
        assert found.peak_bytes is not None
        assert 1 << 20 < found.peak_bytes < 1 << 32


def test_processes_are_alive_until_they_have_ended() -> None:
    process, _ = started("import time; print(); time.sleep(600)")
    assert operating_system.is_alive(process.pid)
    assert operating_system.is_alive(os.getpid())
    processes.end(process)
    assert is_gone(process.pid)


def test_a_process_uses_the_cores_that_it_was_given() -> None:
    core = operating_system.usable_cores()[-1]
    code = "import time; from spach_deploy.common.operating_system import *; time.sleep(1); print(usable_cores())"
    process = processes.start([sys.executable, "-c", code], stdout=subprocess.PIPE, cores=frozenset({core}))
    assert process.communicate(timeout=60)[0].decode().split() == [f"[{core}]"]


def test_memory_and_cores_of_the_machine_are_known() -> None:
    from spach_deploy.common.machine import available_threads, find_memory, processor_name

    memory = find_memory()
    assert memory is not None
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert available_threads() == len(operating_system.usable_cores()) >= 1
    assert processor_name()
    for peak in (operating_system.peak_resident_bytes(), operating_system.peak_bytes_of_program()):
        assert 1 << 20 < peak < 1 << 40


def test_the_names_that_windows_refuses_are_named_with_the_reason() -> None:
    bad = ("con", "NUL.txt", "lpt1", "COM9.onnx", "a:b", "a/b", "a\\b", "what?", "ends.", "ends ", "a\x01b", "<x>")
    assert [name for name in bad if not operating_system.problem_of_name(name, on_windows=True)] == []
    good = ("model.onnx", "console", "com", "lpt10", ".hidden", "ms_hybrid_s+-fp16", "ü", "a b")
    assert [name for name in good if operating_system.problem_of_name(name, on_windows=True)] == []
    assert [name for name in bad if operating_system.problem_of_name(name, on_windows=False)] == []


@pytest.mark.skipif(sys.platform != "win32", reason="names of Windows")
@pytest.mark.parametrize("name", ["con", "bundle."])
def test_an_output_that_windows_would_write_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    from spach_deploy.bundle.store import check_target
    from spach_deploy.common.errors import BundleError

    with pytest.raises(BundleError, match="Windows"):
        check_target(tmp_path / name, overwrite=False)


def test_an_exit_code_is_no_crash() -> None:
    assert [operating_system.crash(code) for code in (0, 1, 2, 3, 130, 255)] == [None] * 6


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Linux")
def test_crashes_are_named_by_their_signals() -> None:
    assert operating_system.crash(-9) == ("SIGKILL", True, False)
    assert operating_system.crash(-11) == ("SIGSEGV", False, True)
    assert operating_system.crash(-64) == ("SIGRTMAX", False, False)
    assert operating_system.crash(-33) == ("signal 33", False, False)


@pytest.mark.skipif(sys.platform != "win32", reason="statuses of Windows")
def test_crashes_are_named_by_their_statuses() -> None:
    code = "import ctypes; ctypes.WinDLL('kernel32').ExitProcess(0xC0000005)"
    process = processes.start([sys.executable, "-c", code])
    assert operating_system.crash(process.wait(60)) == ("an access violation (0xC0000005)", False, True)
    assert operating_system.crash(0xC0000017) == ("a lack of memory (0xC0000017)", True, False)
    assert operating_system.crash(0xC0000001) == ("the exception 0xC0000001", False, False)

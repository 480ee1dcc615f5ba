"""All that Linux and Windows do differently: locks, renames, processes, interrupts, memory, names.

Each function is defined twice, once for each system, with the same meaning; type checkers read one half of this module
for each. What neither half does differently stands once. Everything else in this package uses these functions, and
imports on both systems. docs/platforms.md says what was run where.

Sources: Linux manual pages flock(2), renameat2(2), prctl(2), memfd_create(2); Microsoft, "Windows API index"
(ReplaceFileW, CreateJobObjectW, GetProcessMemoryInfo, GlobalMemoryStatusEx) and "Naming Files, Paths, and Namespaces".
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    from multiprocessing import connection as connections
    from typing import TypeAlias

    if sys.platform == "win32":
        Connection: TypeAlias = connections.PipeConnection[Any, Any]
    else:
        Connection: TypeAlias = connections.Connection[Any, Any]


class Crash(NamedTuple):
    """How the system ended a process: `SIGSEGV`, or `an access violation (0xC0000005)` on Windows.

    `of_memory`: it mostly means too little memory. `of_native_code`: code that is not Python crashed.
    """

    name: str
    of_memory: bool = False
    of_native_code: bool = False


class Ended(NamedTuple):
    """A process that has ended: its exit code, and its largest resident size in bytes, None where not known."""

    code: int
    peak_bytes: int | None


class MemoryBytes(NamedTuple):
    """Memory of the machine in bytes."""

    available: int
    total: int


_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


def problem_of_name(name: str, *, on_windows: bool = sys.platform == "win32") -> str:
    """Why `name` cannot be a file's or a directory's on this system, as a clause; empty where it can.

    Linux itself refuses what it does not allow; Windows writes some of these names elsewhere or otherwise.
    """
    if not on_windows:
        return ""
    if found := _FORBIDDEN.search(name):
        return f"Windows allows no {found[0]!r} in a name"
    if name.endswith((".", " ")):
        return "Windows drops a full stop or a space at the end of a name"
    return "Windows reserves that name for a device" if _RESERVED.fullmatch(name) else ""


if sys.platform == "win32":
    import ctypes
    import msvcrt
    import threading
    from ctypes import wintypes

    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)

    _HANDLE_FUNCTIONS = (
        *("OpenProcess", "CloseHandle", "WaitForSingleObject", "CreateJobObjectW", "SetInformationJobObject"),
        *("AssignProcessToJobObject", "TerminateJobObject", "SetProcessAffinityMask", "GetProcessAffinityMask"),
        *("GetCurrentProcess", "K32GetProcessMemoryInfo", "LockFileEx"),
    )

    def _call(name: str, *arguments: Any) -> int:
        """Call a function of kernel32 with handles and sizes of 64 bits; its result, 0 for a failure."""
        assert name in _HANDLE_FUNCTIONS, name
        function = getattr(_kernel32, name)
        function.restype = ctypes.c_void_p if name in ("OpenProcess", "CreateJobObjectW", "GetCurrentProcess") else int
        wide = [ctypes.c_size_t(value) if isinstance(value, int) else value for value in arguments]
        return int(function(*wide) or 0)

    # Files

    _EXCLUSIVE, _AT_ONCE, _LOCKED = 2, 1, 33  # LOCKFILE_EXCLUSIVE_LOCK, _FAIL_IMMEDIATELY, ERROR_LOCK_VIOLATION
    _BINARY = os.O_BINARY | os.O_NOINHERIT

    def open_to_lock(path: Path) -> int:
        """A descriptor of a file to lock, which is created if needed. OSError for a link."""
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        return os.open(path, os.O_RDWR | os.O_CREAT | _BINARY, 0o600)

    def lock(descriptor: int, *, wait: bool) -> None:
        """Lock an open file for this process alone; the system unlocks it when the process ends, however it does.

        `wait`: until others have unlocked it; BlockingIOError otherwise.
        """
        flags = _EXCLUSIVE | (0 if wait else _AT_ONCE)
        where = (ctypes.c_size_t * 4)()  # an OVERLAPPED of zeros: from the first byte
        if not _call("LockFileEx", msvcrt.get_osfhandle(descriptor), flags, 0, 1, 0, ctypes.byref(where)):
            if ctypes.get_last_error() == _LOCKED:
                raise BlockingIOError(errno.EAGAIN, "another process has locked it")
            raise ctypes.WinError(ctypes.get_last_error())

    def flush(path: Path) -> None:
        """Have the disk hold what was written to a file. Windows writes directories by itself."""
        if path.is_dir():
            return
        descriptor = os.open(path, os.O_RDWR | _BINARY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def exchange(one: Path, other: Path) -> bool:
        """Swap the names of two files in one step, and return whether that was possible."""
        if one.is_dir() or other.is_dir():
            return False
        aside = one.with_name(f"{one.name}-old")
        replace = _kernel32.ReplaceFileW
        replace.argtypes = [*[wintypes.LPCWSTR] * 3, wintypes.DWORD, *[wintypes.LPVOID] * 2]
        if not replace(str(other), str(one), str(aside), 0, None, None):
            raise ctypes.WinError(ctypes.get_last_error())
        aside.rename(one)
        return True

    def move_directory(draft: Path, path: Path) -> None:
        """Rename a directory; an empty one may be at `path`. OSError where something else is."""
        if path.is_dir():
            path.rmdir()
        draft.rename(path)

    def is_private(path: Path, status: os.stat_result) -> bool:
        """Whether nobody but this user may write to `path`: it is in the user's profile, which Windows sees to."""
        home = os.path.realpath(Path.home())
        try:
            return os.path.commonpath([home, os.path.realpath(path)]) == home
        except ValueError:  # of another drive
            return False

    def make_private(path: Path) -> str:
        """What the user can do about a directory that is not private, as a clause."""
        return f"it is not in {Path.home()}, which Windows keeps from other users"

    def caches() -> Path:
        """The directory in which programs keep this user's caches. RuntimeError where there is none."""
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")

    def user_name() -> str:
        """A part of a temporary directory's name; Windows has one directory for temporary files for each user."""
        return "user"

    def memory_file(name: str) -> int:
        """A descriptor of a new file without a name, on the disk for temporary files."""
        import tempfile

        with tempfile.TemporaryFile(prefix=f"{name}-") as file:
            return os.dup(file.fileno())

    _left: list[str] = []

    @contextlib.contextmanager
    def temporary_folder(prefix: str) -> Iterator[Path]:
        """A new directory for a block. What is still in use at its end, as a mapped file, is deleted later, with the
        next one or at the end of this process: Windows deletes no file that is in use.
        """
        import atexit
        import tempfile

        folder = tempfile.mkdtemp(prefix=prefix)
        try:
            yield Path(folder)
        finally:
            atexit.unregister(_remove_left)
            atexit.register(_remove_left)
            _left.append(folder)
            _remove_left()

    def _remove_left() -> None:
        import shutil

        for folder in [*_left]:
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                _left.remove(folder)

    # Processes

    _QUERY, _SET, _SYNCHRONIZE = 0x1000, 0x0200, 0x00100000  # PROCESS_QUERY_LIMITED_INFORMATION, _SET_INFORMATION
    _JOB_RIGHTS = 0x0100 | 0x0001  # PROCESS_SET_QUOTA | PROCESS_TERMINATE
    _RUNNING, _DENIED = 0x102, 5  # WAIT_TIMEOUT, ERROR_ACCESS_DENIED
    _KILL_ON_JOB_CLOSE, _EXTENDED_LIMITS = 0x2000, 9
    _LEAST_STATUS = 0xC0000000
    _STATUSES = {
        0xC0000005: Crash("an access violation (0xC0000005)", of_native_code=True),
        0xC000001D: Crash("an illegal instruction (0xC000001D)", of_native_code=True),
        0xC00000FD: Crash("a stack overflow (0xC00000FD)", of_native_code=True),
        0xC0000374: Crash("a corrupt heap (0xC0000374)", of_native_code=True),
        0xC0000409: Crash("its own abort (0xC0000409)", of_native_code=True),
        0xC0000017: Crash("a lack of memory (0xC0000017)", of_memory=True),
        0xC000012D: Crash("a lack of memory (0xC000012D)", of_memory=True),
        0xC000013A: Crash("Ctrl-C (0xC000013A)"),
        0xC0000135: Crash("a DLL that is missing (0xC0000135)"),
    }

    class _BasicLimits(ctypes.Structure):
        _fields_ = (
            ("times", ctypes.c_longlong * 2),
            ("flags", wintypes.DWORD),
            ("sizes", ctypes.c_size_t * 2),
            ("processes", wintypes.DWORD),
            ("affinity", ctypes.c_size_t),
            ("classes", wintypes.DWORD * 2),
        )

    class _ExtendedLimits(ctypes.Structure):
        _fields_ = (("basic", _BasicLimits), ("io", ctypes.c_ulonglong * 6), ("memory", ctypes.c_size_t * 4))

    class _MemoryCounters(ctypes.Structure):
        _fields_ = (("size", wintypes.DWORD), ("faults", wintypes.DWORD), ("bytes", ctypes.c_size_t * 8))

    class _MemoryStatus(ctypes.Structure):
        _fields_ = (("size", wintypes.DWORD), ("load", wintypes.DWORD), ("bytes", ctypes.c_ulonglong * 7))

    class _Process:
        """A handle of a running or ended process, for a block. OSError where there is none, or it is not ours."""

        def __init__(self, pid: int, rights: int) -> None:
            self.handle = _call("OpenProcess", rights, 0, pid)
            if not self.handle:
                raise ctypes.WinError(ctypes.get_last_error())

        def __enter__(self) -> int:
            return self.handle

        def __exit__(self, *_: object) -> None:
            _call("CloseHandle", self.handle)

    _jobs: dict[int, int] = {}
    """By process id: its job object, which ends it and all that it started when this process ends."""

    def start(
        command: Sequence[str], *, shared: Iterable[int], is_tied: bool, cores: frozenset[int] | None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a process that Ctrl-C does not reach. OSError where that fails.

        `shared`: numbers from `shared_number` of what it may use. `is_tied`: it ends when this process dies. `cores`:
        those that it may use; None for all. `options`: of `subprocess.Popen`.
        """
        handles = list(shared)
        for handle in handles:
            os.set_handle_inheritable(handle, True)
        info = subprocess.STARTUPINFO()
        info.lpAttributeList = {"handle_list": handles}
        group = subprocess.CREATE_NEW_PROCESS_GROUP
        process = subprocess.Popen(command, creationflags=group, startupinfo=info, **options)
        if is_tied:
            _tie(process)
        if cores is not None:
            with _Process(process.pid, _SET) as handle:
                _call("SetProcessAffinityMask", handle, sum(1 << core for core in cores))
        return process

    def _tie(process: subprocess.Popen[bytes]) -> None:
        job = _call("CreateJobObjectW", None, None)
        limits = _ExtendedLimits()
        limits.basic.flags = _KILL_ON_JOB_CLOSE
        _call("SetInformationJobObject", job, _EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits))
        with _Process(process.pid, _JOB_RIGHTS) as handle:
            _call("AssignProcessToJobObject", job, handle)
        _jobs[process.pid] = job

    def shared_number(descriptor: int) -> int:
        """The number by which a process that is started can open this descriptor."""
        return msvcrt.get_osfhandle(descriptor)

    def shared_descriptor(number: int) -> int:
        """In the process that was started: the descriptor for a number of `shared_number`."""
        return msvcrt.open_osfhandle(number, os.O_RDWR | os.O_BINARY)

    def shared_connection(number: int) -> Connection:
        """In the process that was started: the connection for the number that `fileno` of its other end gave."""
        from multiprocessing.connection import PipeConnection

        return PipeConnection(number)

    def interrupt(process: subprocess.Popen[bytes]) -> None:
        """Press Ctrl-Break, which our commands take as Ctrl-C, in a process that `start` started.

        Without a console, as in a service, nothing can be pressed, and it is killed.
        """
        if process.poll() is None and not _kernel32.GenerateConsoleCtrlEvent(signal.CTRL_BREAK_EVENT, process.pid):
            process.kill()

    _watchers: list[Any] = []
    """What Windows calls at Ctrl-C and Ctrl-Break; kept, because it holds no reference."""

    def watch_interrupts(watch: Callable[[], object]) -> Callable[[], None]:
        """Have `watch` called at Ctrl-C, in another thread. Returns a function that ends that.

        Python's own handler does not run while the main thread waits for a lock.
        """

        def call(event: int) -> bool:
            if event in (signal.CTRL_C_EVENT, signal.CTRL_BREAK_EVENT):
                watch()
            return False  # and then Python's own

        watcher = ctypes.WINFUNCTYPE(wintypes.BOOL, wintypes.DWORD)(call)
        _watchers.append(watcher)
        _kernel32.SetConsoleCtrlHandler(watcher, True)

        def stop() -> None:
            _kernel32.SetConsoleCtrlHandler(watcher, False)

        return stop

    def kill_with_children(process: subprocess.Popen[bytes]) -> None:
        """Kill a process that `start` has tied, and all that it started."""
        if job := _jobs.pop(process.pid, 0):
            _call("TerminateJobObject", job, 1)
            _call("CloseHandle", job)

    def ended(process: subprocess.Popen[bytes]) -> Ended | None:
        """How a process ended; None while it runs."""
        code = process.poll()
        if code is None:
            return None
        try:
            with _Process(process.pid, _QUERY) as handle:
                return Ended(code, _peak_bytes(handle) or None)
        except OSError:
            return Ended(code, None)

    def is_alive(pid: int) -> bool:
        """Whether a process of this id runs on this machine."""
        try:
            with _Process(pid, _QUERY | _SYNCHRONIZE) as handle:
                return _call("WaitForSingleObject", handle, 0) == _RUNNING
        except OSError:
            return ctypes.get_last_error() == _DENIED

    def crash(code: int) -> Crash | None:
        """How the system ended a process, from its exit code; None where the process ended itself."""
        return _STATUSES.get(code, Crash(f"the exception 0x{code:08X}")) if code >= _LEAST_STATUS else None

    _alarms: list[threading.Timer] = []

    def set_alarm(seconds: float, ring: Callable[..., object]) -> None:
        """Call `ring` after so many seconds, unless the process has ended by then."""
        alarm = threading.Timer(seconds, ring)
        alarm.daemon = True
        alarm.start()
        _alarms.append(alarm)

    def alarm_is_set() -> bool:
        """Whether `set_alarm` was called."""
        return bool(_alarms)

    # The machine

    def takes_text(stream: TextIO | None) -> bool:
        """Whether Python writes text to what is behind a stream, not bytes: to a console of Windows."""
        return stream is not None and stream.isatty()

    def usable_cores() -> list[int]:
        """Numbers of the cores that this process may use."""
        ours, all_of_them = ctypes.c_size_t(), ctypes.c_size_t()
        _call("GetProcessAffinityMask", _call("GetCurrentProcess"), ctypes.byref(ours), ctypes.byref(all_of_them))
        return [core for core in range(ours.value.bit_length()) if ours.value >> core & 1] or [0]

    def _peak_bytes(handle: int) -> int:
        counters = _MemoryCounters()
        _call("K32GetProcessMemoryInfo", handle, ctypes.byref(counters), ctypes.sizeof(counters))
        return int(counters.bytes[0])

    def peak_resident_bytes() -> int:
        """Largest resident size of this process so far."""
        return _peak_bytes(_call("GetCurrentProcess"))

    def peak_bytes_of_program() -> int:
        """Largest resident size of this process so far."""
        return peak_resident_bytes()

    def memory_of_machine() -> MemoryBytes | None:
        """Memory of the machine; None where it is read from files."""
        status = _MemoryStatus()
        status.size = ctypes.sizeof(status)
        found = _kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return MemoryBytes(int(status.bytes[1]), int(status.bytes[0])) if found else None

    def processor_name() -> str:
        """The CPU's model name; empty where it is read from a file."""
        import winreg

        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
                return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
        except OSError:
            return ""

    def load_average() -> float | None:
        """How many processes wanted a core in the last minute; None where the system does not count them."""
        return None

    CUDA_DRIVER, NVML = "nvcuda.dll", "nvml.dll"
    """The libraries of NVIDIA's driver."""

    RESTART = "shutdown /r"
    """The command that restarts the machine."""

    def setting_variable(name: str, value: str | None) -> str:
        """The command that sets an environment variable in PowerShell; None removes it."""
        return f"Remove-Item Env:{name}" if value is None else f'$env:{name} = "{value}"'

else:
    import ctypes
    import fcntl
    import resource

    # Files

    _AT_FDCWD, _RENAME_EXCHANGE = -100, 2

    def open_to_lock(path: Path) -> int:
        """A descriptor of a file to lock, which is created if needed. OSError for a link."""
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)

    def lock(descriptor: int, *, wait: bool) -> None:
        """Lock an open file for this process alone; the system unlocks it when the process ends, however it does.

        `wait`: until others have unlocked it; BlockingIOError otherwise.
        """
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def flush(path: Path) -> None:
        """Have the disk hold what was written to a file or a directory."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def exchange(one: Path, other: Path) -> bool:
        """Swap two names in one step, renameat2(RENAME_EXCHANGE), and return whether that was possible."""
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
        return hasattr(libc, "renameat2") and libc.renameat2(*arguments) == 0

    def move_directory(draft: Path, path: Path) -> None:
        """Rename a directory; an empty one may be at `path`. OSError where something else is."""
        draft.rename(path)

    def is_private(path: Path, status: os.stat_result) -> bool:
        """Whether nobody but this user may write to `path`: by its owner and permission bits."""
        return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

    def make_private(path: Path) -> str:
        """What the user can do about a directory that is not private, as a clause."""
        return f"others may write in it, or own it; chmod -R go-w {path} where it is yours"

    def caches() -> Path:
        """The directory in which programs keep this user's caches. RuntimeError where there is none."""
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")

    def user_name() -> str:
        """A part of a temporary directory's name, because all users have one directory for temporary files."""
        return str(os.getuid())

    def memory_file(name: str) -> int:
        """A descriptor of a new file in memory (memfd), because a disk may be full."""
        return os.memfd_create(name)

    @contextlib.contextmanager
    def temporary_folder(prefix: str) -> Iterator[Path]:
        """A new directory for a block. What is still in use at its end, as a mapped file, remains usable."""
        import tempfile

        with tempfile.TemporaryDirectory(prefix=prefix) as folder:
            yield Path(folder)

    # Processes

    _PR_SET_PDEATHSIG = 1

    def start(
        command: Sequence[str], *, shared: Iterable[int], is_tied: bool, cores: frozenset[int] | None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, which Ctrl-C does not reach. OSError where that fails.

        `shared`: numbers from `shared_number` of what it may use. `is_tied`: it is interrupted when this process dies.
        `cores`: those that it may use; None for all. `options`: of `subprocess.Popen`.
        """
        parent = os.getpid()

        def prepare() -> None:
            if is_tied:
                _interrupt_with(parent)
            if cores:
                os.sched_setaffinity(0, cores)

        before = prepare if is_tied or cores else None
        return subprocess.Popen(command, pass_fds=tuple(shared), start_new_session=True, preexec_fn=before, **options)

    def _interrupt_with(parent: int) -> None:
        """In the new process: receive SIGINT when the parent dies, and do not ignore SIGINT and SIGTERM."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in a shell's background jobs, and inherited from them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:  # it died before prctl was called
            os._exit(1)

    def shared_number(descriptor: int) -> int:
        """The number by which a process that is started can open this descriptor."""
        return descriptor

    def shared_descriptor(number: int) -> int:
        """In the process that was started: the descriptor for a number of `shared_number`."""
        return number

    def shared_connection(number: int) -> Connection:
        """In the process that was started: the connection for the number that `fileno` of its other end gave."""
        from multiprocessing.connection import Connection

        return Connection(number)

    def interrupt(process: subprocess.Popen[bytes]) -> None:
        """Send SIGINT, as Ctrl-C does, to a process that `start` started."""
        process.send_signal(signal.SIGINT)

    def watch_interrupts(watch: Callable[[], object]) -> Callable[[], None]:
        """Nothing: Linux wakes the main thread at Ctrl-C, and Python's handler runs at once."""
        return lambda: None

    def kill_with_children(process: subprocess.Popen[bytes]) -> None:
        """Kill a process that `start` started, and all that it started."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def ended(process: subprocess.Popen[bytes]) -> Ended | None:
        """How a process ended; None while it runs. Reaps it, so ask once more only for None."""
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if not pid:
            return None
        process.returncode = os.waitstatus_to_exitcode(status)
        return Ended(process.returncode, usage.ru_maxrss * 1024)

    def is_alive(pid: int) -> bool:
        """Whether a process of this id runs on this machine."""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            return True
        return True

    def crash(code: int) -> Crash | None:
        """How the system ended a process, from its exit code; None where the process ended itself."""
        if code >= 0:
            return None
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return Crash(name, -code == signal.SIGKILL, -code in (signal.SIGSEGV, signal.SIGABRT))

    def set_alarm(seconds: float, ring: Callable[..., object]) -> None:
        """Call `ring` after so many seconds, unless the process has ended by then."""
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def alarm_is_set() -> bool:
        """Whether the time of `set_alarm` runs."""
        return signal.getitimer(signal.ITIMER_REAL)[0] > 0

    # The machine

    def takes_text(stream: TextIO | None) -> bool:
        """Whether Python writes text to what is behind a stream, not bytes: to a console of Windows."""
        return False

    def usable_cores() -> list[int]:
        """Numbers of the cores that this process may use."""
        return sorted(os.sched_getaffinity(0))

    def peak_resident_bytes() -> int:
        """Largest resident size of this process so far, as Linux counts it."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def peak_bytes_of_program() -> int:
        """Largest resident size of this program. getrusage would also count the process before it began to run it."""
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))

    def memory_of_machine() -> MemoryBytes | None:
        """Memory of the machine; None where it is read from files."""
        return None

    def processor_name() -> str:
        """The CPU's model name; empty where it is read from a file."""
        return ""

    def load_average() -> float | None:
        """How many processes wanted a core in the last minute; None where the system does not count them."""
        return os.getloadavg()[0]

    CUDA_DRIVER, NVML = "libcuda.so.1", "libnvidia-ml.so.1"
    """The libraries of NVIDIA's driver."""

    RESTART = "sudo reboot"
    """The command that restarts the machine."""

    def setting_variable(name: str, value: str | None) -> str:
        """The command that sets an environment variable in a shell; None removes it."""
        return f"unset {name}" if value is None else f"export {name}={value}"

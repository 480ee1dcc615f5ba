"""Reading, writing, hashing and locking files, and reading npz files safely.

`Destination` writes a file or a directory in one step, and never over something that was not there when the command
began. `read_text` and `read_json` read small files of users with errors in their words. `sha256_of` hashes, `lock_file`
opens files to lock, and `utf8_path` gives native libraries, which accept only UTF-8, a path that they can open.

Sizes and dtypes of an npz file are checked from the headers, without NumPy, before any array is read.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from spach_deploy.common import operating_system
from spach_deploy.common.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt


Identity = tuple[object, ...]

_MANIFEST = "manifest.json"
_BLOCK_BYTES = 1 << 20
_LONG_NAME = 100
"""Bytes. File systems allow 255; names of temporary siblings also hold the host's name and some numbers."""

CACHE_VARIABLE, NO_CACHE = "SPACH_CACHE", "none"
"""Environment variable with the folder of caches, and its value for none."""


@dataclasses.dataclass(frozen=True)
class Destination:
    """A path to write a file or directory to, and the content that may be replaced there.

    `before`: identity of what was there when this object was made, None for nothing or an empty directory.
    """

    path: Path
    before: Identity | None

    @classmethod
    def of(cls, path: Path) -> Destination:
        """A destination that may replace what is at `path` now."""
        return cls(path, identity(path))

    def check(self) -> None:
        """FileExistsError where the content has changed since this object was made."""
        if identity(self.path) not in (None, self.before):
            raise _taken(self.path)

    def put(self, draft: Path) -> Destination:
        """Move `draft`, which must be on the same file system, to this path in one step.

        The earlier content, if any, is afterwards at the path of `draft`; the caller deletes it. Raises FileExistsError
        where something else has been written here meanwhile (it is left alone), and OSError where nothing can be
        written.
        """
        new = identity(draft)
        if self.path.is_dir() and not draft.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.path))
        if self.before is None or not os.path.lexists(self.path):
            _move(draft, self.path)
            return Destination(self.path, new)
        _exchange(draft, self.path)
        while identity(draft) != self.before:
            _exchange(draft, self.path)  # until this draft is back: other processes may exchange at the same moment
            if identity(draft) == new:
                raise _taken(self.path)
        return Destination(self.path, new)

    def write(self, write: Callable[[BinaryIO], object], *, mode: int = 0o666) -> Destination:
        """Write a file in one step: a kill or a full disk leaves the earlier file intact. Raises what `put` raises."""
        if os.path.lexists(self.path) and not self.path.is_file() and not self.path.is_dir():
            raise OSError(errno.EINVAL, "it is no regular file", str(self.path))
        draft = self.path.with_name(f".{short_name(self.path)}.{draft_name()}")
        try:
            with open(draft, "xb", opener=lambda path, flags: os.open(path, flags, mode)) as file:
                write(file)
            return self.put(draft)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def write_text(self, text: str, *, mode: int = 0o666) -> Destination:
        """`write` a text as UTF-8."""
        return self.write(lambda file: file.write(text.encode("utf-8")), mode=mode)


@contextlib.contextmanager
def naming_tmpdir() -> Iterator[None]:
    """Turn "disk full" into an UnavailableError that names TMPDIR, around code that writes temporary files only."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"TMPDIR, the folder for temporary files, is full: {tempfile.gettempdir()}."
        raise UnavailableError(message, "Free some space there, or set TMPDIR to a folder on another disk.") from error


def try_to_write(path: Path) -> None:
    """OSError where no file could be written to `path`: it is a directory, or its folder is not writable.

    A temporary file is written, because permission bits are not enough: root passes them on read-only file systems.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with tempfile.TemporaryFile(dir=path.parent) as file:
        file.write(b"tried")


def blocks_of(file: Path) -> Iterator[bytes]:
    """A file's bytes, 1 MiB at a time."""
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block


def sha256_of(file: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    for block in blocks_of(file):
        digest.update(block)
    return digest.hexdigest()


def draft_name() -> str:
    """A unique name: this process's id, by which others can see whether it is alive, and 32 random bits."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def short_name(path: Path) -> str:
    """A path's name as part of a temporary sibling's name; a hash of it where it is long."""
    name = os.fsencode(path.name)
    return path.name if len(name) <= _LONG_NAME else hashlib.sha256(name).hexdigest()[:32]


def is_own(path: Path) -> bool:
    """Whether `path` is a file or a directory, not a link, that this user owns and nobody else may write to."""
    try:
        status = path.lstat()
    except OSError:
        return False
    is_plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return is_plain and operating_system.is_private(path, status)


def user_cache() -> Path | None:
    """This user's cache folder: `SPACH_CACHE`, by default ~/.cache/spach-deploy, and on Windows that name in
    %LOCALAPPDATA%. None where that variable is `none`, or there is no home directory.
    """
    folder = os.environ.get(CACHE_VARIABLE, "")
    if folder == NO_CACHE:
        return None
    if folder:
        return Path(folder)
    try:
        return operating_system.caches() / "spach-deploy"
    except RuntimeError:  # no HOME, and a user without an entry in passwd, as in containers
        return None


def private_folder(path: Path) -> Path:
    """Create a directory for this user alone, unless it exists. PermissionError where others may write in it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_own(path):
        raise PermissionError(errno.EPERM, operating_system.make_private(path), str(path))
    return path


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[int]:
    """Open a file to lock, as a descriptor. Creates it if needed, follows no link, and changes nothing in it.

    OSError for anything but a regular file.
    """
    descriptor = operating_system.open_to_lock(path)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        yield descriptor
    finally:
        os.close(descriptor)


def identity(path: Path) -> Identity | None:
    """What distinguishes the file or directory at `path` from a later one at the same path; None for nothing or an
    empty directory. A directory is identified by its manifest: reports in it may be rewritten."""
    try:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if not any(path.iterdir()):
            return None
    except OSError:
        return None
    return (status.st_dev, status.st_ino, _digest(path / _MANIFEST))


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(file)).hexdigest()
    except OSError:
        return ""


def _taken(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "something was written there since this command began", str(path))


def _move(draft: Path, path: Path) -> None:
    """Move to a free path; a directory may also replace an empty directory."""
    try:
        if draft.is_dir():
            operating_system.move_directory(draft, path)  # fails where a file or a directory with anything in it is
        else:
            _link(draft, path)
    except OSError:
        if identity(path) is not None:
            raise _taken(path) from None
        raise


def _link(draft: Path, path: Path) -> None:
    """Give a file a second name, if that name is free."""
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        draft.replace(path)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names: in one step where the system has one for them, else by three renames."""
    if operating_system.exchange(one, other):
        return
    aside = one.with_name(f"{one.name}-old")
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


MOST_BYTES = 64 << 20
"""Largest file that is read whole: far more than a person writes, or a record of one model takes."""

_ALWAYS_OPEN = ("/dev/", "/proc/")
"""Pipes here have a writer already: the shell opens it for `--labels <(command)`."""


def read_text(path: Path, what: str, wanted: str) -> str:
    """The text of a UTF-8 file. `what` names the file in an error, `wanted` is the error's hint.

    UsageError for a file that cannot be read, is too large, is not UTF-8, or is a named pipe, on which the command
    would block.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{what} cannot be read ({error.strerror}).", wanted) from None
    except UnicodeDecodeError:
        raise UsageError(f"{what} cannot be read (it is not UTF-8).", wanted) from None


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """The content of a JSON file. OSError where it cannot be read or is larger, ValueError where it is not JSON."""
    return parse_json(read_bytes(path, most_bytes).decode("utf-8-sig"))


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The bytes of a file. OSError where it cannot be read, is larger than `most_bytes`, or is a named pipe."""
    if path.is_fifo() and not str(path).startswith(_ALWAYS_OPEN):
        raise OSError(errno.EINVAL, "it is a pipe", str(path))
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
    return content


def check_regular(path: Path) -> None:
    """OSError where `path` is missing, or is a pipe or a device, which could be read for ever."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def parse_json(text: str) -> Any:
    """Parse JSON and refuse duplicate names in an object, of which parsers take different ones.

    ValueError with a short reason for anything else.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} is in it twice")
    return content


_OPEN_FILES = Path("/proc/self/fd")


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """A UTF-8 path to the file, valid within the block: its own, or one through an open descriptor in /proc.

    Files in the same folder can be reached from it too, unless the file's own name is not UTF-8. OSError where it
    cannot be opened.
    """
    if _is_utf8(str(path)):
        yield str(path)
        return
    if not _OPEN_FILES.is_dir():
        raise OSError(errno.EILSEQ, "its name is not valid text", str(path))
    is_named = _is_utf8(path.name)
    descriptor = os.open(path.parent if is_named else path, os.O_RDONLY)
    try:
        yield f"{_OPEN_FILES}/{descriptor}{f'/{path.name}' if is_named else ''}"
    finally:
        os.close(descriptor)


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_ENCRYPTED = 1
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Those that NumPy writes."""

_LENGTH_BYTES = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4, b"\x93NUMPY\x03\x00": 4}
_LONGEST_HEADER = 10_000
"""Characters; NumPy's own limit."""

_DTYPE = re.compile(r"[<>|=]?([biufcSU])(\d{1,9})")


@dataclasses.dataclass(frozen=True)
class Header:
    """Header of an array: dtype as NumPy writes it (`<f4`), and shape."""

    descr: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """NumPy's name of a little-endian float (`float32`); other dtypes as they are written."""
        return f"float{int(self.descr[2:]) * 8}" if re.fullmatch(r"<f\d", self.descr) else self.descr


def read_npz(path: Path, most_bytes: Mapping[str, int]) -> dict[str, npt.NDArray[Any]]:
    """The arrays named in `most_bytes`, each of at most that many bytes. ValueError with a short reason otherwise."""
    import numpy as np

    npz_headers(path, most_bytes)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in most_bytes}
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds for damaged files
        raise ValueError(str(error) or type(error).__name__) from error


def npz_headers(path: Path, most_bytes: Mapping[str, int]) -> dict[str, Header]:
    """The headers of these arrays. ValueError as for `read_npz`; damaged data behind a header is not noticed."""
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            return {name: _header(archive, name, most) for name, most in most_bytes.items()}
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except Exception as error:  # as above
        raise ValueError(str(error) or type(error).__name__) from error


def npz_names(path: Path) -> list[str]:
    """The names of a file's arrays, in order. ValueError as for `read_npz`."""
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except Exception as error:  # as above
        raise ValueError(str(error) or type(error).__name__) from error


def _header(archive: zipfile.ZipFile, name: str, most_bytes: int) -> Header:
    member = f"{name}.npy"
    if member not in archive.namelist():
        raise ValueError(f"it has no array '{name}'")
    info = archive.getinfo(member)
    if info.flag_bits & _ENCRYPTED or info.compress_type not in _COMPRESSIONS:
        raise ValueError(f"'{name}' is encrypted or compressed as NumPy does not write it")
    with archive.open(info) as file:
        length_bytes = _LENGTH_BYTES.get(file.read(8), 0)
        length = int.from_bytes(file.read(length_bytes), "little")
        content = ast.literal_eval(file.read(length).decode()) if 0 < length <= _LONGEST_HEADER else {}
        header, begin = Header(str(content.get("descr")), tuple(content.get("shape", ()))), file.tell()
    size = math.prod(header.shape) * _item_bytes(header.descr)
    if not size >= 0 or info.file_size != begin + size or not _DTYPE.fullmatch(header.descr):
        raise ValueError(f"'{name}' is not what its header says")
    if size > most_bytes:
        shown = f"{header.dtype} {header.shape}, {size:,} bytes"
        raise ValueError(f"'{name}' is {shown}; {most_bytes:,} are read at most")
    return header


def _item_bytes(descr: str) -> int:
    """Bytes of one element; 0 for a dtype that is neither a number nor text."""
    match = _DTYPE.fullmatch(descr)
    return int(match[2]) * (4 if match[1] == "U" else 1) if match else 0

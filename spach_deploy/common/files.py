"""Files and directories that are written in one step, and never over what was not there when a command began.

Small text files: recipes and names of classes that users write, and JSON that decides what is trusted.

Paths for libraries in C++ and Rust, which know UTF-8 names alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from spach_deploy.common.errors import UnavailableError, UsageError

Identity = tuple[object, ...]

_MANIFEST = "manifest.json"
_BLOCK_BYTES = 1 << 20
_LONG_NAME = 100
"""Bytes; file systems take 255, and a neighbour's name has the host's and some numbers too."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where a file or a directory is to be written, and what may be replaced there.

    `before`: what lay there when this was made, None for nothing or an empty directory.
    """

    path: Path
    before: Identity | None

    @classmethod
    def of(cls, path: Path) -> Destination:
        """With what lies there now."""
        return cls(path, identity(path))

    def check(self) -> None:
        """FileExistsError where something else lies there by now."""
        if identity(self.path) not in (None, self.before):
            raise _taken(self.path)

    def put(self, draft: Path) -> Destination:
        """Move `draft`, which lies on the same file system, here in one step.

        What is left where `draft` was is the caller's to delete: what lay here before, or nothing. Raises
        FileExistsError where something else lies here by now, which is left alone, and OSError where nothing can be
        written.
        """
        mine = identity(draft)
        if self.path.is_dir() and not draft.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.path))
        if self.before is None or not os.path.lexists(self.path):
            _move(draft, self.path)
            return Destination(self.path, mine)
        _exchange(draft, self.path)
        while identity(draft) != self.before:
            _exchange(draft, self.path)  # until this draft is back: others may do the same at the same moment
            if identity(draft) == mine:
                raise _taken(self.path)
        return Destination(self.path, mine)

    def write(self, write: Callable[[BinaryIO], object], *, mode: int = 0o666) -> Destination:
        """Write a file in one step: a kill or a full disk leaves what was there. Raises what `put` raises."""
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
        """`write` for a text."""
        return self.write(lambda file: file.write(text.encode("utf-8")), mode=mode)


@contextlib.contextmanager
def naming_tmpdir() -> Iterator[None]:
    """UnavailableError that names TMPDIR where the disk is full in the block, which writes to temporary files alone."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"TMPDIR, the folder for temporary files, is full: {tempfile.gettempdir()}."
        raise UnavailableError(message, "Free some space there, or set TMPDIR to a folder on another disk.") from error


def try_to_write(path: Path) -> None:
    """OSError where no file could be put at `path`: it is a directory, or none can be made beside it.

    Permissions do not tell: root may write everywhere, except where the file system says no.
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
    """A name that nothing else takes: this process's id, by which others see whether it lives, and 32 random bits."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def short_name(path: Path) -> str:
    """What stands for a path's name in that of a temporary neighbour, which must not be too long where it is not."""
    name = os.fsencode(path.name)
    return path.name if len(name) <= _LONG_NAME else hashlib.sha256(name).hexdigest()[:32]


def is_own(path: Path) -> bool:
    """Whether `path` is a file or a directory, no link, that this user owns and nobody else may write to."""
    try:
        found = path.lstat()
    except OSError:
        return False
    is_plain = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return is_plain and found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def private_folder(path: Path) -> Path:
    """A directory that is this user's alone, made where it is not there. PermissionError for one that is not."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_own(path):
        reason = f"others may write in it, or own it; chmod -R go-w {path} where it is yours"
        raise PermissionError(errno.EPERM, reason, str(path))
    return path


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[int]:
    """A file to lock, as a descriptor; made where it is not there, never through a link, and nothing in it is changed.

    OSError for anything that is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        yield descriptor
    finally:
        os.close(descriptor)


def identity(path: Path) -> Identity | None:
    """What tells the file or directory at `path` from any other that may take its place; None where nothing would be
    lost. A directory is known by its manifest: reports in it may be written again."""
    try:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if not any(path.iterdir()):
            return None
    except OSError:
        return None
    return (found.st_dev, found.st_ino, _digest(path / _MANIFEST))


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(file)).hexdigest()
    except OSError:
        return ""


def _taken(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "something was written there since this command began", str(path))


def _move(draft: Path, path: Path) -> None:
    """To where nothing is, or an empty directory for a directory."""
    try:
        if draft.is_dir():
            draft.rename(path)  # fails by itself where a file or a directory with anything in it is
        else:
            _link(draft, path)
    except OSError:
        if identity(path) is not None:
            raise _taken(path) from None
        raise


def _link(draft: Path, path: Path) -> None:
    """A second name for a file, where the name is free."""
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        draft.replace(path)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names: renameat2(RENAME_EXCHANGE) in one step, or three renames where the system has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if hasattr(libc, "renameat2") and libc.renameat2(*arguments) == 0:
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
"""Of a file that is read whole: far more than a person writes, or any record of one model has."""

_ALWAYS_OPEN = ("/dev/", "/proc/")
"""Where the shell puts a pipe whose other end it has opened: `--labels <(command)`."""


def read_text(path: Path, what: str, wanted: str) -> str:
    """The text of a file that `what` names in an error, and `wanted` tells how to give.

    UsageError for one that cannot be read, is large, is not UTF-8, or is a named pipe, at which a command would wait.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{what} cannot be read ({error.strerror}).", wanted) from None
    except UnicodeDecodeError:
        raise UsageError(f"{what} cannot be read (it is not UTF-8).", wanted) from None


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """The content of a JSON file. OSError for one that cannot be read or is larger, ValueError for what is no JSON."""
    return parse_json(read_bytes(path, most_bytes).decode("utf-8-sig"))


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """All of a file. OSError for one that cannot be read, is larger, or is a named pipe."""
    if path.is_fifo() and not str(path).startswith(_ALWAYS_OPEN):
        raise OSError(errno.EINVAL, "it is a pipe", str(path))
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
    return content


def check_regular(path: Path) -> None:
    """OSError for what is missing, and for a pipe or a device, which would be read for ever."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def parse_json(text: str) -> Any:
    """JSON in which every object has each name once: of two values, readers take one or the other.

    ValueError, in a few words, for anything else.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} is in it twice")
    return found


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """The file's path, which leads through a descriptor that is open in the block where the path is not UTF-8.

    What lies beside the file is found beside it, unless its very name is not UTF-8. OSError where it cannot be opened.
    """
    if _is_utf8(str(path)):
        yield str(path)
        return
    is_named = _is_utf8(path.name)
    descriptor = os.open(path.parent if is_named else path, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}{f'/{path.name}' if is_named else ''}"
    finally:
        os.close(descriptor)


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

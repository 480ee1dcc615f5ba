"""An on-disk store of files by key, limited in size: the storage behind the cache of finished exports.

ROOT/entries/KEY/        the files, and entry.json with their SHA-256; renamed here when complete
ROOT/partial/            entries that are being written; those of dead processes are removed
ROOT/lock                held while entries are added or removed

Several processes may use it at once, and it stays consistent after a kill at any moment. It belongs to this user: a
directory that others may write in is neither read nor written. `pipeline.cache` decides what is stored, by which key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spach_deploy.common import operating_system
from spach_deploy.common.errors import UsageError
from spach_deploy.common.files import (
    Destination,
    blocks_of,
    draft_name,
    is_own,
    lock_file,
    private_folder,
    read_json,
    sha256_of,
)

RECORD = "entry.json"
_KEY = re.compile("[0-9a-f]{64}")
_DRAFT = re.compile(r"(\d+)-[0-9a-f]{8}")
_MOST_BYTES = 1 << 20
"""Largest size of a record; usual ones have a few hundred bytes."""

_LATEST = 1e11
"""Latest time that is accepted, in seconds since 1970: `datetime` can represent it."""


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """An entry: its size, and when it was made and last used (seconds since 1970).

    `about`: description for listings, such as model and precision. `files`: SHA-256 of each file, by name.
    """

    key: str
    path: Path
    size_bytes: int
    made: float
    used: float
    about: dict[str, str]
    files: dict[str, str]


class Store:
    """Entries under `root`, at most `limit_bytes` in all; the least recently used are evicted first.

    Methods raise OSError where the disk fails. A cache is no reason to fail, so callers then go on without it.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root = root
        self.limit_bytes = limit_bytes

    def entries(self) -> list[CacheEntry]:
        """All readable entries, the last used first."""
        folder = self.root / "entries"
        try:
            paths = list(folder.iterdir()) if is_own(self.root) and is_own(folder) else []
        except OSError:
            paths = []
        entries = [entry for path in paths if (entry := _entry(path)) is not None]
        return sorted(entries, key=lambda entry: -entry.used)

    def take(self, entry: CacheEntry, target: Path, check: Callable[[Path], object] = lambda folder: None) -> bool:
        """Copy an entry's files into the directory `target`, and return whether that succeeded.

        Every file's SHA-256 is checked as it is copied; then `check(target)` may refuse the files with a UsageError. A
        damaged or refused entry is removed, and `target` is left empty.
        """
        try:
            for name, digest in entry.files.items():
                if _copied(entry.path / name, target / name) != digest:
                    raise ValueError(name)
            check(target)
        except (OSError, ValueError, UsageError):
            for file in target.iterdir():
                file.unlink()
            self.remove(entry.key)
            return False
        with contextlib.suppress(OSError):  # evicted by another process at this moment
            os.utime(entry.path / RECORD)
        return True

    def put(
        self, key: str, source: Path, about: dict[str, str], digests: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Store the files of the directory `source` under `key`, unless the key exists.

        On the same file system files are hard-linked, not copied. A later change of the original changes the entry too,
        which `take` detects. `digests`: SHA-256 of files for which it is known already.
        """
        final = self.root / "entries" / key
        private_folder(private_folder(self.root) / "entries")
        if _entry(final) is not None:
            return
        draft = private_folder(private_folder(self.root / "partial") / draft_name())
        try:
            files = {
                file.name: _linked(file, draft / file.name, digests.get(file.name))
                for file in sorted(source.iterdir())
                if file.is_file()
            }
            record = {"files": files, "about": about, "made": time.time()}
            Destination.of(draft / RECORD).write_text(json.dumps(record), mode=0o600)
            with self._locked():
                self._clean()
                if _entry(final) is None:
                    self._drop(final)
                    draft.rename(final)
                self._evict(key)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def remove(self, key: str) -> None:
        """Remove an entry."""
        with self._locked():
            self._drop(self.root / "entries" / key)

    def clear(self) -> int:
        """Remove all entries, and return how many there were."""
        entries = self.entries()
        for entry in entries:
            self.remove(entry.key)
        return len(entries)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with lock_file(private_folder(self.root) / "lock") as lock:
            operating_system.lock(lock, wait=True)
            yield

    def _drop(self, path: Path) -> None:
        """Rename an entry away in one step, then delete it."""
        grave = private_folder(self.root / "partial") / draft_name()
        with contextlib.suppress(FileNotFoundError):
            path.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)

    def _evict(self, kept: str) -> None:
        entries = self.entries()
        total = sum(entry.size_bytes for entry in entries)
        for entry in reversed(entries):
            if total <= self.limit_bytes:
                return
            if entry.key != kept or entry.size_bytes > self.limit_bytes:
                self._drop(entry.path)
                total -= entry.size_bytes

    def _clean(self) -> None:
        """Delete what dead processes left, and directories that are not whole entries."""
        for draft in (self.root / "partial").iterdir():
            owner = _DRAFT.fullmatch(draft.name)
            if owner and not operating_system.is_alive(int(owner[1])):
                shutil.rmtree(draft, ignore_errors=True)
        for path in (self.root / "entries").iterdir():
            if _KEY.fullmatch(path.name) and _entry(path) is None:
                self._drop(path)


def _entry(path: Path) -> CacheEntry | None:
    """The entry at a path; None where there is none, or it is incomplete or not this user's."""
    try:
        if not is_own(path) or not is_own(path / RECORD):
            return None
        record = read_json(path / RECORD, _MOST_BYTES)
        files, about, made = _texts(record["files"]), _texts(record["about"]), float(record["made"])
        if not all(Path(name).name == name for name in files) or not 0 <= made < _LATEST:
            return None
        size = sum(file.stat().st_size for file in path.iterdir())
        return CacheEntry(path.name, path, size, made, (path / RECORD).stat().st_mtime, about, files)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _texts(content: Any) -> dict[str, str]:
    """`content` if it is a dictionary of texts. TypeError for anything else."""
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise TypeError(f"{type(content).__name__} of other things than text")
    return content


def _linked(source: Path, target: Path, digest: str | None) -> str:
    """Hard-link a file, or copy it where that is impossible; returns its SHA-256."""
    try:
        target.hardlink_to(source)
    except OSError:
        return _copied(source, target)
    return digest or sha256_of(target)


def _copied(source: Path, target: Path) -> str:
    """Copy a file; returns its SHA-256."""
    digest = hashlib.sha256()
    with target.open("wb") as writing:
        for block in blocks_of(source):
            digest.update(block)
            writing.write(block)
    return digest.hexdigest()

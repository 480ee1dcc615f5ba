"""A directory of entries by key, safe with several processes at once and after a kill at any moment.

ROOT/entries/KEY/        files, and entry.json with their SHA-256: renamed into place when it is whole
ROOT/partial/            being written; what a dead process left there is removed by the next
ROOT/lock                held while entries are added or removed
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spach_deploy.bundle import sha256_of

RECORD = "entry.json"
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry: its size, when it was made and last used (seconds since 1970), and what it says of itself."""

    key: str
    path: Path
    size_bytes: int
    made: float
    used: float
    about: dict[str, Any]


class Store:
    """Entries under `root`, at most `limit_bytes` of them; the least recently used go first.

    OSError where the disk says no: a cache is never worth a failure, so callers let it be.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root = root
        self.limit_bytes = limit_bytes

    def entries(self) -> list[Entry]:
        """Those that are there and may be read, the last used first."""
        try:
            paths = list((self.root / "entries").iterdir())
        except OSError:
            paths = []
        found = [entry for path in paths if (entry := _entry(path)) is not None]
        return sorted(found, key=lambda entry: -entry.used)

    def take(self, key: str, target: Path) -> dict[str, Any] | None:
        """Copy an entry's files into the directory `target`; what it says of itself, None where there is none.

        Every file's SHA-256 is checked as it is copied. A damaged entry is removed, and `target` is left empty.
        """
        entry = _entry(self.root / "entries" / key)
        if entry is None:
            return None
        record = json.loads((entry.path / RECORD).read_text(encoding="utf-8"))
        try:
            for name, digest in record["files"].items():
                if _copied(entry.path / name, target / name) != digest:
                    raise ValueError(name)
        except (OSError, ValueError):
            for file in target.iterdir():
                file.unlink()
            self.remove(key)
            return None
        with contextlib.suppress(OSError):  # evicted in this moment, by another
            os.utime(entry.path / RECORD)
        return entry.about

    def put(
        self, key: str, source: Path, about: dict[str, Any], digests: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Keep the files of the directory `source`; nothing happens where the key is there already.

        On the same file system a file is not copied: the entry gives it one more name. Whoever changes it where it lies
        changes the entry too, which `take` finds out. `digests`: SHA-256 of files that are known already.
        """
        final = self.root / "entries" / key
        if final.exists():
            return
        (self.root / "entries").mkdir(parents=True, exist_ok=True)
        (self.root / "partial").mkdir(exist_ok=True)
        draft = self.root / "partial" / f"{os.getpid()}-{secrets.token_hex(4)}"
        draft.mkdir()
        try:
            files = {
                file.name: _kept(file, draft / file.name, digests.get(file.name))
                for file in sorted(source.iterdir())
                if file.is_file()
            }
            record = {"files": files, "about": about, "made": time.time()}
            (draft / RECORD).write_text(json.dumps(record), encoding="utf-8")
            with self._locked():
                self._clean()
                if not final.exists():
                    draft.rename(final)
                self._evict(key)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def remove(self, key: str) -> None:
        """Forget an entry."""
        with self._locked():
            self._drop(self.root / "entries" / key)

    def clear(self) -> int:
        """Forget all; how many there were."""
        entries = self.entries()
        for entry in entries:
            self.remove(entry.key)
        return len(entries)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # released when the process ends, however it does
            yield

    def _drop(self, path: Path) -> None:
        """Out of sight in one step, then gone."""
        grave = self.root / "partial" / f"{os.getpid()}-{secrets.token_hex(4)}"
        grave.parent.mkdir(exist_ok=True)
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
        """What processes left that are no more."""
        for draft in (self.root / "partial").iterdir():
            owner = draft.name.split("-")[0]
            if not (owner.isdigit() and Path(f"/proc/{owner}").exists()):
                shutil.rmtree(draft, ignore_errors=True)


def _entry(path: Path) -> Entry | None:
    """The entry at a path; None where there is none, or none that can be read."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in path.iterdir())
        used = (path / RECORD).stat().st_mtime
        return Entry(path.name, path, size, float(record["made"]), used, dict(record["about"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _kept(source: Path, target: Path, digest: str | None) -> str:
    """Another name for a file, or a copy where there can be none; its SHA-256."""
    try:
        target.hardlink_to(source)
    except OSError:
        return _copied(source, target)
    return digest or sha256_of(target)


def _copied(source: Path, target: Path) -> str:
    """Copy a file; its SHA-256."""
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(_BLOCK):
            digest.update(block)
            writing.write(block)
    return digest.hexdigest()

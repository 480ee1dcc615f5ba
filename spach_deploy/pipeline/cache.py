"""The cache of finished exports: the key of an export, and taking bundles from the cache and keeping them there.

The key is a digest of everything that an export depends on: options, content of input files, this package's code,
versions of packages, and the machine. Nothing here imports torch, so that a repeated export takes about a second.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spach_deploy.bundle import store as bundles
from spach_deploy.bundle.cache import CacheEntry, Store
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import BundleError, CheckpointError, UsageError
from spach_deploy.common.files import Destination, blocks_of, check_regular, user_cache
from spach_deploy.common.machine import all_cpu_flags, processor_name
from spach_deploy.common.text import SIZES, parse_bytes
from spach_deploy.common.versions import tool_versions
from spach_deploy.models.checkpoint_file import checkpoint_files
from spach_deploy.models.registry import known_name
from spach_deploy.options.recipe import value_of, with_value
from spach_deploy.options.specs import ExportOptions
from spach_deploy.options.table import Caching, filling

HASHED_BYTES = 2_000_000_000
"""Largest folder of images that is hashed by content; larger ones by their files' names, sizes and times."""

_DRIVER = Path("/proc/driver/nvidia")


def export_key(options: ExportOptions) -> str | None:
    """SHA-256 of everything that decides what an export with `options` writes; None where it must not be cached.

    That is where an input cannot be read, and for options by which an export also writes elsewhere, such as a timing
    cache.
    """
    values = {option: value_of(options, option.field) for option in filling()}
    if any(option.caching is Caching.EXCLUDED and value is not None for option, value in values.items()):
        return None
    try:
        content = {
            "options": {o.field: _plain(value) for o, value in values.items() if o.caching is not Caching.IGNORED},
            "place": str(options.output.resolve()) if options.output is not None else str(Path.cwd()),
            "files": {str(path): content_digest(path) for path in input_files(options)},
            "code": code_digest(),
            "packages": tool_versions(),
            "machine": machine(),
        }
    except (OSError, CheckpointError):
        return None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def input_files(options: ExportOptions) -> tuple[Path, ...]:
    """All files and folders that an export reads. CheckpointError for a checkpoint index that names no files."""
    fields = [option.field for option in filling() if option.caching is Caching.CONTENT]
    given = {field: path for field in fields if (path := value_of(options, field)) is not None}
    checkpoint = given.pop("model.checkpoint", None)
    return (*(() if checkpoint is None else checkpoint_files(checkpoint)), *given.values())


def without_inputs(options: ExportOptions) -> ExportOptions:
    """The same options without paths of input files."""
    for option in filling():
        if option.caching is Caching.CONTENT:
            options = with_value(options, option.field, None)
    return options


def _plain(value: Any) -> Any:
    """A value as JSON."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's names and contents. OSError for an unreadable file, a pipe or a device."""
    digest = hashlib.sha256()
    if not path.is_dir():
        _add_file(digest, path)
        return digest.hexdigest()
    files = sorted(entry for entry in path.rglob("*") if entry.is_file())
    is_small = sum(file.stat().st_size for file in files) <= HASHED_BYTES
    for file in files:
        digest.update(os.fsencode(f"{file.relative_to(path)}\0{file.stat().st_size}\0"))
        if is_small:
            _add_file(digest, file)
        else:
            digest.update(f"{file.stat().st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _add_file(digest: Any, path: Path) -> None:
    check_regular(path)
    for block in blocks_of(path):
        digest.update(block)


def code_digest() -> str:
    """SHA-256 of this package's own files."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in _sources(root):
        digest.update(f"{file.relative_to(root)}\0".encode())
        _add_file(digest, file)
    return digest.hexdigest()


def _sources(root: Path) -> Iterator[Path]:
    return (file for file in sorted(root.rglob("*")) if file.is_file() and "__pycache__" not in file.parts)


def machine() -> dict[str, str]:
    """The CPU, GPUs and driver, which decide how numbers are computed and which engine is built."""
    driver = _DRIVER / "version"
    gpus = sorted(entry.name for entry in (_DRIVER / "gpus").iterdir()) if (_DRIVER / "gpus").is_dir() else []
    return {
        "processor": f"{processor_name()} {all_cpu_flags()}",
        "driver": driver.read_text(encoding="utf-8") if driver.is_file() else "",
        "gpus": " ".join(gpus),
    }


SIZE_VARIABLE = "SPACH_CACHE_SIZE"
DEFAULT_BYTES = 10_000_000_000


@dataclasses.dataclass(frozen=True)
class Reused:
    """A bundle taken from the cache. `exported`: when it was made, from its manifest."""

    bundle: Bundle
    exported: str


def open_store() -> Store | None:
    """The cache of this user; None where SPACH_CACHE=none, or there is no home directory. UsageError for a bad size."""
    root = user_cache()
    return None if root is None else Store(root, limit_bytes())


def limit_bytes() -> int:
    """The largest size of the cache, from SPACH_CACHE_SIZE. UsageError for anything but a size."""
    text = os.environ.get(SIZE_VARIABLE, "")
    if not text:
        return DEFAULT_BYTES
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"{SIZE_VARIABLE}={text} is no size.", f"Give one such as 20GB ({SIZES}).") from error


@dataclasses.dataclass(frozen=True)
class ExportCache:
    """The cache for one export. `store` or `key` None: nothing is taken and nothing kept."""

    store: Store | None
    key: str | None

    @classmethod
    def of(cls, options: ExportOptions, *, is_used: bool = True) -> ExportCache:
        """The cache for an export with `options`; `is_used` False turns it off."""
        store = open_store() if is_used else None
        return cls(store, None if store is None else export_key(options))

    def take(self, options: ExportOptions, destination: Destination | None = None) -> Reused | None:
        """Write the finished bundle to its target; None where there is none, and the export has to run.

        `destination`: what `check_target` returned for the target, if that was called before. Raises BundleError where
        the target cannot be written, as an export would.
        """
        if self.store is None or self.key is None:
            return None
        entry = next((entry for entry in self.store.entries() if entry.key == self.key), None)
        target = None if entry is None else _target(options, entry)
        if entry is None or target is None:
            return None
        destination = destination or bundles.check_target(target, overwrite=options.overwrite)
        try:
            with bundles.writing(destination) as staging:
                if not self.store.take(entry, staging, functools.partial(_check, options)):
                    raise _NotThereError
        except _NotThereError:
            return None
        bundle = Bundle.open(destination.path, verify=False)
        return Reused(bundle, bundle.manifest.created)

    def keep(self, bundle: Bundle) -> str:
        """Keep a finished export. Returns a sentence with the reason where that failed, else an empty text."""
        if self.store is None or self.key is None:
            return ""
        about = {"kind": "export", "model": bundle.manifest.model.name, "target": str(bundle.path)}
        try:
            about |= {"precision": bundle.manifest.precision.asked.value}
            hashes = {name: file.sha256 for name, file in bundle.manifest.files.items()}
            self.store.put(self.key, bundle.path, about, hashes)
        except OSError as error:
            return f"Not kept in the cache {self.store.root}: {error.strerror or error}."
        return ""


class _NotThereError(Exception):
    """The entry is damaged, or was evicted at this moment."""


def _target(options: ExportOptions, entry: CacheEntry) -> Path | None:
    """Where the bundle goes; None where the entry's manifest cannot be read or its model name is no folder name."""
    if options.output is not None:
        return options.output
    try:
        manifest = Bundle.open(entry.path, verify=False).manifest
    except BundleError:
        return None
    target = bundles.default_directory(manifest.model.name, options.precision.value)
    return target if target.parent == bundles.default_directory("", "").parent else None


def _check(options: ExportOptions, folder: Path) -> None:
    """BundleError for anything but a complete bundle of the requested model and precision; the cache is not trusted."""
    manifest = Bundle.open(folder).manifest
    known = {*manifest.files, bundles.MANIFEST, *bundles.REWRITTEN}
    name = known_name(options.model)
    if name not in (None, manifest.model.name) or manifest.precision.asked is not options.precision:
        raise BundleError(f"{folder} is a bundle of something else.")
    if not {file.name for file in folder.iterdir()} <= known:
        raise BundleError(f"{folder} has files that its manifest does not name.")

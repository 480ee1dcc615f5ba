"""Exports taken from the cache, and put into it. Nothing here imports torch: a second export is there at once."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from pathlib import Path

from spach_deploy import bundle as bundles
from spach_deploy.bundle import Bundle
from spach_deploy.cache.key import export_key
from spach_deploy.cache.store import Entry, Store
from spach_deploy.errors import BundleError, UsageError
from spach_deploy.files import Place
from spach_deploy.models.registry import resolve
from spach_deploy.specs import ExportOptions

PLACE, SIZE = "SPACH_CACHE", "SPACH_CACHE_SIZE"
DEFAULT_BYTES = 10_000_000_000
NONE = "none"

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclasses.dataclass(frozen=True)
class Reused:
    """A bundle that came from the cache. `exported`: when it was made, as its manifest has it."""

    bundle: Bundle
    exported: str


def open_store() -> Store | None:
    """The cache of this user; None where there is to be none, or no home to have it in. UsageError for a size that is
    none.
    """
    place = os.environ.get(PLACE, "")
    if place == NONE:
        return None
    try:
        root = Path(place) if place else _base() / "spach-deploy"
    except RuntimeError:  # a user who is in no list of users, as in containers, and no HOME
        return None
    return Store(root, limit_bytes())


def _base() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def limit_bytes() -> int:
    """The cache's limit. UsageError for a size that is none."""
    text = os.environ.get(SIZE, "")
    if not text:
        return DEFAULT_BYTES
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{SIZE}={text} is no size.", "Give one such as 20G.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclasses.dataclass(frozen=True)
class ExportCache:
    """The cache as one export sees it: `store` None has nothing and keeps nothing."""

    store: Store | None
    key: str | None

    @classmethod
    def of(cls, options: ExportOptions, *, is_used: bool = True) -> ExportCache:
        """That of an export with `options`."""
        store = open_store() if is_used else None
        return cls(store, None if store is None else export_key(options))

    def take(self, options: ExportOptions, place: Place | None = None) -> Reused | None:
        """The finished export, written to its place; None where it has to be done.

        `place`: what `check_target` said of the target before. Raises BundleError where the target cannot be written,
        as the export would.
        """
        if self.store is None or self.key is None:
            return None
        entry = next((entry for entry in self.store.entries() if entry.key == self.key), None)
        target = None if entry is None else _target(options, entry)
        if entry is None or target is None:
            return None
        place = place or bundles.check_target(target, overwrite=options.overwrite)
        try:
            with bundles.writing(place) as staging:
                if not self.store.take(entry, staging, functools.partial(_check, options)):
                    raise _NotThereError
        except _NotThereError:
            return None
        bundle = Bundle.open(place.path, verify=False)
        return Reused(bundle, str(bundle.manifest.content.get("created", "")))

    def keep(self, bundle: Bundle) -> str:
        """Keep a finished export; why that was not possible, in a sentence, where it was not."""
        if self.store is None or self.key is None:
            return ""
        about = {"kind": "export", "model": bundle.manifest.model["name"], "target": str(bundle.path)}
        try:
            about |= {"precision": bundle.manifest.precision}
            self.store.put(self.key, bundle.path, about, bundle.manifest.files)
        except OSError as error:
            return f"Not kept in the cache {self.store.root}: {error.strerror or error}."
        return ""


class _NotThereError(Exception):
    """The entry was damaged, or evicted in this moment."""


def _target(options: ExportOptions, entry: Entry) -> Path | None:
    """Where the bundle goes, None where the entry holds none that can be read."""
    if options.output is not None:
        return options.output
    try:
        manifest = Bundle.open(entry.path, verify=False).manifest
    except BundleError:
        return None
    target = bundles.default_directory(str(manifest.model["name"]), options.precision.value)
    return target if target.parent == bundles.default_directory("", "").parent else None


def _check(options: ExportOptions, folder: Path) -> None:
    """BundleError for anything but a whole bundle of what was asked for: it is looked at like one from elsewhere."""
    manifest = Bundle.open(folder).manifest
    known = {*manifest.files, bundles.MANIFEST, *bundles.WRITTEN_AGAIN}
    name = options.model.name and resolve(options.model.name)
    if name not in (None, manifest.model["name"]) or manifest.precision != options.precision.value:
        raise BundleError(f"{folder} is a bundle of something else.")
    if not {file.name for file in folder.iterdir()} <= known:
        raise BundleError(f"{folder} has files that its manifest does not name.")

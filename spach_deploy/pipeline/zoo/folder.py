"""A zoo's directory: bundles, the summary, and records of what each bundle was made from.

DIR/NAME/                a bundle, written in one step by the export that makes it
DIR/summary.json, .html  what came of them all, written again after each
DIR/.zoo/NAME.json       digest of all that the bundle depends on, written before the export begins
DIR/.zoo/lock            held while a zoo is being made here
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spach_deploy.bundle.store import MANIFEST, Bundle, remove_leftovers
from spach_deploy.common.errors import BundleError, CheckpointError, UsageError
from spach_deploy.common.files import Destination, lock_file, read_json, sha256_of
from spach_deploy.options.specs import ExportOptions
from spach_deploy.pipeline.cache import content_digest, export_key, input_files, without_inputs
from spach_deploy.pipeline.zoo.plan import Build
from spach_deploy.report.page import is_own_page

SUMMARY, PAGE = "summary.json", "summary.html"
KIND = "spach-deploy zoo"
_RECORDS = ".zoo"


@dataclasses.dataclass(frozen=True)
class ExistingBundle:
    """What lies where a bundle shall be. `is_finished`: the very bundle, whole; `problem`: why one must be refused.

    `is_damaged`: the very bundle, but changed or incomplete since. `place`: what may be replaced, if it may.
    """

    place: Destination
    is_finished: bool = False
    is_damaged: bool = False
    problem: str = ""


class ZooFolder:
    """The directory, and the digests of inputs that its bundles share, each computed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._digests: dict[Path, str] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone in this directory. UsageError where another zoo is being made, or it cannot be written."""
        with contextlib.ExitStack() as stack:
            try:
                (self.root / _RECORDS).mkdir(parents=True, exist_ok=True)
                fcntl.flock(
                    stack.enter_context(lock_file(self.root / _RECORDS / "lock")), fcntl.LOCK_EX | fcntl.LOCK_NB
                )
            except BlockingIOError:
                raise UsageError(
                    f"Another spach-export --zoo works in {self.root}.", "Wait for it, or choose another --output."
                ) from None
            except OSError as error:
                reason = error.strerror or error
                raise UsageError(f"{self.root} cannot be written ({reason}).", "Choose another --output.") from None
            yield

    def check(self) -> None:
        """UsageError where somebody else's files have the summary's names."""
        if not self.root.exists():
            return
        if not self.root.is_dir():
            raise UsageError(f"{self.root} is not a directory.", "Choose another --output.")
        if (self.root / MANIFEST).exists():
            raise UsageError(f"{self.root} is a bundle, no place for many.", "Choose another --output.")
        file = self.root / SUMMARY
        if file.exists() and _read(file).get("kind") != KIND:
            raise UsageError(f"{file} is no summary of spach-deploy and is left alone.", "Choose another --output.")
        if not is_own_page(self.root / PAGE):
            raise UsageError(
                f"{self.root / PAGE} is no page of spach-deploy and is left alone.", "Choose another --output."
            )

    def target(self, build: Build) -> Path:
        """Where the bundle goes."""
        return self.root / build.name

    def key(self, options: ExportOptions) -> str | None:
        """Digest of all that decides what the bundle will be; None where an input cannot be read."""
        try:
            shared = [[str(path), self._digest(path)] for path in input_files(options)]
        except (OSError, CheckpointError):
            return None
        key = export_key(without_inputs(options))
        return None if key is None else hashlib.sha256(json.dumps([key, shared]).encode()).hexdigest()

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = content_digest(path)
        return self._digests[path]

    def look(self, build: Build, key: str | None) -> ExistingBundle:
        """What lies where the bundle shall be, held against `key`."""
        target = self.target(build)
        place = Destination.of(target)
        if not target.is_dir() or not any(target.iterdir()):
            return ExistingBundle(place)
        record = _read(self._record(build))
        if key is None or record.get("key") != key or record.get("before") == _fingerprint(target):
            return ExistingBundle(place, problem=f"{target} holds a bundle of other options, inputs or code.")
        try:
            Bundle.open(target)
        except BundleError:
            return ExistingBundle(place, is_damaged=True)
        return ExistingBundle(place, is_finished=True)

    def begin(self, build: Build) -> None:
        """Note what the bundle will be made from, and which one is there now.

        OSError where the disk says no, or a bundle came there that was not there when the zoo began.
        """
        if build.place is not None:
            build.place.check()
        self._note(build, _fingerprint(self.target(build)))

    def finish(self, build: Build, *, is_made: bool) -> None:
        """The bundle that is there now is the one that was to be made, or nothing is left of it."""
        with contextlib.suppress(OSError):  # the bundle is there all the same, or the next run removes what is left
            if is_made:
                self._note(build, None)  # it may be the same as before, from the cache
            else:
                remove_leftovers(self.target(build))

    def _note(self, build: Build, before: str | None) -> None:
        content = {"key": self.key(build.options), "before": before}
        Destination.of(self._record(build)).write_text(json.dumps(content))

    def _record(self, build: Build) -> Path:
        return self.root / _RECORDS / f"{build.name}.json"


def _fingerprint(target: Path) -> str | None:
    try:
        return sha256_of(target / MANIFEST)
    except OSError:
        return None


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none that can be read."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

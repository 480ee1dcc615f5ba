"""The directory of a zoo: its bundles, the summary, and a record of what each bundle was made from.

DIR/NAME/                a bundle, written in one step by its export
DIR/summary.json, .html  status of all bundles, rewritten after each export
DIR/.zoo/NAME.json       digest of everything that the bundle depends on, written before its export begins
DIR/.zoo/lock            held while a zoo is being made here
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spach_deploy.bundle.store import MANIFEST, Bundle, remove_leftovers
from spach_deploy.common.errors import BundleError, CheckpointError, UsageError
from spach_deploy.common.files import Destination, lock_file, read_json, sha256_of
from spach_deploy.common.operating_system import lock
from spach_deploy.options.specs import ExportOptions
from spach_deploy.pipeline.cache import content_digest, export_key, input_files, without_inputs
from spach_deploy.pipeline.zoo.plan import Build
from spach_deploy.report.page import is_own_page

SUMMARY, PAGE = "summary.json", "summary.html"
KIND = "spach-deploy zoo"
_RECORDS = ".zoo"


@dataclasses.dataclass(frozen=True)
class ExistingBundle:
    """What is at the target of a bundle now. `is_finished`: the same bundle, complete; nothing is left to do.

    `is_damaged`: the same bundle, but changed or incomplete since. `problem`: another bundle, as a sentence.
    `destination`: the target, with the content that may be replaced.
    """

    destination: Destination
    is_finished: bool = False
    is_damaged: bool = False
    problem: str = ""


class ZooFolder:
    """The directory of a zoo. Digests of inputs that several bundles share are computed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._digests: dict[Path, str] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory. UsageError where another zoo is being made in it, or it cannot be written."""
        with contextlib.ExitStack() as stack:
            try:
                (self.root / _RECORDS).mkdir(parents=True, exist_ok=True)
                lock(stack.enter_context(lock_file(self.root / _RECORDS / "lock")), wait=False)
            except BlockingIOError:
                raise UsageError(
                    f"Another spach-export --zoo works in {self.root}.", "Wait for it, or choose another --output."
                ) from None
            except OSError as error:
                reason = error.strerror or error
                raise UsageError(f"{self.root} cannot be written ({reason}).", "Choose another --output.") from None
            yield

    def check(self) -> None:
        """UsageError where the directory is a bundle, or has other programs' files under the summary's names."""
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
        """Path of a bundle."""
        return self.root / build.name

    def key(self, options: ExportOptions) -> str | None:
        """Digest of everything that decides the bundle's content; None where an input cannot be read."""
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
        """What is at the bundle's target now, compared with `key`."""
        target = self.target(build)
        destination = Destination.of(target)
        if not target.is_dir() or not any(target.iterdir()):
            return ExistingBundle(destination)
        record = _read(self._record(build))
        if key is None or record.get("key") != key or record.get("before") == _fingerprint(target):
            return ExistingBundle(destination, problem=f"{target} holds a bundle of other options, inputs or code.")
        try:
            Bundle.open(target)
        except BundleError:
            return ExistingBundle(destination, is_damaged=True)
        return ExistingBundle(destination, is_finished=True)

    def begin(self, build: Build) -> None:
        """Record what the bundle will be made from, and which bundle is at its target now.

        OSError where the record cannot be written, or the target has changed since the zoo began.
        """
        if build.destination is not None:
            build.destination.check()
        self._note(build, _fingerprint(self.target(build)))

    def finish(self, build: Build, *, is_made: bool) -> None:
        """Record that the bundle was made, or remove what a failed export left."""
        with contextlib.suppress(OSError):  # without the record the next run makes the bundle again
            if is_made:
                self._note(build, None)  # a bundle from the cache may equal the earlier one
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
    """The JSON object in a file; an empty one where none can be read."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

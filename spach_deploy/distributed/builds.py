"""The builds of a zoo as Ray tasks: each on a node that has a core and the memory for it, its bundle brought back.

A task whose node or worker dies is done again elsewhere by Ray. The export itself runs in a process of its own, as on
one machine, so that its crash is a result and no reason to try again. Paths of images and checkpoints must mean the
same on every node, as on a shared file system.
"""

from __future__ import annotations

import dataclasses
import io
import socket
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from spach_deploy.bundle import store as bundles
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import SpachError
from spach_deploy.common.files import Destination
from spach_deploy.distributed.cluster import cores
from spach_deploy.options.command_line import export_words
from spach_deploy.options.specs import ExportOptions
from spach_deploy.options.table import Caching, filling
from spach_deploy.options.values import value_of, with_value
from spach_deploy.pipeline.cache import code_digest
from spach_deploy.pipeline.zoo.child import ExportProcess, ProcessEnd
from spach_deploy.pipeline.zoo.folder import ZooFolder
from spach_deploy.pipeline.zoo.make import Finished, Run
from spach_deploy.pipeline.zoo.plan import Build
from spach_deploy.pipeline.zoo.schedule import NOT_BEGUN, longest_first

CORES = 1
"""Of one build: more builds at once take less time in all than one on more cores."""

RETRIES = 5
"""How often a build begins again because its node died."""

_POLL_S, _CANCEL_S = 0.1, 12.0


@dataclasses.dataclass(frozen=True)
class ReturnedBuild:
    """What a task gives back: how the export ended, and its bundle as a tar where it succeeded."""

    ended: ProcessEnd
    archive: bytes | None


def on_cluster(ray: Any, folder: ZooFolder, command: Sequence[str], more: Sequence[str], jobs: int | None) -> Run:
    """Builds as tasks on the cluster that `ray` is connected to; at most `jobs` at once."""
    return lambda builds, began: _run(_Tasks(ray, folder, command, more), builds, jobs or len(builds), began)


def _run(tasks: _Tasks, builds: Sequence[Build], jobs: int, began: Callable[[Build], None]) -> Finished:
    pending = longest_first(builds)
    try:
        while pending or tasks.running:
            while pending and len(tasks.running) < jobs:
                build = pending.pop(0)
                if (problem := tasks.begin(build)) is not None:
                    yield build, problem
                else:
                    began(build)
            yield from tasks.ended()
    finally:
        tasks.cancel()


class _Tasks:
    """Tasks under way, and their bundles as they come."""

    def __init__(self, ray: Any, folder: ZooFolder, command: Sequence[str], more: Sequence[str]) -> None:
        self._ray, self._folder = ray, folder
        self._command, self._more = tuple(command), tuple(more)
        self._code = code_digest()
        self._remote = ray.remote(build_bundle)
        self.running: dict[Any, Build] = {}

    def begin(self, build: Build) -> ProcessEnd | None:
        """Hand a build over; how it ended already, where it cannot be done."""
        largest = max((self._memory(node) for node in self._ray.nodes() if node["Alive"]), default=0.0)
        if build.memory_bytes > largest:
            return _failed(
                f"Not begun: it needs about {build.memory_bytes / 1e9:.1f} GB of memory, and no node of the cluster"
                f" has more than {largest / 1e9:.1f} GB."
            )
        try:
            self._folder.begin(build)
        except OSError as error:
            return _failed(f"Not begun: {error.strerror or error}.")
        words = [*self._command[1:], *export_words(portable(build.options)), *self._more]
        options = {"num_cpus": CORES, "memory": int(build.memory_bytes), "max_retries": RETRIES, "name": build.name}
        self.running[self._remote.options(**options).remote(words, build.name, self._code)] = build
        return None

    @staticmethod
    def _memory(node: Any) -> float:
        """Bytes that a node offers, 0 where it offers no cores."""
        resources = node["Resources"]
        return float(resources.get("memory", 0.0)) if resources.get("CPU", 0.0) >= CORES else 0.0

    def ended(self) -> Generator[tuple[Build, ProcessEnd], None, None]:
        """Those that ended within a moment."""
        done, _ = self._ray.wait(list(self.running), timeout=_POLL_S) if self.running else ([], [])
        for reference in done:
            build = self.running.pop(reference)
            yield build, self._fetched(reference, build)

    def _fetched(self, reference: Any, build: Build) -> ProcessEnd:
        try:
            brought: ReturnedBuild = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return _failed(f"Ray could not do it ({str(error).strip().splitlines()[0].rstrip('.')}).")
        if brought.archive is None:
            return brought.ended
        try:
            target = self._folder.target(build)
            place = build.place or bundles.check_target(target, overwrite=build.options.overwrite)
            unpack(brought.archive, place)
        except SpachError as error:
            return dataclasses.replace(brought.ended, code=error.exit_code, said=(f"Error: {error}",))
        return brought.ended

    def cancel(self) -> None:
        """End all tasks and wait for a moment until their exports are gone."""
        for reference in self.running:
            self._ray.cancel(reference, force=False)
        if self.running:
            self._ray.wait(list(self.running), num_returns=len(self.running), timeout=_CANCEL_S)


def portable(options: ExportOptions) -> ExportOptions:
    """Options that mean the same from any directory, the bundle beside where the export runs."""
    for option in filling():
        if option.caching is Caching.CONTENT and (path := value_of(options, option.field)) is not None:
            options = with_value(options, option.field, path.absolute())
    output = None if options.output is None else Path(options.output.name)
    return dataclasses.replace(options, output=output, overwrite=False)


def build_bundle(words: Sequence[str], name: str, code: str) -> ReturnedBuild:
    """On a node: run the export in a process of its own, and pack what it made."""
    node = socket.gethostname()
    if code_digest() != code:
        said = f"{node} has another version of spach-deploy. Install the same one on every node."
        return ReturnedBuild(dataclasses.replace(_failed(said), node=node), None)
    with tempfile.TemporaryDirectory(prefix="spach-zoo-") as folder, cores(CORES) as share:
        child = ExportProcess([sys.executable, *words], cores=share, folder=Path(folder))
        try:
            while (ended := child.poll()) is None:
                time.sleep(_POLL_S)
        except BaseException:  # cancelled
            child.interrupt()
            child.stop()
            raise
        ended = dataclasses.replace(ended, node=node)
        return ReturnedBuild(ended, pack(Path(folder) / name) if ended.code == 0 else None)


def pack(bundle: Path) -> bytes:
    """A bundle's files as a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for file in sorted(bundle.iterdir()):
            archive.add(file, arcname=file.name)
    return buffer.getvalue()


def unpack(archive: bytes, place: Destination) -> None:
    """Write a packed bundle in one step. BundleError where it cannot be written, or is not what its manifest says."""
    with (
        bundles.writing(place) as staging,
        tarfile.open(fileobj=io.BytesIO(archive)) as packed,
    ):
        for member in packed:
            content = packed.extractfile(member)
            assert content is not None  # `pack` adds files alone
            (staging / Path(member.name).name).write_bytes(content.read())
        Bundle.open(staging)


def _failed(sentence: str) -> ProcessEnd:
    return ProcessEnd(NOT_BEGUN, (f"Error: {sentence}",), 0.0)

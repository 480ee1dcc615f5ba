"""Exports of a zoo as Ray tasks, each on a node with a free core and enough memory; bundles are sent back.

Ray repeats a task elsewhere where its node or worker dies. The export itself runs in a process of its own, as on one
machine, so that its crash is a result and not repeated. Paths of images and checkpoints must be valid on every node, as
on a shared file system.
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
from spach_deploy.options.recipe import value_of, with_value
from spach_deploy.options.specs import ExportOptions
from spach_deploy.options.table import Caching, filling
from spach_deploy.pipeline.cache import code_digest
from spach_deploy.pipeline.zoo.child import ExportProcess, ProcessEnd
from spach_deploy.pipeline.zoo.folder import ZooFolder
from spach_deploy.pipeline.zoo.make import Finished, Run
from spach_deploy.pipeline.zoo.plan import Build
from spach_deploy.pipeline.zoo.schedule import NOT_BEGUN, longest_first

CORES = 1
"""Cores for each build. More builds at once take less time in all than one on more cores."""

RETRIES = 5
"""How often Ray starts a build again after its node died."""

_POLL_S, _CANCEL_S = 0.1, 12.0


@dataclasses.dataclass(frozen=True)
class ReturnedBuild:
    """Result of a task: how the export ended, and its bundle as a tar where it succeeded."""

    ended: ProcessEnd
    archive: bytes | None


def on_cluster(ray: Any, folder: ZooFolder, command: Sequence[str], more: Sequence[str], jobs: int | None) -> Run:
    """Run builds as tasks on the cluster that `ray` is connected to, at most `jobs` at once (None: all)."""
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
    """Running tasks by their references. Bundles of finished ones are unpacked into the zoo's folder."""

    def __init__(self, ray: Any, folder: ZooFolder, command: Sequence[str], more: Sequence[str]) -> None:
        self._ray, self._folder = ray, folder
        self._command, self._more = tuple(command), tuple(more)
        self._code = code_digest()
        self._remote = ray.remote(build_bundle)
        self.running: dict[Any, Build] = {}

    def begin(self, build: Build) -> ProcessEnd | None:
        """Submit a build. Returns how it ended where it could not begin, else None."""
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
        """Memory of a node in bytes; 0 where it has no cores for tasks."""
        resources = node["Resources"]
        return float(resources.get("memory", 0.0)) if resources.get("CPU", 0.0) >= CORES else 0.0

    def ended(self) -> Generator[tuple[Build, ProcessEnd], None, None]:
        """Builds that end within a tenth of a second, and how."""
        done, _ = self._ray.wait(list(self.running), timeout=_POLL_S) if self.running else ([], [])
        for reference in done:
            build = self.running.pop(reference)
            yield build, self._fetched(reference, build)

    def _fetched(self, reference: Any, build: Build) -> ProcessEnd:
        try:
            returned: ReturnedBuild = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return _failed(f"Ray could not do it ({str(error).strip().splitlines()[0].rstrip('.')}).")
        if returned.archive is None:
            return returned.ended
        try:
            target = self._folder.target(build)
            destination = build.destination or bundles.check_target(target, overwrite=build.options.overwrite)
            unpack(returned.archive, destination)
        except SpachError as error:
            return dataclasses.replace(returned.ended, code=error.exit_code, said=(f"Error: {error}",))
        return returned.ended

    def cancel(self) -> None:
        """Cancel all tasks, and wait up to 12 seconds until their exports have ended."""
        for reference in self.running:
            self._ray.cancel(reference, force=False)
        if self.running:
            self._ray.wait(list(self.running), num_returns=len(self.running), timeout=_CANCEL_S)


def portable(options: ExportOptions) -> ExportOptions:
    """Options with absolute input paths, and the bundle's name alone as --output, for use in any directory."""
    for option in filling():
        if option.caching is Caching.CONTENT and (path := value_of(options, option.field)) is not None:
            options = with_value(options, option.field, path.absolute())
    output = None if options.output is None else Path(options.output.name)
    return dataclasses.replace(options, output=output, overwrite=False)


def build_bundle(words: Sequence[str], name: str, code: str) -> ReturnedBuild:
    """On a node: run the export in a process of its own, and pack its bundle."""
    node = socket.gethostname()
    if code_digest() != code:
        problem = f"{node} has another version of spach-deploy. Install the same one on every node."
        return ReturnedBuild(dataclasses.replace(_failed(problem), node=node), None)
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


def unpack(archive: bytes, destination: Destination) -> None:
    """Write a packed bundle in one step. BundleError where that fails, ChangedFileError where it is damaged."""
    with (
        bundles.writing(destination) as staging,
        tarfile.open(fileobj=io.BytesIO(archive)) as packed,
    ):
        for member in packed:
            content = packed.extractfile(member)
            assert content is not None  # `pack` adds regular files only
            (staging / Path(member.name).name).write_bytes(content.read())
        Bundle.open(staging)


def _failed(sentence: str) -> ProcessEnd:
    return ProcessEnd(NOT_BEGUN, (f"Error: {sentence}",), 0.0)

"""Calibration by many processes: each collects statistics of some images, and merged they are those of one process.

There are two passes over the images. The first decodes every image for the checks of the calibration set, so an unfit
set is refused before the expensive work, and images that cannot be read are known. The second runs the graph over the
readable images, in shards that begin at multiples of `statistics.BLOCK`; shards are merged in the images' order.

The result is bit for bit that of `calibration.collect`, if the graph computes the same bits: on processors of one kind,
with one number of threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from spach_deploy.bundle.inputs import ModelInputs, feeds_of
from spach_deploy.common.batches import chunked, ranges
from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.common.executors import ClusterAddress, Executor
from spach_deploy.data import preprocess
from spach_deploy.data.calibration_set_checks import (
    CalibrationSetCollector,
    CalibrationSetSummary,
    ImageSummary,
    observe,
)
from spach_deploy.data.images import ImageEntry, ImageSource, Skipped, check_unreadable, image_digest
from spach_deploy.data.preprocess import normalize
from spach_deploy.graph.editing import weight_bytes
from spach_deploy.options.specs import Preprocessing
from spach_deploy.quantization.calibration import (
    CalibrationProgress,
    CalibrationSettings,
    CalibrationState,
    CollectedStatistics,
)
from spach_deploy.quantization.statistics import BLOCK, Collector, TensorRequest, TensorStatistics
from spach_deploy.runtime.onnxruntime_runner import graph_bytes

OBSERVED = 256
"""Images in one task of the first pass."""

MOST_BLOCKS = 16
"""Most blocks in one task of the second pass: these are computed again when a node dies."""

_BASE_BYTES = 700e6
"""Memory of a task but for its graph, in bytes: Python, ONNX Runtime, one image's activations, statistics."""

_COPIES = 3
"""Copies of the graph in a task's memory: as received, as parsed, and in ONNX Runtime."""


@dataclasses.dataclass(frozen=True)
class ReadableEntries:
    """Result of a task of the first pass: by index in the task, summaries of readable images, and why others were
    skipped.
    """

    seen: tuple[tuple[int, ImageSummary], ...]
    skipped: tuple[tuple[int, Skipped], ...]


@dataclasses.dataclass(frozen=True)
class CalibrationWork:
    """What all tasks of the second pass share: the FP32 graph as bytes, its inputs, and the tensors to measure."""

    graph: bytes
    wanted: tuple[TensorRequest, ...]
    histograms: bool
    preprocessing: Preprocessing
    threads: int | None
    takes: ModelInputs = dataclasses.field(default_factory=ModelInputs)


@dataclasses.dataclass(frozen=True)
class CalibrationShard:
    """Images of one task of the second pass, with their digests from the first. `after`: how many come before them."""

    after: int
    entries: tuple[ImageEntry, ...]
    digests: tuple[bytes, ...]


def observe_part(preprocessing: Preprocessing, entries: Sequence[ImageEntry]) -> ReadableEntries:
    """One task of the first pass: decode and summarize images."""
    seen, skipped = [], []
    for place, entry in enumerate(entries):
        try:
            image = preprocess.pixels(entry.load(), preprocessing)
        except ImageError as error:
            skipped.append((place, Skipped(entry.name, error.message)))
        else:
            seen.append((place, observe(entry.name, image, entry.label)))
    return ReadableEntries(tuple(seen), tuple(skipped))


def collect_part(work: CalibrationWork, part: CalibrationShard) -> dict[str, TensorStatistics]:
    """One task of the second pass: statistics by tensor. UsageError for an image that changed since the first pass."""
    model = ir.from_proto(ModelProto.FromString(work.graph))
    collector = Collector(model, work.wanted, histograms=work.histograms, threads=work.threads, after=part.after)
    for number, (entry, digest) in enumerate(zip(part.entries, part.digests, strict=True), part.after):
        image = preprocess.pixels(entry.load(), work.preprocessing)
        if image_digest(image) != digest:
            raise UsageError(f"{entry.name} was changed while it was calibrated on.", "Run again.")
        collector.run(feeds_of(work.takes.of(normalize(image[None], work.preprocessing), number)))
    return {name: entry.packed() for name, entry in collector.statistics.items()}


@dataclasses.dataclass
class MergedStatistics:
    """Statistics merged so far, and of how many images: a multiple of BLOCK, until the last shard is merged."""

    statistics: dict[str, TensorStatistics] = dataclasses.field(default_factory=dict)
    images: int = 0

    def add(self, found: dict[str, TensorStatistics], images: int) -> None:
        """Merge the statistics of the next `images` images."""
        merge_all(self.statistics, found)
        self.images += images


def collect_on_cluster(
    address: ClusterAddress,
    model: ir.Model,
    wanted: Sequence[TensorRequest],
    source: ImageSource,
    preprocessing: Preprocessing,
    run: CalibrationSettings,
) -> CollectedStatistics:
    """`calibration.collect` by the tasks of a cluster, each on one core.

    Raises what `ClusterAddress.connected`, `Cluster.executor` and `collect_in_parts` raise.
    """
    run = dataclasses.replace(run, threads=1)
    with address.connected() as cluster:
        executor = cluster.executor(_BASE_BYTES + _COPIES * weight_bytes(model))
        return collect_in_parts(model, wanted, source, preprocessing, run, executor)


def collect_in_parts(
    model: ir.Model,
    wanted: Sequence[TensorRequest],
    source: ImageSource,
    preprocessing: Preprocessing,
    run: CalibrationSettings,
    executor: Executor,
) -> CollectedStatistics:
    """`calibration.collect` by the tasks of an executor. An unfinished run is continued after its last saved shard.

    An unfinished run of `calibration.collect` is continued only if it ended with a block. Raises what `collect` raises,
    and UsageError where a task cannot read an image that this process can read.
    """
    start = time.monotonic()
    readable, digests, summary = _observed(source, preprocessing, executor)
    summary.check()
    work = CalibrationWork(graph_bytes(model), tuple(wanted), run.histograms, preprocessing, run.threads, run.takes)
    merged, state = _continued(run, digests, source)
    resumed = merged.images
    blocks = blocks_a_part(len(readable), executor.workers)
    parts, again = itertools.tee(_parts(readable, digests, blocks, resumed))
    began = time.monotonic()
    for part, found in zip(again, executor.map(collect_part, work, parts), strict=True):
        merged.add(found, len(part.entries))
        if state.is_due and merged.images % BLOCK == 0:
            state.save(merged.images, _seen(digests[: merged.images]))
        left = (time.monotonic() - began) / (merged.images - resumed) * (len(readable) - merged.images)
        run.on_progress(CalibrationProgress(merged.images, len(readable), left))
    state.remove()
    return CollectedStatistics(merged.statistics, summary, time.monotonic() - start, resumed)


def _continued(
    run: CalibrationSettings, digests: Sequence[bytes], source: ImageSource
) -> tuple[MergedStatistics, CalibrationState]:
    """Statistics of an unfinished run, if it ended with a block, and its file. UsageError if it is of other images."""
    merged = MergedStatistics()
    state = CalibrationState(run, merged)
    done = state.restored_images()
    if done % BLOCK:
        merged = MergedStatistics()
        return merged, CalibrationState(run, merged)
    if done:
        state.check(_seen(digests[:done]) if done <= len(digests) else "", source)
    return merged, state


def _seen(digests: Sequence[bytes]) -> str:
    """The hash that `calibration.collect` saves for images with these digests."""
    seen = hashlib.sha256()
    for digest in digests:
        seen.update(hashlib.sha256(digest).hexdigest().encode())  # `content_hash` of one image
    return seen.hexdigest()


def blocks_a_part(images: int, workers: int) -> int:
    """Blocks in a shard: few enough that each worker gets several shards, and that little is lost with one."""
    return int(np.clip(images // BLOCK // (4 * workers), 1, MOST_BLOCKS))


def _observed(
    source: ImageSource, preprocessing: Preprocessing, executor: Executor
) -> tuple[list[ImageEntry], list[bytes], CalibrationSetSummary]:
    """First pass: the readable entries, their digests, and the summary of the set."""
    checks, skipped = CalibrationSetCollector(source, preprocessing), []
    readable: list[ImageEntry] = []
    digests: list[bytes] = []
    chunks, again = itertools.tee(chunked(source.entries(), OBSERVED))
    for chunk, found in zip(again, executor.map(observe_part, preprocessing, chunks), strict=True):
        for place, problem in found.skipped:
            check_unreadable(chunk[place], problem)
            skipped.append(problem)
        for place, seen in found.seen:
            checks.take(seen)
            readable.append(chunk[place])
            digests.append(seen.digest)
    if not readable:
        list(source)  # raises, and says what is wrong
    return readable, digests, checks.summary(tuple(skipped))


def _parts(
    readable: Sequence[ImageEntry], digests: Sequence[bytes], blocks: int, first: int
) -> Iterator[CalibrationShard]:
    for start, stop in ranges(len(readable), blocks * BLOCK, first):
        yield CalibrationShard(start, tuple(readable[start:stop]), tuple(digests[start:stop]))


def merge_all(whole: dict[str, TensorStatistics], part: dict[str, TensorStatistics]) -> None:
    """Merge the statistics of the next images, `part`, into `whole`, in place."""
    for name, entry in part.items():
        if name not in whole:
            whole[name] = TensorStatistics.empty(len(entry.max_abs), histogram=entry.histogram is not None)
        whole[name].merge(entry)

"""Calibration in parts: what `calibrate.collect` gives, bit for bit, from images that are looked at in many places.

Two passes. The first decodes every image and observes it for the survey, so that an unfit set is refused before the
expensive work, and what cannot be read is known. The second runs the graph over the readable images, in parts that
begin at the borders of `statistics.BLOCK`, and the parts are merged in the images' order. Results are the same bits
where the graph computes the same bits: on processors of one kind, with one number of threads.
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
from spach_deploy.graph.export import INPUT
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
"""Images that one task of the first pass looks at."""

MOST_BLOCKS = 16
"""Blocks of one task of the second pass, at most: what is lost and done again when a node dies."""

_BASE_BYTES = 700e6
"""Memory of a task beside its graph: Python, ONNX Runtime, one image's activations, statistics."""

_COPIES = 3
"""Of the graph in a task: as it came, read, and in ONNX Runtime."""


@dataclasses.dataclass(frozen=True)
class ReadableEntries:
    """Of a task's entries: those that could be read, by their place among them, and why others could not."""

    seen: tuple[tuple[int, ImageSummary], ...]
    skipped: tuple[tuple[int, Skipped], ...]


@dataclasses.dataclass(frozen=True)
class CalibrationWork:
    """What tasks of the second pass share: the FP32 graph as bytes, and what is measured in it."""

    graph: bytes
    wanted: tuple[TensorRequest, ...]
    histograms: bool
    preprocessing: Preprocessing
    threads: int | None


@dataclasses.dataclass(frozen=True)
class CalibrationShard:
    """Readable images with the digests that they had, and how many come before them."""

    after: int
    entries: tuple[ImageEntry, ...]
    digests: tuple[bytes, ...]


def observe_part(preprocessing: Preprocessing, entries: Sequence[ImageEntry]) -> ReadableEntries:
    """A task of the first pass."""
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
    """A task of the second pass. Raises UsageError for an image that is another than before."""
    model = ir.from_proto(ModelProto.FromString(work.graph))
    collector = Collector(model, work.wanted, histograms=work.histograms, threads=work.threads, after=part.after)
    for entry, digest in zip(part.entries, part.digests, strict=True):
        image = preprocess.pixels(entry.load(), work.preprocessing)
        if image_digest(image) != digest:
            raise UsageError(f"{entry.name} was changed while it was calibrated on.", "Run again.")
        collector.run({INPUT: normalize(image[None], work.preprocessing)})
    return {name: entry.packed() for name, entry in collector.statistics.items()}


@dataclasses.dataclass
class MergedStatistics:
    """What has been merged, and how many images that is: whole blocks, but for the last part."""

    statistics: dict[str, TensorStatistics] = dataclasses.field(default_factory=dict)
    images: int = 0

    def add(self, found: dict[str, TensorStatistics], images: int) -> None:
        """The part that comes next."""
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
    """What `calibrate.collect` gives, from a cluster's tasks of one core.

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
    """What `calibrate.collect` gives, from tasks. An unfinished run goes on behind the last part that was kept.

    What one process kept between two blocks is not continued. Raises what `collect` raises, and UsageError where a task
    cannot read what can be read here.
    """
    start = time.monotonic()
    readable, digests, survey = _observed(source, preprocessing, executor)
    survey.check()
    work = CalibrationWork(graph_bytes(model), tuple(wanted), run.histograms, preprocessing, run.threads)
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
    return CollectedStatistics(merged.statistics, survey, time.monotonic() - start, resumed)


def _continued(
    run: CalibrationSettings, digests: Sequence[bytes], source: ImageSource
) -> tuple[MergedStatistics, CalibrationState]:
    """What an unfinished run kept, where it ends with a block. UsageError where that is of other images."""
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
    """The hash that `calibrate.collect` keeps of images with these digests."""
    seen = hashlib.sha256()
    for digest in digests:
        seen.update(hashlib.sha256(digest).hexdigest().encode())  # `content_hash` of one image
    return seen.hexdigest()


def blocks_a_part(images: int, workers: int) -> int:
    """So that each worker has several parts, and a part that is lost is not much."""
    return int(np.clip(images // BLOCK // (4 * workers), 1, MOST_BLOCKS))


def _observed(
    source: ImageSource, preprocessing: Preprocessing, executor: Executor
) -> tuple[list[ImageEntry], list[bytes], CalibrationSetSummary]:
    """The readable entries, their digests, and what they are."""
    taker, skipped = CalibrationSetCollector(source, preprocessing), []
    readable: list[ImageEntry] = []
    digests: list[bytes] = []
    chunks, again = itertools.tee(chunked(source.entries(), OBSERVED))
    for chunk, found in zip(again, executor.map(observe_part, preprocessing, chunks), strict=True):
        for place, problem in found.skipped:
            check_unreadable(chunk[place], problem)
            skipped.append(problem)
        for place, seen in found.seen:
            taker.take(seen)
            readable.append(chunk[place])
            digests.append(seen.digest)
    if not readable:
        list(source)  # raises, and names what is wrong
    return readable, digests, taker.survey(tuple(skipped))


def _parts(
    readable: Sequence[ImageEntry], digests: Sequence[bytes], blocks: int, first: int
) -> Iterator[CalibrationShard]:
    for start, stop in ranges(len(readable), blocks * BLOCK, first):
        yield CalibrationShard(start, tuple(readable[start:stop]), tuple(digests[start:stop]))


def merge_all(whole: dict[str, TensorStatistics], part: dict[str, TensorStatistics]) -> None:
    """Add the next part's statistics, tensor by tensor."""
    for name, entry in part.items():
        if name not in whole:
            whole[name] = TensorStatistics.empty(len(entry.max_abs), histogram=entry.histogram is not None)
        whole[name].merge(entry)

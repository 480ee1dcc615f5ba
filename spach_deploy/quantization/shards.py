"""Calibration in parts: what `calibrate.collect` gives, bit for bit, from images that are looked at in many places.

Two passes. The first decodes every image and observes it for the survey, so that an unfit set is refused before the
expensive work, and what cannot be read is known. The second runs the graph over the readable images, in parts that
begin at the borders of `statistics.BLOCK`, and the parts are merged in the images' order. Results are the same bits
where the graph computes the same bits: on processors of one kind, with one number of threads.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
from onnx import ModelProto

from spach_deploy.data import preprocess
from spach_deploy.data.parts import Executor, check_unreadable, chunked
from spach_deploy.data.preprocess import normalize
from spach_deploy.data.source import Entry, ImageSource, Skipped, image_digest
from spach_deploy.data.survey import Observation, Survey, SurveyTaker, observe
from spach_deploy.errors import ImageError, UsageError
from spach_deploy.onnx_graph.export import INPUT
from spach_deploy.quantization.calibrate import Progress, Run, Seen
from spach_deploy.quantization.statistics import BLOCK, Collector, TensorStatistics, Wanted
from spach_deploy.specs import Preprocessing

OBSERVED = 256
"""Images that one task of the first pass looks at."""

MOST_BLOCKS = 16
"""Blocks of one task of the second pass, at most: what is lost and done again when a node dies."""


@dataclasses.dataclass(frozen=True)
class Observed:
    """Of a task's entries: those that could be read, by their place among them, and why others could not."""

    seen: tuple[tuple[int, Observation], ...]
    skipped: tuple[tuple[int, Skipped], ...]


@dataclasses.dataclass(frozen=True)
class Work:
    """What tasks of the second pass share: the FP32 graph as bytes, and what is measured in it."""

    graph: bytes
    wanted: tuple[Wanted, ...]
    histograms: bool
    preprocessing: Preprocessing
    threads: int | None


@dataclasses.dataclass(frozen=True)
class Part:
    """Readable images with the digests that they had, and how many come before them."""

    after: int
    entries: tuple[Entry, ...]
    digests: tuple[bytes, ...]


def observe_part(preprocessing: Preprocessing, entries: Sequence[Entry]) -> Observed:
    """A task of the first pass."""
    seen, skipped = [], []
    for place, entry in enumerate(entries):
        try:
            image = preprocess.pixels(entry.load(), preprocessing)
        except ImageError as error:
            skipped.append((place, Skipped(entry.name, error.message)))
        else:
            seen.append((place, observe(entry.name, image, entry.label)))
    return Observed(tuple(seen), tuple(skipped))


def collect_part(work: Work, part: Part) -> dict[str, TensorStatistics]:
    """A task of the second pass. Raises UsageError for an image that is another than before."""
    model = ModelProto.FromString(work.graph)
    collector = Collector(model, work.wanted, histograms=work.histograms, threads=work.threads, after=part.after)
    for entry, digest in zip(part.entries, part.digests, strict=True):
        image = preprocess.pixels(entry.load(), work.preprocessing)
        if image_digest(image) != digest:
            raise UsageError(f"{entry.name} was changed while it was calibrated on.", "Run again.")
        collector.run({INPUT: normalize(image[None], work.preprocessing)})
    return {name: entry.packed() for name, entry in collector.statistics.items()}


def collect_in_parts(
    model: ModelProto,
    wanted: Sequence[Wanted],
    source: ImageSource,
    preprocessing: Preprocessing,
    run: Run,
    executor: Executor,
) -> Seen:
    """What `calibrate.collect` gives, from tasks. `run.state` is not used: a run that is killed begins again.

    Raises what `collect` raises, and UsageError where a task cannot read what can be read here.
    """
    start = time.monotonic()
    readable, digests, survey = _observed(source, preprocessing, executor)
    survey.check()
    work = Work(model.SerializeToString(), tuple(wanted), run.histograms, preprocessing, run.threads)
    parts = _parts(readable, digests, blocks_a_part(len(readable), executor.workers))
    statistics: dict[str, TensorStatistics] = {}
    done, began = 0, time.monotonic()
    for found in executor.map(collect_part, work, parts):
        merge_all(statistics, found)
        done = next(iter(statistics.values())).batches if statistics else done
        left = (time.monotonic() - began) / max(done, 1) * (len(readable) - done)
        run.on_progress(Progress(done, len(readable), left))
    return Seen(statistics, survey, time.monotonic() - start)


def blocks_a_part(images: int, workers: int) -> int:
    """So that each worker has several parts, and a part that is lost is not much."""
    return int(np.clip(images // BLOCK // (4 * workers), 1, MOST_BLOCKS))


def _observed(
    source: ImageSource, preprocessing: Preprocessing, executor: Executor
) -> tuple[list[Entry], list[bytes], Survey]:
    """The readable entries, their digests, and what they are."""
    taker, skipped = SurveyTaker(source, preprocessing), []
    readable: list[Entry] = []
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


def _parts(readable: Sequence[Entry], digests: Sequence[bytes], blocks: int) -> Iterator[Part]:
    for start in range(0, len(readable), blocks * BLOCK):
        taken = slice(start, start + blocks * BLOCK)
        yield Part(start, tuple(readable[taken]), tuple(digests[taken]))


def merge_all(whole: dict[str, TensorStatistics], part: dict[str, TensorStatistics]) -> None:
    """Add the next part's statistics, tensor by tensor."""
    for name, entry in part.items():
        if name not in whole:
            whole[name] = TensorStatistics.empty(len(entry.max_abs), histogram=entry.histogram is not None)
        whole[name].merge(entry)

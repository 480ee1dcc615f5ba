"""Validate on many images over a cluster: each task runs the reference and the graph on one shard of the images.

There are two phases. The first decodes every image, so that unreadable ones are known and the batches after them do not
shift. The second runs reference and graph in the same batches that one process would use, each batch whole in one
shard. So the outputs have the same bits wherever the hardware computes the same bits: on processors of one kind, with
one number of threads. Only outputs come back. This process keeps the pixels of the few images that tolerances are
derived on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.outputs import INPUT
from spach_deploy.common.batches import chunked, ranges
from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.common.executors import Cluster, Executor
from spach_deploy.common.machine import torch_threads
from spach_deploy.data import preprocess
from spach_deploy.data.images import ImageEntry, ImageSource, Skipped, check_unreadable, image_digest
from spach_deploy.data.labels import Labels
from spach_deploy.data.preprocess import Pixels, normalize, to_input
from spach_deploy.options.specs import BatchProfile, IODtype, Preprocessing
from spach_deploy.runtime import Runner
from spach_deploy.validation.rounding_error import Float32Array, evaluate_outputs
from spach_deploy.validation.runs import (
    LARGEST_BATCH,
    CpuExecution,
    RunOutputs,
    graph_batches,
    in_runtime,
    opened,
    problem_before,
    problem_of,
)

if TYPE_CHECKING:
    from torch import nn

Array = npt.NDArray[Any]
Say = Callable[[str], None]

DECODED_PER_TASK = 64
"""Images that one task of the first phase decodes."""

MOST_BATCHES = 16
"""Most reference batches in a shard: what is lost, and done again, when a node dies."""

_SAID_EVERY_S = 30.0

DECODING_BYTES = 700e6
"""Memory of a task of the first phase: Python, and a large picture."""

_WORKER_BYTES = 1.0e9
"""Memory of a worker of the second phase without weights: Python, PyTorch, ONNX Runtime, a batch's activations."""

_REFERENCE_COPIES, _GRAPH_COPIES = 2, 2
"""Copies of the weights in such a worker: of the reference, and of the graph for each execution (rounded ones are
FP32).
"""


# The first phase


@dataclasses.dataclass(frozen=True)
class ReadableImages:
    """The readable images in order, at most as many as were asked for.

    `labels` int64 (N), where every image has one. `left_out`: positions of the other images in
    `ImageSource.candidates`.
    """

    names: tuple[str, ...]
    digests: tuple[bytes, ...] = dataclasses.field(repr=False)
    labels: Labels | None
    left_out: frozenset[int]
    skipped: tuple[Skipped, ...]

    def __len__(self) -> int:
        return len(self.names)

    def entries(self, source: ImageSource) -> Iterator[ImageEntry]:
        """The images again, in order. UsageError where there are fewer than before."""
        kept = (entry for place, entry in enumerate(source.candidates()) if place not in self.left_out)
        count = 0
        for entry in itertools.islice(kept, len(self)):
            count += 1
            yield entry
        if count < len(self):
            raise UsageError(f"{source.description} was changed while it was validated on.", "Run again.")


def decode_shard(preprocessing: Preprocessing, entries: Sequence[ImageEntry]) -> list[bytes | Skipped]:
    """A task of the first phase: each image's digest, or why it cannot be read."""
    return [_digest(entry, preprocessing) for entry in entries]


def _digest(entry: ImageEntry, preprocessing: Preprocessing) -> bytes | Skipped:
    try:
        return image_digest(preprocess.pixels(entry.load(), preprocessing))
    except ImageError as error:
        return Skipped(entry.name, error.message)


def readable_images(
    source: ImageSource, limit: int, preprocessing: Preprocessing, executor: Executor
) -> ReadableImages:
    """The first `limit` readable images of `source`.

    Raises ImageError without any, UsageError where a task cannot read an image that can be read here.
    """
    reading = _Reading()
    candidates = source.candidates()
    while (wanted := limit - len(reading.names)) > 0 and (entry := next(candidates, None)) is not None:
        chosen = itertools.chain([entry], itertools.islice(candidates, wanted - 1))
        chunks, again = itertools.tee(chunked(chosen, DECODED_PER_TASK))
        for chunk, found in zip(again, executor.map(decode_shard, preprocessing, chunks), strict=True):
            reading.add(chunk, found)
    if not reading.names:
        list(source)  # raises, and names what is wrong
    return reading.readable()


class _Reading:
    """The images decoded so far."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._digests: list[bytes] = []
        self._labels: list[int | None] = []
        self._left_out: set[int] = set()
        self._skipped: list[Skipped] = []

    def add(self, entries: Sequence[ImageEntry], found: Sequence[bytes | Skipped]) -> None:
        for entry, digest in zip(entries, found, strict=True):
            if isinstance(digest, Skipped):
                check_unreadable(entry, digest)
                self._left_out.add(len(self.names) + len(self._skipped))
                self._skipped.append(digest)
            else:
                self.names.append(entry.name)
                self._digests.append(digest)
                self._labels.append(entry.label)

    def readable(self) -> ReadableImages:
        known = [label for label in self._labels if label is not None]
        labels = np.array(known, np.int64) if len(known) == len(self._labels) else None
        left_out, skipped = frozenset(self._left_out), tuple(self._skipped)
        return ReadableImages(tuple(self.names), tuple(self._digests), labels, left_out, skipped)


# The second phase: in workers


@dataclasses.dataclass(frozen=True)
class ValidationWork:
    """What all workers of the second phase share: a graph, its executions, and the reference in FP32."""

    graph: bytes = dataclasses.field(repr=False)
    executions: tuple[CpuExecution, ...]
    model: nn.Module = dataclasses.field(repr=False)
    preprocessing: Preprocessing
    io_dtype: IODtype
    threads: int | None = None

    @property
    def memory_bytes(self) -> float:
        """About how much memory a worker needs."""
        weights = sum(int(tensor.nbytes) for tensor in self.model.state_dict().values())
        graphs = len(self.executions) * _GRAPH_COPIES * len(self.graph)
        return _WORKER_BYTES + _REFERENCE_COPIES * weights + graphs


@dataclasses.dataclass(frozen=True)
class BatchRange:
    """The batches of one shard, as (start, stop) over all images. Those of the graph may end after those of the
    reference.
    """

    reference: tuple[tuple[int, int], ...]
    graph: tuple[tuple[int, int], ...]

    @property
    def start(self) -> int:
        """The first image."""
        return self.reference[0][0]

    @property
    def stop(self) -> int:
        """One past the last image."""
        return max(stop for _, stop in (*self.reference, *self.graph))


@dataclasses.dataclass(frozen=True)
class ValidationShard:
    """A shard's batches, its images, and the digests that they had in the first phase."""

    batches: BatchRange
    entries: tuple[ImageEntry, ...]
    digests: tuple[bytes, ...]


@dataclasses.dataclass(frozen=True)
class ShardOutputs:
    """The outputs (n, ...) of one shard by name: the reference's, and for each execution the graph's or a problem."""

    reference: Mapping[str, Float32Array]
    graph: tuple[Mapping[str, Array] | str, ...]


class LoadedRunners:
    """The reference and the graph, loaded in a worker until it ends."""

    def __init__(self, work: ValidationWork) -> None:
        self.work = dataclasses.replace(work, graph=b"")  # the sessions hold the graph
        self._stack = contextlib.ExitStack()
        self.runners: list[Runner] = [
            self._stack.enter_context(opened(execution, work.graph, work.threads)) for execution in work.executions
        ]

    def reference(self, images: Float32Array) -> Mapping[str, Float32Array]:
        """The reference's outputs for normalized images (n, C, H, W)."""
        with torch_threads(self.work.threads) if self.work.threads else contextlib.nullcontext():
            return evaluate_outputs(self.work.model, images)


def run_shard(loaded: LoadedRunners, shard: ValidationShard) -> ShardOutputs:
    """A task of the second phase. UsageError for an image that is no longer the one of the first phase."""
    work, first = loaded.work, shard.batches.start
    pairs = zip(shard.entries, shard.digests, strict=True)
    pixels = np.stack([_load_unchanged(*pair, work.preprocessing) for pair in pairs])
    reference = [
        loaded.reference(normalize(pixels[start - first : stop - first], work.preprocessing))
        for start, stop in shard.batches.reference
    ]
    feeds = [
        np.ascontiguousarray(to_input(pixels[start - first : stop - first], work.preprocessing, work.io_dtype))
        for start, stop in shard.batches.graph
    ]
    return ShardOutputs(_joined(reference), tuple(_outputs(runner, feeds) for runner in loaded.runners))


def _load_unchanged(entry: ImageEntry, digest: bytes, preprocessing: Preprocessing) -> Pixels:
    image = preprocess.pixels(entry.load(), preprocessing)
    if image_digest(image) != digest:
        raise UsageError(f"{entry.name} was changed while it was validated on.", "Run again.")
    return image


def _outputs(runner: Runner, feeds: Sequence[Array]) -> Mapping[str, Array] | str:
    """Outputs of all batches, or why one failed; empty without batches."""
    try:
        parts = [runner.run({INPUT: feed}) for feed in feeds]
    except Exception as error:  # runtimes raise what they like for a graph that fails at some batch
        return problem_of(error)
    return _joined(parts) if parts else {}


def _joined(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Outputs of all batches."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# The second phase: in this process


@dataclasses.dataclass(frozen=True)
class ShardedRunOutputs:
    """The reference's outputs (N, ...) by name, the graph's in each execution, and the pixels that were kept, by
    image.
    """

    reference: Mapping[str, Float32Array]
    graph: tuple[RunOutputs, ...]
    pixels: Mapping[int, Pixels] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class ShardedRunRequest:
    """What to run on which images.

    `profile`: the batches. `kept`: numbers of the images whose pixels are wanted. `file`: the graph's, for messages.
    """

    work: ValidationWork
    file: Path
    source: ImageSource
    readable: ReadableImages
    profile: BatchProfile
    kept: frozenset[int]


def run_in_shards(request: ShardedRunRequest, cluster: Cluster, say: Say) -> ShardedRunOutputs:
    """Run the reference and the graph on all readable images, in shards.

    An execution that is impossible for the graph is found out here, before any task. Raises UsageError for images that
    were changed, UnavailableError where a graph cannot run on this kind of machine.
    """
    count, problems = len(request.readable), _problems(request)
    possible = tuple(execution for execution in request.work.executions if not problems[execution])
    work = dataclasses.replace(request.work, executions=possible)
    collector = _ShardCollector(count, work.executions)
    pixels: dict[int, Pixels] = {}
    with cluster.pool(LoadedRunners, work, work.memory_bytes) as pool:
        ranges_of_batches = split_batches(count, request.profile, batches_per_shard(count, pool.workers))
        ahead, again = itertools.tee(ranges_of_batches)
        progress = _ShardProgress(count, pool.workers, say)
        for batches, answers in zip(again, pool.map(run_shard, _shards(request, ahead, pixels)), strict=True):
            collector.add(batches, answers)
            progress.at(batches.reference[-1][1])
    sizes = graph_batches(count, request.profile)
    runs = tuple(collector.run_outputs(execution, sizes, problems[execution]) for execution in request.work.executions)
    return ShardedRunOutputs(collector.reference, runs, pixels)


def _problems(request: ShardedRunRequest) -> dict[CpuExecution, str]:
    """For each execution why it is impossible, in a sentence; empty where it is possible."""
    work = request.work
    example = to_input(np.zeros((1, *work.preprocessing.pixel_shape), np.uint8), work.preprocessing, work.io_dtype)
    return {execution: problem_before(execution, request.file, example) for execution in work.executions}


def batches_per_shard(images: int, workers: int) -> int:
    """Reference batches in a shard: few enough that each worker gets several shards and a lost one costs little."""
    return int(np.clip(images // LARGEST_BATCH // (4 * workers), 1, MOST_BATCHES))


def split_batches(count: int, profile: BatchProfile, batches: int) -> Iterator[BatchRange]:
    """All batches of `count` images in shards of this many reference batches, with the graph's batches that begin in
    each.
    """
    graph = _ranges(graph_batches(count, profile))
    following = next(graph, None)
    for first, end in ranges(count, batches * LARGEST_BATCH):
        mine = []
        while following is not None and following[0] < end:
            mine.append(following)
            following = next(graph, None)
        yield BatchRange(tuple(ranges(end, LARGEST_BATCH, first)), tuple(mine))


def _ranges(sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Batch sizes as (start, stop)."""
    stop = 0
    for size in sizes:
        yield stop, stop + size
        stop += size


def _shards(
    request: ShardedRunRequest, ranges_of_batches: Iterable[BatchRange], pixels: dict[int, Pixels]
) -> Iterator[ValidationShard]:
    """The shards with their images. `pixels` receives those that are kept."""
    entries, held, begin = request.readable.entries(request.source), list[ImageEntry](), 0
    for batches in ranges_of_batches:
        del held[: batches.start - begin]
        begin = batches.start
        known = begin + len(held)
        held += itertools.islice(entries, batches.stop - known)
        for number in request.kept.intersection(range(known, batches.stop)):
            digest = request.readable.digests[number]
            pixels[number] = _load_unchanged(held[number - begin], digest, request.work.preprocessing)
        yield ValidationShard(
            batches, tuple(held[: batches.stop - begin]), request.readable.digests[begin : batches.stop]
        )


class _ShardCollector:
    """Puts the outputs of all shards together."""

    def __init__(self, count: int, executions: Sequence[CpuExecution]) -> None:
        self._count, self._executions = count, tuple(executions)
        self.reference: dict[str, Array] = {}
        self._outputs: dict[CpuExecution, dict[str, Array]] = {execution: {} for execution in executions}
        self._problems: dict[CpuExecution, str] = dict.fromkeys(executions, "")

    def add(self, batches: BatchRange, answers: ShardOutputs) -> None:
        """Add the next shard. Of a graph that fails, the first problem counts."""
        self._put(self.reference, answers.reference, batches.start)
        for execution, found in zip(self._executions, answers.graph, strict=True):
            if isinstance(found, str):
                self._problems[execution] = self._problems[execution] or found
            elif not self._problems[execution]:
                self._put(self._outputs[execution], found, batches.graph[0][0] if batches.graph else 0)

    def _put(self, whole: dict[str, Array], part: Mapping[str, Array], start: int) -> None:
        for name, array in part.items():
            if name not in whole:
                whole[name] = np.empty((self._count, *array.shape[1:]), array.dtype)
            whole[name][start : start + len(array)] = array

    def run_outputs(self, execution: CpuExecution, batches: tuple[int, ...], before: str) -> RunOutputs:
        """The graph's outputs in one execution; `before`: why it was impossible."""
        what = in_runtime(execution.value)
        if problem := before or self._problems[execution]:
            return RunOutputs(what, problem=problem)
        return RunOutputs(what, batches, self._outputs[execution])


class _ShardProgress:
    """Reports progress from time to time."""

    def __init__(self, total: int, workers: int, say: Say) -> None:
        self._total, self._say = total, say
        self._said = time.monotonic()
        say(f"Running the reference and the graph on {total} images, {workers} parts at a time.")

    def at(self, done: int) -> None:
        if time.monotonic() - self._said > _SAID_EVERY_S:
            self._said = time.monotonic()
            self._say(f"{done} of {self._total} images are done.")


@dataclasses.dataclass(frozen=True)
class FewImages:
    """Behaves as an array of N images, of which only some exist: normalized float32 (C, H, W) by number."""

    count: int
    known: Mapping[int, Float32Array]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, chosen: list[int], /) -> Float32Array:
        return np.stack([self.known[number] for number in chosen])

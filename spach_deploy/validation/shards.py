"""Validation in parts: what the reference and a graph answer to images that are looked at in many places.

Two passes. The first decodes every image, so that what cannot be read is known and moves no batch. The second runs the
reference and the graph in the very batches in which one process would run them, each batch whole in one part, so that
the answers are the same bits where both compute the same bits: on processors of one kind, with one number of threads.
Answers alone come back; of pixels only those are kept here on which tolerances are derived.
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

from spach_deploy.bundle.golden import INPUT, LOGITS
from spach_deploy.common.batches import chunked, ranges
from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.common.executors import Cluster, Executor
from spach_deploy.common.machine import torch_threads
from spach_deploy.data import preprocess
from spach_deploy.data.images import ImageEntry, ImageSource, Skipped, check_unreadable, image_digest
from spach_deploy.data.labels import Labels
from spach_deploy.data.preprocess import UInt8Array, normalize, to_input
from spach_deploy.options.specs import BatchProfile, IODtype, Preprocessing
from spach_deploy.runtime import Runner
from spach_deploy.validation.rounding_error import Float32Array, evaluate
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

DECODED = 64
"""Images that one task of the first pass decodes."""

MOST_BATCHES = 16
"""Batches of the reference in one part, at most: what is lost and done again when a node dies."""

_SAID_EVERY_S = 30.0

DECODING_BYTES = 700e6
"""Memory of a task of the first pass: Python, and a large picture."""

_BENCH_BYTES = 1.0e9
"""Memory of a worker of the second pass beside weights: Python, PyTorch, ONNX Runtime, activations of a batch."""

_REFERENCE_COPIES, _GRAPH_COPIES = 2, 2
"""Of weights in such a worker: of the reference, and of the graph for each form, rounded ones in FP32."""


# The first pass


@dataclasses.dataclass(frozen=True)
class ReadableImages:
    """Images that can be read, in order, at most so many as were asked for.

    `labels` int64 (N) where all come with one. `left_out`: places of the others among `ImageSource.candidates`.
    """

    names: tuple[str, ...]
    digests: tuple[bytes, ...] = dataclasses.field(repr=False)
    labels: Labels | None
    left_out: frozenset[int]
    skipped: tuple[Skipped, ...]

    def __len__(self) -> int:
        return len(self.names)

    def entries(self, source: ImageSource) -> Iterator[ImageEntry]:
        """They, afresh. UsageError where there are fewer than before."""
        kept = (entry for place, entry in enumerate(source.candidates()) if place not in self.left_out)
        count = 0
        for entry in itertools.islice(kept, len(self)):
            count += 1
            yield entry
        if count < len(self):
            raise UsageError(f"{source.description} was changed while it was validated on.", "Run again.")


def decode_part(preprocessing: Preprocessing, entries: Sequence[ImageEntry]) -> list[bytes | Skipped]:
    """A task of the first pass: each image's digest, or why it cannot be read."""
    return [_digest(entry, preprocessing) for entry in entries]


def _digest(entry: ImageEntry, preprocessing: Preprocessing) -> bytes | Skipped:
    try:
        return image_digest(preprocess.pixels(entry.load(), preprocessing))
    except ImageError as error:
        return Skipped(entry.name, error.message)


def readable_images(
    source: ImageSource, limit: int, preprocessing: Preprocessing, executor: Executor
) -> ReadableImages:
    """The first `limit` readable images of `source`, which is limited to as many.

    Raises ImageError where there is none, UsageError where a task cannot read what can be read here.
    """
    reading = _Reading()
    candidates = source.candidates()
    while (wanted := limit - len(reading.names)) > 0 and (entry := next(candidates, None)) is not None:
        chosen = itertools.chain([entry], itertools.islice(candidates, wanted - 1))
        chunks, again = itertools.tee(chunked(chosen, DECODED))
        for chunk, found in zip(again, executor.map(decode_part, preprocessing, chunks), strict=True):
            reading.add(chunk, found)
    if not reading.names:
        list(source)  # raises, and names what is wrong
    return reading.readable()


class _Reading:
    """What is known of the candidates so far."""

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


# The second pass, where it is worked on


@dataclasses.dataclass(frozen=True)
class ValidationWork:
    """What workers of the second pass share: a graph, the forms that it runs in, and the reference in FP32."""

    graph: bytes = dataclasses.field(repr=False)
    forms: tuple[CpuExecution, ...]
    model: nn.Module = dataclasses.field(repr=False)
    preprocessing: Preprocessing
    io_dtype: IODtype
    threads: int | None = None

    @property
    def memory_bytes(self) -> float:
        """What a worker needs, about."""
        weights = sum(int(tensor.nbytes) for tensor in self.model.state_dict().values())
        graphs = len(self.forms) * _GRAPH_COPIES * len(self.graph)
        return _BENCH_BYTES + _REFERENCE_COPIES * weights + graphs


@dataclasses.dataclass(frozen=True)
class BatchRange:
    """Batches of one part, as (start, stop) of images numbered over all; the graph's may reach beyond."""

    reference: tuple[tuple[int, int], ...]
    graph: tuple[tuple[int, int], ...]

    @property
    def start(self) -> int:
        """Number of the first image."""
        return self.reference[0][0]

    @property
    def stop(self) -> int:
        """Number behind the last image."""
        return max(stop for _, stop in (*self.reference, *self.graph))


@dataclasses.dataclass(frozen=True)
class ValidationShard:
    """A cut with its images and the digests that they had."""

    cut: BatchRange
    entries: tuple[ImageEntry, ...]
    digests: tuple[bytes, ...]


@dataclasses.dataclass(frozen=True)
class ShardOutputs:
    """To one part: the reference's logits (n, classes), and for each form outputs by name, or its problem."""

    reference: Float32Array
    graph: tuple[Mapping[str, Array] | str, ...]


class LoadedRunners:
    """The reference and the graph, ready to run, in a worker that keeps them until it ends."""

    def __init__(self, work: ValidationWork) -> None:
        self.work = dataclasses.replace(work, graph=b"")  # the sessions have it
        self._stack = contextlib.ExitStack()
        self.runners: list[Runner] = [
            self._stack.enter_context(opened(form, work.graph, work.threads)) for form in work.forms
        ]

    def answer(self, images: Float32Array) -> Float32Array:
        """The reference's logits of normalized images (n, 3, S, S)."""
        with torch_threads(self.work.threads) if self.work.threads else contextlib.nullcontext():
            return evaluate(self.work.model, images)


def run_shard(bench: LoadedRunners, part: ValidationShard) -> ShardOutputs:
    """A task of the second pass. Raises UsageError for an image that is another than before."""
    work, first = bench.work, part.cut.start
    pixels = np.stack([_unchanged(*pair, work.preprocessing) for pair in zip(part.entries, part.digests, strict=True)])
    logits = [
        bench.answer(normalize(pixels[start - first : stop - first], work.preprocessing))
        for start, stop in part.cut.reference
    ]
    feeds = [
        np.ascontiguousarray(to_input(pixels[start - first : stop - first], work.preprocessing, work.io_dtype))
        for start, stop in part.cut.graph
    ]
    return ShardOutputs(np.concatenate(logits), tuple(_outputs(runner, feeds) for runner in bench.runners))


def _unchanged(entry: ImageEntry, digest: bytes, preprocessing: Preprocessing) -> UInt8Array:
    image = preprocess.pixels(entry.load(), preprocessing)
    if image_digest(image) != digest:
        raise UsageError(f"{entry.name} was changed while it was validated on.", "Run again.")
    return image


def _outputs(runner: Runner, feeds: Sequence[Array]) -> Mapping[str, Array] | str:
    """Outputs of all batches, or why one of them failed; nothing for no batch."""
    try:
        parts = [runner.run({INPUT: feed}) for feed in feeds]
    except Exception as error:  # runtimes raise what they like for a graph that fails at some batch
        return problem_of(error)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


# The second pass, where its parts come together


@dataclasses.dataclass(frozen=True)
class RunsOutputs:
    """The reference's logits (N, classes), what the graph gave in each form, and pixels of a few images by number."""

    logits: Float32Array
    graph: tuple[RunOutputs, ...]
    pixels: Mapping[int, UInt8Array] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class ShardedRunRequest:
    """What is run on which images, in batches of `profile`; `kept`: numbers of images whose pixels are wanted.

    `file`: the graph's, for what is said of it.
    """

    work: ValidationWork
    file: Path
    source: ImageSource
    readable: ReadableImages
    profile: BatchProfile
    kept: frozenset[int]


def run_in_shards(asked: ShardedRunRequest, cluster: Cluster, say: Say) -> RunsOutputs:
    """Run the reference and the graph on all readable images, in parts.

    A form that the graph cannot be run in at all is told from here, and not tried elsewhere. Raises UsageError for
    images that were changed, UnavailableError where a graph cannot be run on this kind of machine.
    """
    count, problems = len(asked.readable), _problems(asked)
    work = dataclasses.replace(asked.work, forms=tuple(form for form in asked.work.forms if not problems[form]))
    gathered = _Gathered(count, work.forms)
    pixels: dict[int, UInt8Array] = {}
    with cluster.pool(LoadedRunners, work, work.memory_bytes) as pool:
        cuts = cut_batches(count, asked.profile, batches_a_part(count, pool.workers))
        ahead, again = itertools.tee(cuts)
        progress = _Progress(count, pool.workers, say)
        for cut, answers in zip(again, pool.map(run_shard, _parts(asked, ahead, pixels)), strict=True):
            gathered.add(cut, answers)
            progress.at(cut.reference[-1][1])
    batches = graph_batches(count, asked.profile)
    ran = tuple(gathered.ran(form, batches, problems[form]) for form in asked.work.forms)
    return RunsOutputs(gathered.logits, ran, pixels)


def _problems(asked: ShardedRunRequest) -> dict[CpuExecution, str]:
    """What is wrong with each form before any image, in a sentence; empty where nothing is."""
    work, size = asked.work, asked.work.preprocessing.image_size
    example = to_input(np.zeros((1, size, size, 3), np.uint8), work.preprocessing, work.io_dtype)
    return {form: problem_before(form, asked.file, example) for form in work.forms}


def batches_a_part(images: int, workers: int) -> int:
    """So that each worker has several parts, and a part that is lost is not much."""
    return int(np.clip(images // LARGEST_BATCH // (4 * workers), 1, MOST_BATCHES))


def cut_batches(count: int, profile: BatchProfile, batches: int) -> Iterator[BatchRange]:
    """All batches of `count` images: so many of the reference in each cut, and the graph's that begin among them."""
    graph = _ranges(graph_batches(count, profile))
    following = next(graph, None)
    for first, end in ranges(count, batches * LARGEST_BATCH):
        mine = []
        while following is not None and following[0] < end:
            mine.append(following)
            following = next(graph, None)
        yield BatchRange(tuple(ranges(end, LARGEST_BATCH, first)), tuple(mine))


def _ranges(sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Sizes of batches as (start, stop)."""
    stop = 0
    for size in sizes:
        yield stop, stop + size
        stop += size


def _parts(
    asked: ShardedRunRequest, cuts: Iterable[BatchRange], pixels: dict[int, UInt8Array]
) -> Iterator[ValidationShard]:
    """Cuts with their images; `pixels` gets those that are wanted here."""
    entries, held, begin = asked.readable.entries(asked.source), list[ImageEntry](), 0
    for cut in cuts:
        del held[: cut.start - begin]
        begin = cut.start
        known = begin + len(held)
        held += itertools.islice(entries, cut.stop - known)
        for number in asked.kept.intersection(range(known, cut.stop)):
            digest = asked.readable.digests[number]
            pixels[number] = _unchanged(held[number - begin], digest, asked.work.preprocessing)
        yield ValidationShard(cut, tuple(held[: cut.stop - begin]), asked.readable.digests[begin : cut.stop])


class _Gathered:
    """Answers of all parts, put where they belong."""

    def __init__(self, count: int, forms: Sequence[CpuExecution]) -> None:
        self._count, self._forms = count, tuple(forms)
        self._reference: dict[str, Array] = {}
        self._outputs: dict[CpuExecution, dict[str, Array]] = {form: {} for form in forms}
        self._problems: dict[CpuExecution, str] = dict.fromkeys(forms, "")

    @property
    def logits(self) -> Float32Array:
        return self._reference[LOGITS]

    def add(self, cut: BatchRange, answers: ShardOutputs) -> None:
        """The part that comes next: of a graph that fails, the first problem counts."""
        self._put(self._reference, {LOGITS: answers.reference}, cut.start)
        for form, found in zip(self._forms, answers.graph, strict=True):
            if isinstance(found, str):
                self._problems[form] = self._problems[form] or found
            elif not self._problems[form]:
                self._put(self._outputs[form], found, cut.graph[0][0] if cut.graph else 0)

    def _put(self, whole: dict[str, Array], part: Mapping[str, Array], start: int) -> None:
        for name, array in part.items():
            if name not in whole:
                whole[name] = np.empty((self._count, *array.shape[1:]), array.dtype)
            whole[name][start : start + len(array)] = array

    def ran(self, form: CpuExecution, batches: tuple[int, ...], before: str) -> RunOutputs:
        """What the graph gave in one form; `before`: why it was not tried."""
        what = in_runtime(form.value)
        if problem := before or self._problems[form]:
            return RunOutputs(what, problem=problem)
        return RunOutputs(what, batches, self._outputs[form])


class _Progress:
    """Says how far it is, from time to time."""

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
    """As an array of N images of which only some are there: normalized float32 (3, S, S) by number."""

    count: int
    known: Mapping[int, Float32Array]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, chosen: list[int], /) -> Float32Array:
        return np.stack([self.known[number] for number in chosen])

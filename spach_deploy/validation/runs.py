"""Run what was exported on images, and compare it with the reference: one piece of evidence per run.

A graph runs in ONNX Runtime, a plan in TensorRT. The images go through in batches of different sizes, because a graph
can be right at one and wrong at another: the smallest, the usual and the largest of the batch profile. Where there are
fewer images, they come again, each time from another one on: what mixes up images of a batch is seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.golden import INPUT, LOGITS, expected_outputs, promised_dtypes
from spach_deploy.common.errors import MismatchError, SpachError, UnavailableError, UsageError
from spach_deploy.graph.runtimes import GraphNeeds, runtimes
from spach_deploy.options.specs import BatchProfile, Flavour, OutputSpec, Precision
from spach_deploy.runtime import Runner, TensorSpec, truncation
from spach_deploy.runtime.onnxruntime_runner import NAME, OnnxRuntimeRunner, saved_graph
from spach_deploy.runtime.tensorrt_runner import TensorRTRunner
from spach_deploy.validation.changed_classes import ImagePredictions, notable_predictions
from spach_deploy.validation.compare import Comparison, compare_outputs
from spach_deploy.validation.tolerance import Bounds
from spach_deploy.validation.verdict import Verdict, judge

if TYPE_CHECKING:
    import onnx_ir as ir

Array = npt.NDArray[Any]

Watch = Callable[["ir.Model"], Collection[str]]
"""Chooses tensors of a graph, given in the form in which it will run."""

LARGEST_BATCH = 3
"""On a CPU, where the batch does not matter: beyond it a few cores gain nothing, and memory grows."""

_REPEATED = 8
"""Images that fill the profile's other batches."""

_MEMORY_SHARE = 0.5
"""Of the free memory, at most so much is taken by the largest batch on a CPU."""

_MOST_AT_ONCE = 512
"""Images in a batch on a CPU: the smallest model takes half a minute for them, and memory alone would allow hours."""

_RUNTIME_OVERHEAD = 2.0
"""A CPU's memory for a batch, over the tensors that have to be there at once (ms_hybrid_s in FP16: 1.6)."""


class Level(str, enum.Enum):
    """What a run proves: `engine`, the plan itself; `graph`, the typed graph that it was built from."""

    ENGINE = "engine"
    GRAPH = "graph"


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Images and the reference's answers. `inputs(start, stop)` gives inputs as the engine's caller sends them.

    `logits` float32 (N, classes). `images` and `reference` say in words what the images are and who answered.
    """

    inputs: Callable[[int, int], Array] = dataclasses.field(repr=False)
    logits: npt.NDArray[np.float32] = dataclasses.field(repr=False)
    names: tuple[str, ...] = dataclasses.field(repr=False)
    images: str
    reference: str
    outputs: OutputSpec = dataclasses.field(default_factory=OutputSpec)
    batch: BatchProfile = dataclasses.field(default_factory=BatchProfile)

    def __len__(self) -> int:
        return len(self.logits)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One run, compared and judged. `ran` says in words what ran; `batches` are the batch sizes it was fed, `left_out`
    a sentence about one of the profile's that it was not fed.

    `answers`: the images that changed class, or came closest to it. `logits` (N, classes): what it answered, None where
    it gave none. `inside`: tensors (1, ...) of the graph for the first image, where some were watched.
    """

    level: Level
    ran: str
    batches: tuple[int, ...]
    comparison: Comparison
    bounds: Bounds
    verdict: Verdict
    answers: tuple[ImagePredictions, ...] = ()
    left_out: str = ""
    logits: Array | None = dataclasses.field(default=None, repr=False, compare=False)
    inside: Mapping[str, Array] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether everything agreed."""
        return self.verdict.passed

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "level": self.level.value,
            "ran": self.ran,
            "batches": list(self.batches),
            "left_out": self.left_out,
            "passed": self.passed,
            "findings": list(self.verdict.findings),
            "comparison": self.comparison.to_dict(),
            "tolerances": self.bounds.to_dict(),
            "answers": [answer.to_dict() for answer in self.answers],
        }


class CpuExecution(str, enum.Enum):
    """How a CPU runs a typed graph: as it is, or in FP32 with every half tensor rounded to its type.

    Rounded, what overflows on a GPU overflows here. It is how a bfloat16 graph runs on a CPU at all.
    """

    PLAIN = "typed graph"
    ROUNDED = "typed graph, every half tensor rounded"


def executions_of(precision: Precision) -> tuple[CpuExecution, ...]:
    """Those that a graph of `precision` runs in on a CPU.

    ONNX Runtime computes FP16 mostly in FP32 and hides overflow, so FP16 is run once more with every half tensor
    rounded. bfloat16 only runs that way.
    """
    plain = () if precision is Precision.BF16 else (CpuExecution.PLAIN,)
    return plain if precision is Precision.FP32 else (*plain, CpuExecution.ROUNDED)


def executions_here(graph: Path | bytes, precision: Precision) -> tuple[CpuExecution, ...]:
    """`forms_of` that graph of `precision`, without the plain one where the ONNX Runtime here computes it wrongly."""
    forms = executions_of(precision)
    return (
        forms
        if truncated_by(graph, precision) is None
        else tuple(form for form in forms if form is not CpuExecution.PLAIN)
    )


def truncated_by(graph: Path | bytes, precision: Precision) -> str | None:
    """Version of the ONNX Runtime here where it truncates in a graph of `precision` what it should round, else None."""
    version = truncation.truncating_runtime() if precision is Precision.FP16 else None
    return version if version is not None and _quantizes_fp16(graph) else None


def truncation_notes(graph: Path | bytes, precision: Precision) -> tuple[str, ...]:
    """What a report says of a graph that is wrong in the ONNX Runtime here; nothing of others."""
    version = truncated_by(graph, precision)
    if version is None:
        return ()
    judged_by = "In it this graph is wrong, so it was judged in FP32 with every half tensor rounded"
    return (f"{truncation.fault_of(version)}. {judged_by}. {truncation.REMEDY}",)


def _quantizes_fp16(graph: Path | bytes) -> bool:
    import onnx
    import onnx_ir as ir

    from spach_deploy.graph.precision.elements import quantizes_fp16

    try:
        model = onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else onnx.load_from_string(graph)
        return quantizes_fp16(ir.from_proto(model))
    except Exception:  # a foreign graph may hold anything; running it says what
        return False


@dataclasses.dataclass(frozen=True)
class RunOutputs:
    """What a run gave: `outputs` of all images by name, or the problem for which there are none, in a sentence.

    `again`: of images that came once more, by their numbers `repeated`, to fill other batches. `left_out`: a sentence
    about a batch of the profile that did not run.
    """

    what: str
    batches: tuple[int, ...] = ()
    outputs: Mapping[str, Array] = dataclasses.field(default_factory=dict, repr=False)
    problem: str = ""
    repeated: tuple[int, ...] = ()
    again: Mapping[str, Array] = dataclasses.field(default_factory=dict, repr=False)
    left_out: str = ""


def examine_graph(
    graph: Path | bytes, trial: EvaluationSet, bounds: Bounds, *, ran: str = CpuExecution.PLAIN.value
) -> RunResult:
    """Run an ONNX graph in ONNX Runtime.

    A graph that does not load, or takes other inputs, or fails while it runs is evidence that did not pass. Raises
    UnavailableError where ONNX Runtime is missing or has no kernel for a node.
    """
    return _examine(CpuExecution.PLAIN, graph, trial, bounds, ran, in_others=True)


@contextlib.contextmanager
def opened(
    form: CpuExecution,
    graph: Path | bytes,
    threads: int | None,
    watch: Watch | None = None,
    max_batch: int = LARGEST_BATCH,
) -> Iterator[OnnxRuntimeRunner]:
    """The graph in ONNX Runtime, entered. UsageError where it does not load or cannot be rounded."""
    open_in = functools.partial(OnnxRuntimeRunner, threads=threads, is_brief=True, max_batch=max_batch)
    with contextlib.ExitStack() as stack:
        if form is CpuExecution.PLAIN and watch is None:
            yield stack.enter_context(open_in(graph))
            return
        with _as_it_runs(form, graph, watch) as (path, inner):
            runner = stack.enter_context(open_in(path, inner=inner))
        yield runner


@contextlib.contextmanager
def _as_it_runs(form: CpuExecution, graph: Path | bytes, watch: Watch | None) -> Iterator[tuple[Path, list[str]]]:
    """A file with the graph in a form, and the tensors that it gives because they are watched."""
    import onnx
    import onnx_ir as ir

    from spach_deploy.graph.editing import made_values, name_of
    from spach_deploy.graph.precision.rounding import check_runtime_rounds, rounded_graph

    if form is CpuExecution.ROUNDED:
        check_runtime_rounds()
    try:
        model = ir.from_proto(onnx.load(graph) if isinstance(graph, Path) else onnx.load_from_string(graph))
        model = rounded_graph(model) if form is CpuExecution.ROUNDED else model
    except Exception as error:  # a foreign graph may hold anything
        raise UsageError(f"Its half tensors cannot be rounded one by one: {error}") from error
    outputs = {value.name for value in model.graph.outputs}
    inner = [] if watch is None else [name for name in watch(model) if name not in outputs]
    made = {name_of(value): value for value in made_values(model.graph)}
    model.graph.outputs.extend(made[name] for name in inner)
    with saved_graph(model) as path:
        del model
        yield path, inner


def examine_typed(
    graph: Path | bytes,
    precision: Precision,
    trial: EvaluationSet,
    bounds: Bounds,
    *,
    watch: Watch | None = None,
) -> tuple[RunResult, ...]:
    """What a CPU can tell of a typed graph, in each of its forms that the ONNX Runtime here computes rightly.

    The first one is fed the profile's other batches too; whether images are mixed up does not depend on rounding. The
    last one, of the most roundings, has the tensors that `watch` chooses in `Evidence.inside`.
    """
    forms = executions_here(graph, precision)
    watched = {forms[-1]: watch}
    return tuple(
        _examine(form, graph, trial, bounds, form.value, watched.get(form), in_others=form is forms[0])
        for form in forms
    )


def examine_engine(plan: bytes, flavour: Flavour, trial: EvaluationSet, bounds: Bounds) -> RunResult:
    """Run a plan through TensorRT. Raises UnavailableError where it cannot run here, UsageError when it is no plan."""
    runner = TensorRTRunner(plan, flavour)
    with runner:
        return _run_and_judge(runner, Level.ENGINE, trial, bounds, "engine.plan")


def runs_here(plan: bytes, flavour: Flavour) -> bool:
    """Whether this machine can run a plan."""
    try:
        with TensorRTRunner(plan, flavour):
            return True
    except SpachError:
        return False


def examine_runner(runner: Runner, level: Level, trial: EvaluationSet, bounds: Bounds, ran: str) -> RunResult:
    """Run what is entered already, such as a model on a server; `level` says what it proves, `ran` what it is."""
    return _run_and_judge(runner, level, trial, bounds, ran)


def profile_batches(count: int, profile: BatchProfile) -> tuple[int, ...]:
    """Sizes in which `count` images go through an engine: the smallest of its profile, the usual one, the largest, and
    more of the largest until they are all through; images come again to fill the last one.
    """
    sizes = tuple(sorted({profile.min, profile.opt, profile.max}))
    return (*sizes, *[profile.max] * -(-max(0, count - sum(sizes)) // profile.max))


def repeating(count: int, places: int) -> tuple[int, ...]:
    """Number of the image in each of so many places: all `count` in order, then all again from the second one on, and
    so on, so that no two batches have their images in the same order.
    """
    return tuple((place + place // count) % count for place in range(places))


@dataclasses.dataclass(frozen=True)
class ExtraBatches:
    """The smallest, the usual and the largest batch of a profile, as far as a CPU is not fed them anyway and its memory
    allows.
    """

    sizes: tuple[int, ...]
    left_out: str = ""

    @classmethod
    def of(cls, graph: Path | bytes, trial: EvaluationSet) -> ExtraBatches:
        """What this machine has memory for, and a CPU the time."""
        profile, fed = trial.batch, graph_batches(len(trial), trial.batch)
        room = _room_for(graph, profile)
        most = min(profile.max, max(LARGEST_BATCH, min(room, _MOST_AT_ONCE)))
        sizes = {min(size, most) for size in (profile.min, profile.opt, profile.max)}.difference(fed)
        reason = f"on a CPU {most} is the most" if room > most else f"there was memory for {most}"
        left_out = f"A batch of {profile.max} did not run: {reason}." if most < profile.max else ""
        return cls(tuple(sorted(sizes)), left_out)


def _room_for(graph: Path | bytes, profile: BatchProfile) -> int:
    """The largest batch for which there is memory; that of the profile where nothing tells."""
    import onnx
    import onnx_ir as ir

    from spach_deploy.common.machine import find_memory
    from spach_deploy.graph.editing import live_elements_at_batch_one

    memory = find_memory()
    try:
        model = onnx.load_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph, load_external_data=False)
        elements = live_elements_at_batch_one(ir.from_proto(model))
    except Exception:  # a graph that no reader understands; ONNX Runtime says what is wrong with it
        return profile.max
    if memory is None or not elements:
        return profile.max
    return int(_MEMORY_SHARE * memory.available_bytes / (_RUNTIME_OVERHEAD * 4 * elements))


def in_other_batches(form: CpuExecution, graph: Path | bytes, ran: RunOutputs, trial: EvaluationSet) -> RunOutputs:
    """A graph that ran in small batches, run in the profile's others too, on a few of the images."""
    others = ExtraBatches.of(graph, trial)
    if ran.problem or not others.sizes:
        return _in_other(None, others, ran, trial)
    with opened(form, graph, None, max_batch=max(others.sizes)) as runner:
        return _in_other(runner, others, ran, trial)


def plan_batches(count: int, profile: BatchProfile, largest: int | None = None) -> tuple[int, ...]:
    """Sizes in which `count` images go through: the smallest allowed first, then the largest, at most `largest`."""
    largest = max(profile.min, min(profile.max, profile.max if largest is None else largest))
    first = min(profile.min, count)
    rest = count - first
    whole, last = divmod(rest, largest)
    return (first, *(largest for _ in range(whole)), *((last,) if last else ()))


def graph_batches(count: int, profile: BatchProfile) -> tuple[int, ...]:
    """Sizes in which `count` images go through a graph on a CPU."""
    return plan_batches(count, profile, LARGEST_BATCH)


def problem_before(form: CpuExecution, graph: Path | bytes, example: Array) -> str:
    """Why a graph cannot be run on inputs like `example`, in a sentence; empty where it can.

    Raises UnavailableError where this machine cannot tell.
    """
    try:
        with opened(form, graph, None) as runner:
            return _input_problem(runner.input_specs, example)
    except UsageError as error:
        _check_runtime(graph)
        return error.message


def problem_of(error: Exception) -> str:
    """Why a run ended, in a sentence. Raises the error itself where it is not the graph's fault."""
    if isinstance(error, (UnavailableError, UsageError)):
        raise error
    if isinstance(error, MismatchError):
        return error.message
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"It failed while it ran: {reason}"


def run_result(level: Level, ran: RunOutputs, trial: EvaluationSet, bounds: Bounds) -> RunResult:
    """What a run gave, held against the reference. A run with a problem is evidence that did not pass."""
    if ran.problem:
        comparison = Comparison(len(trial), (), (), (ran.problem,))
        verdict = judge(comparison, bounds.outputs)
        return RunResult(level, ran.what, (), comparison, bounds, verdict, left_out=ran.left_out)
    comparison = _compared(ran.outputs, trial, range(len(trial)))
    logits = ran.outputs.get(LOGITS)
    answers = notable_predictions(trial.logits, logits, trial.names)
    verdict = judge(comparison, bounds.outputs)
    if verdict.passed and ran.repeated:
        again = judge(_compared(ran.again, trial, ran.repeated), bounds.outputs)
        sizes = and_listed(sorted(set(ran.batches)))
        findings = tuple(f"Wrong in some of the batches of {sizes} only: {text}" for text in again.findings)
        verdict = Verdict(again.passed, findings)
    return RunResult(level, ran.what, ran.batches, comparison, bounds, verdict, answers, ran.left_out, logits)


def _compared(outputs: Mapping[str, Array], trial: EvaluationSet, images: Sequence[int]) -> Comparison:
    chosen = list(images)
    expected, dtypes = expected_outputs(trial.logits[chosen], trial.outputs), promised_dtypes(trial.outputs)
    names = tuple(trial.names[index] for index in chosen)
    return compare_outputs(expected, outputs, image_names=names, dtypes=dtypes)


def and_listed(sizes: Sequence[int]) -> str:
    """Sizes as a sentence has them: 1, 8 and 32."""
    *others, last = map(str, sizes)
    return f"{', '.join(others)} and {last}" if others else last


def in_runtime(ran: str) -> str:
    """Where a graph runs on a CPU, in words."""
    return f"{ran} in {NAME}"


def _examine(
    form: CpuExecution,
    graph: Path | bytes,
    trial: EvaluationSet,
    bounds: Bounds,
    ran: str,
    watch: Watch | None = None,
    *,
    in_others: bool,
) -> RunResult:
    others = ExtraBatches.of(graph, trial) if in_others else ExtraBatches(())
    try:
        with opened(form, graph, None, watch, max(trial.batch.min, LARGEST_BATCH, *others.sizes)) as runner:
            found = _run(runner, trial, graph_batches(len(trial), trial.batch), in_runtime(ran))
            found = _in_other(runner, others, found, trial)
            return dataclasses.replace(run_result(Level.GRAPH, found, trial, bounds), inside=runner.seen)
    except UsageError as error:  # onnxruntime refused the graph
        _check_runtime(graph)
        return run_result(Level.GRAPH, RunOutputs(in_runtime(ran), problem=error.message), trial, bounds)


def _check_runtime(graph: Path | bytes) -> None:
    """UnavailableError where a graph is not at fault: this ONNX Runtime is older than its opset or its IR version."""
    import onnxruntime

    needs, here = GraphNeeds.of(graph), runtimes().onnxruntime(onnxruntime.__version__)
    if needs is None or here is None:
        return
    if misfit := here.misfit(dataclasses.replace(needs, bfloat16=frozenset()), on_gpu=False):
        raise UnavailableError(f"{misfit}.", "pip install --upgrade onnxruntime")


def _run_and_judge(runner: Runner, level: Level, trial: EvaluationSet, bounds: Bounds, ran: str) -> RunResult:
    """In every batch of the profile."""
    sizes = profile_batches(len(trial), trial.batch)
    return run_result(level, _run(runner, trial, sizes, f"{ran} in {runner.name}"), trial, bounds)


def _run(runner: Runner, trial: EvaluationSet, sizes: tuple[int, ...], what: str) -> RunOutputs:
    if problem := _input_problem(runner.input_specs, trial.inputs(0, 1)):
        return RunOutputs(what, problem=problem)
    count = len(trial)
    images = repeating(count, sum(sizes))
    outputs = _outputs(runner, trial, images, sizes)
    if isinstance(outputs, str):
        return RunOutputs(what, problem=outputs)
    first, again = (
        {name: array[part] for name, array in outputs.items()} for part in (slice(count), slice(count, None))
    )
    return RunOutputs(what, sizes, first, repeated=images[count:], again=again)


def _in_other(runner: Runner | None, others: ExtraBatches, ran: RunOutputs, trial: EvaluationSet) -> RunOutputs:
    if ran.problem or runner is None or not others.sizes:
        return ran if ran.problem else dataclasses.replace(ran, left_out=others.left_out)
    images = repeating(min(len(trial), _REPEATED), sum(others.sizes))
    again = _outputs(runner, trial, images, others.sizes)
    if isinstance(again, str):
        return RunOutputs(ran.what, problem=again)
    return RunOutputs(ran.what, (*ran.batches, *others.sizes), ran.outputs, "", images, again, others.left_out)


def _outputs(
    runner: Runner, trial: EvaluationSet, images: tuple[int, ...], sizes: tuple[int, ...]
) -> dict[str, Array] | str:
    """Outputs of the images in batches of these sizes, or why there are none, in a sentence."""
    parts: list[Mapping[str, Array]] = []
    rest = iter(images)
    for size in sizes:
        try:
            parts.append(runner.run({INPUT: _inputs(trial, tuple(itertools.islice(rest, size)))}))
        except Exception as error:  # runtimes raise what they like for a graph that fails at some batch
            return problem_of(error)
        if problem := _row_problem(parts[-1], size):
            return problem
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _inputs(trial: EvaluationSet, chosen: tuple[int, ...]) -> Array:
    """Inputs of some images; neighbours are taken together."""
    starts = [place for place, index in enumerate(chosen) if place == 0 or index != chosen[place - 1] + 1]
    runs = [chosen[start:stop] for start, stop in itertools.zip_longest(starts, starts[1:])]
    return np.ascontiguousarray(np.concatenate([trial.inputs(run[0], run[-1] + 1) for run in runs]))


def _row_problem(outputs: Mapping[str, Array], size: int) -> str:
    """Which output has not one row an image, in a sentence; empty where each has."""
    wrong = (
        f"Output '{name}' has shape {value.shape}" for name, value in outputs.items() if value.shape[:1] != (size,)
    )
    found = next(wrong, "")
    return f"{found} for a batch of {size}." if found else ""


def _input_problem(specs: Mapping[str, TensorSpec], example: Array) -> str:
    """Why it cannot be fed, in a sentence; empty where it can."""
    wanted = f"{INPUT} {example.dtype} {_shown((None, *example.shape[1:]))}"
    spec = specs.get(INPUT)
    fits = (
        len(specs) == 1
        and spec is not None
        and spec.dtype == str(example.dtype)
        and len(spec.shape) == example.ndim
        and all(have in (None, want) for have, want in zip(spec.shape[1:], example.shape[1:], strict=True))
    )
    has = ", ".join(f"{name} {spec.dtype} {_shown(spec.shape)}" for name, spec in specs.items())
    return "" if fits else f"Its inputs are not the bundle's: it has {has or 'none'}; the bundle has {wanted}."


def _shown(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("batch" if extent is None else str(extent) for extent in shape) + ")"

"""Run a graph (ONNX Runtime) or a plan (TensorRT) on images, and compare its outputs with the reference's.

A graph can be right at one batch size and wrong at another. So the images go through in several sizes: the smallest,
the usual and the largest batch of the profile. Where there are too few images they are repeated in another order, which
shows an engine that mixes up images of a batch.
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

from spach_deploy.bundle.inputs import Batch, feeds_of, joined
from spach_deploy.bundle.outputs import expected_outputs, of_role, promised_dtypes, roles_of
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.common.errors import MismatchError, SpachError, UnavailableError, UsageError
from spach_deploy.graph.runtimes import GraphNeeds, runtimes
from spach_deploy.options.specs import BatchProfile, Flavour, Precision, Role
from spach_deploy.runtime import Runner, TensorSpec, onnxruntime_runner
from spach_deploy.runtime.onnxruntime_runner import NAME, OnnxRuntimeRunner, saved_graph
from spach_deploy.runtime.tensorrt_runner import TensorRTRunner
from spach_deploy.validation.accuracy import ImagePredictions, notable_predictions
from spach_deploy.validation.compare import Comparison, compare_outputs
from spach_deploy.validation.tolerance import Bounds
from spach_deploy.validation.verdict import Verdict, judge

if TYPE_CHECKING:
    import onnx_ir as ir

Array = npt.NDArray[Any]

Watch = Callable[["ir.Model"], Collection[str]]
"""Chooses tensors of a graph, as it will run, whose values are wanted."""

LARGEST_BATCH = 3
"""Batch size on a CPU where the size does not matter. Larger ones gain nothing on a few cores and take memory."""

_REPEATED = 8
"""Number of images that fill the profile's other batches."""

_MEMORY_SHARE = 0.5
"""Share of the free memory that the largest batch on a CPU may take."""

_MOST_AT_ONCE = 512
"""Largest batch on a CPU: the smallest model takes half a minute for it. By memory alone it could take hours."""

_RUNTIME_OVERHEAD = 2.0
"""A CPU's memory for a batch, over that of the tensors that are live at once (measured 1.6: ms_hybrid_s in FP16)."""

_WRONG_IN_SOME = "Wrong in some of the batches of"

EXPORT_MACS = 50e9
"""Multiply-adds that an export may spend on one batch on a CPU (half a second). `spach-validate` runs larger ones."""


class Level(str, enum.Enum):
    """The level of evidence: `engine`, the plan itself ran; `graph`, the typed graph that it was built from."""

    ENGINE = "engine"
    GRAPH = "graph"


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Images with the reference's outputs.

    `inputs(start, stop)`: engine inputs of some images. `expected`: what the reference computed, float32 (N, ...) by
    name. `images`, `reference`: in words, what the images are and what computed that. `outputs`: those of the graph.
    """

    inputs: Callable[[int, int], Batch] = dataclasses.field(repr=False)
    expected: Mapping[str, npt.NDArray[np.float32]] = dataclasses.field(repr=False)
    names: tuple[str, ...] = dataclasses.field(repr=False)
    images: str
    reference: str
    outputs: tuple[TensorInfo, ...]
    batch: BatchProfile = dataclasses.field(default_factory=BatchProfile)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def logits(self) -> npt.NDArray[np.float32] | None:
        """The reference's logits (N, classes); None where the graph has none."""
        return self.logits_of(self.expected)

    def logits_of(self, outputs: Mapping[str, Array]) -> Array | None:
        """The logits among outputs of the graph."""
        tensor = of_role(self.outputs, Role.LOGITS)
        return None if tensor is None else outputs.get(tensor.name)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One run, compared with the reference.

    `ran`: what ran, in words. `batches`: the batch sizes that ran; `left_out`: a sentence about one that did not.
    `answers`: images whose class changed, or nearly. `outputs` (N, ...): by name, empty where the run gave none.
    `activations`: tensors (1, ...) for the first image that a `Watch` chose.
    """

    level: Level
    ran: str
    batches: tuple[int, ...]
    comparison: Comparison
    bounds: Bounds
    verdict: Verdict
    answers: tuple[ImagePredictions, ...] = ()
    left_out: str = ""
    outputs: Mapping[str, Array] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    activations: Mapping[str, Array] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether everything agrees."""
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

    Rounded, what overflows on a GPU overflows here too. A bfloat16 graph runs on a CPU only in this way.
    """

    PLAIN = "typed graph"
    ROUNDED = "typed graph, every half tensor rounded"


def executions_of(precision: Precision) -> tuple[CpuExecution, ...]:
    """The executions that a graph of this precision needs on a CPU.

    ONNX Runtime computes FP16 mostly in FP32, which hides overflow. So FP16 graphs run a second time with every half
    tensor rounded. BF16 graphs run only that way.
    """
    plain = () if precision is Precision.BF16 else (CpuExecution.PLAIN,)
    return plain if precision is Precision.FP32 else (*plain, CpuExecution.ROUNDED)


def executions_here(graph: Path | bytes, precision: Precision) -> tuple[CpuExecution, ...]:
    """`executions_of` this precision, without the plain one where the installed ONNX Runtime computes the graph
    wrongly.
    """
    executions = executions_of(precision)
    return (
        executions
        if truncated_by(graph, precision) is None
        else tuple(execution for execution in executions if execution is not CpuExecution.PLAIN)
    )


def truncated_by(graph: Path | bytes, precision: Precision) -> str | None:
    """Version of the installed ONNX Runtime, where it truncates in this graph what it should round; else None."""
    version = onnxruntime_runner.truncating_runtime() if precision is Precision.FP16 else None
    return version if version is not None and _quantizes_fp16(graph) else None


def truncation_notes(graph: Path | bytes, precision: Precision) -> tuple[str, ...]:
    """Notes for a report about a graph that the installed ONNX Runtime computes wrongly; else empty."""
    version = truncated_by(graph, precision)
    if version is None:
        return ()
    judged_by = "In it this graph is wrong, so it was judged in FP32 with every half tensor rounded"
    return (f"{onnxruntime_runner.fault_of(version)}. {judged_by}. {onnxruntime_runner.REMEDY}",)


def _quantizes_fp16(graph: Path | bytes) -> bool:
    import onnx
    import onnx_ir as ir

    from spach_deploy.graph.precision.formats import quantizes_fp16

    try:
        model = onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else onnx.load_from_string(graph)
        return quantizes_fp16(ir.from_proto(model))
    except Exception:  # an external graph may hold anything; running it says what
        return False


@dataclasses.dataclass(frozen=True)
class RunOutputs:
    """What a run returned.

    `outputs` of all images by name; or `problem`, a sentence that says why there are none. `again`: outputs of the
    images with the numbers `repeated`, which filled other batches. `left_out`: a sentence about a batch of the profile
    that did not run.
    """

    what: str
    batches: tuple[int, ...] = ()
    outputs: Mapping[str, Array] = dataclasses.field(default_factory=dict, repr=False)
    problem: str = ""
    repeated: tuple[int, ...] = ()
    again: Mapping[str, Array] = dataclasses.field(default_factory=dict, repr=False)
    left_out: str = ""


def examine_graph(
    graph: Path | bytes, eval_set: EvaluationSet, bounds: Bounds, *, what: str = CpuExecution.PLAIN.value
) -> RunResult:
    """Run an ONNX graph in ONNX Runtime and compare it.

    A graph that does not load, takes other inputs, or fails during the run gives a result that did not pass. Raises
    UnavailableError where ONNX Runtime is missing or has no kernel for a node.
    """
    return _examine(CpuExecution.PLAIN, graph, eval_set, bounds, what, batches=ExtraBatches.of(graph, eval_set))


@contextlib.contextmanager
def opened(
    execution: CpuExecution,
    graph: Path | bytes,
    threads: int | None,
    watch: Watch | None = None,
    max_batch: int = LARGEST_BATCH,
) -> Iterator[OnnxRuntimeRunner]:
    """The graph open in ONNX Runtime. UsageError where it does not load or cannot be rounded."""
    open_in = functools.partial(OnnxRuntimeRunner, threads=threads, is_brief=True, max_batch=max_batch)
    with contextlib.ExitStack() as stack:
        if execution is CpuExecution.PLAIN and watch is None:
            yield stack.enter_context(open_in(graph))
            return
        with _saved_execution(execution, graph, watch) as (path, inner):
            runner = stack.enter_context(open_in(path, inner=inner))
        yield runner


@contextlib.contextmanager
def _saved_execution(
    execution: CpuExecution, graph: Path | bytes, watch: Watch | None
) -> Iterator[tuple[Path, list[str]]]:
    """A file with the graph as it will run, and the extra outputs that `watch` chose."""
    import onnx
    import onnx_ir as ir

    from spach_deploy.graph.editing import made_values, name_of
    from spach_deploy.graph.precision.rounding import check_runtime_rounds, rounded_graph

    if execution is CpuExecution.ROUNDED:
        check_runtime_rounds()
    try:
        model = ir.from_proto(onnx.load(graph) if isinstance(graph, Path) else onnx.load_from_string(graph))
        model = rounded_graph(model) if execution is CpuExecution.ROUNDED else model
    except Exception as error:  # an external graph may hold anything
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
    eval_set: EvaluationSet,
    bounds: Bounds,
    *,
    watch: Watch | None = None,
    most_macs: float | None = None,
) -> tuple[RunResult, ...]:
    """Run a typed graph in every execution that the installed ONNX Runtime computes rightly, and compare each.

    Only the first also runs the profile's other batches: whether images are mixed up does not depend on rounding. The
    last one, with the most roundings, has the tensors that `watch` chose in `RunResult.activations`.

    `most_macs`: in an export, multiply-adds that the largest batch may take. Its images run in the profile's batches
    alone. Otherwise images run in small batches, which a cluster can share, and a few of them in the others.
    """
    first, *rest = executions_here(graph, precision)
    batches = {first: ExtraBatches.of(graph, eval_set, most_macs)}
    watched = {(first, *rest)[-1]: watch}
    return tuple(
        _examine(
            *(execution, graph, eval_set, bounds, execution.value, watched.get(execution), batches.get(execution)),
            is_export=most_macs is not None,
        )
        for execution in (first, *rest)
    )


def examine_engine(plan: bytes, flavour: Flavour, eval_set: EvaluationSet, bounds: Bounds) -> RunResult:
    """Run a plan in TensorRT and compare it. Raises UnavailableError where it cannot run here, UsageError for no
    plan.
    """
    runner = TensorRTRunner(plan, flavour)
    with runner:
        return _run_and_judge(runner, Level.ENGINE, eval_set, bounds, "engine.plan")


def runs_here(plan: bytes, flavour: Flavour) -> bool:
    """Whether this machine can run a plan."""
    try:
        with TensorRTRunner(plan, flavour):
            return True
    except SpachError:
        return False


def examine_runner(runner: Runner, level: Level, eval_set: EvaluationSet, bounds: Bounds, what: str) -> RunResult:
    """Run an open runner, such as a model on a server, and compare it. `level`: what it proves; `what` it is, in
    words.
    """
    return _run_and_judge(runner, level, eval_set, bounds, what)


def profile_batches(count: int, profile: BatchProfile) -> tuple[int, ...]:
    """Batch sizes in which `count` images run on an engine: smallest, usual and largest of the profile, then the
    largest until all are through. Images are repeated to fill the last one.
    """
    sizes = tuple(sorted({profile.min, profile.opt, profile.max}))
    return (*sizes, *[profile.max] * -(-max(0, count - sum(sizes)) // profile.max))


def repeated_images(count: int, inputs: int) -> tuple[int, ...]:
    """Image numbers for this many inputs: all `count` in order, then again starting at the second one, and so on, so
    that no two batches have the same order.
    """
    return tuple((index + index // count) % count for index in range(inputs))


@dataclasses.dataclass(frozen=True)
class ExtraBatches:
    """Smallest, usual and largest batch of a profile, as far as memory allows, and those that a CPU does not run
    anyway.
    """

    of_profile: tuple[int, ...]
    sizes: tuple[int, ...]
    left_out: str = ""

    @classmethod
    def of(cls, graph: Path | bytes, eval_set: EvaluationSet, most_macs: float | None = None) -> ExtraBatches:
        """The batches that this machine has memory for, and a CPU has time for. `most_macs`: multiply-adds that a batch
        larger than the usual one may take.
        """
        profile, fed = eval_set.batch, graph_batches(len(eval_set), eval_set.batch)
        room, work = _room_for(graph, profile)
        most = min(profile.max, max(LARGEST_BATCH, min(room, _MOST_AT_ONCE)))
        reason = f"on a CPU {most} is the most" if room > most else f"there was memory for {most}"
        if most_macs is not None and most > profile.opt and most * work > most_macs:
            reason = f"it takes {most * work / 1e9:.0f} G multiply-adds; spach-validate runs it"
            most = max(profile.opt, LARGEST_BATCH)
        sizes = sorted({min(size, most) for size in (profile.min, profile.opt, profile.max)})
        left_out = f"A batch of {profile.max} did not run: {reason}." if most < profile.max else ""
        return cls(tuple(sizes), tuple(size for size in sizes if size not in fed), left_out)

    def whole_run(self, count: int, profile: BatchProfile) -> tuple[int, ...]:
        """Batch sizes for an export's `count` images: those of the profile, each once, then as `graph_batches`."""
        sizes = self.of_profile if self.sizes else ()
        rest = count - sum(sizes)
        return (*sizes, *graph_batches(rest, profile)) if rest > 0 else sizes


def _room_for(graph: Path | bytes, profile: BatchProfile) -> tuple[int, int]:
    """The largest batch that memory has room for (the profile's largest where that is unknown), and multiply-adds of
    one image.
    """
    import onnx
    import onnx_ir as ir

    from spach_deploy.common.machine import find_memory
    from spach_deploy.graph.editing import live_elements, macs, shapes_at_batch_one

    memory = find_memory()
    try:
        proto = onnx.load_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph, load_external_data=False)
        model = ir.from_proto(proto)
        shapes = shapes_at_batch_one(model)
        elements, work = live_elements(model, shapes), macs(model, shapes)
    except Exception:  # a graph that no reader understands; ONNX Runtime says what is wrong with it
        return profile.max, 0
    if memory is None or not elements:
        return profile.max, work
    return int(_MEMORY_SHARE * memory.available_bytes / (_RUNTIME_OVERHEAD * 4 * elements)), work


def in_other_batches(
    execution: CpuExecution, graph: Path | bytes, run: RunOutputs, eval_set: EvaluationSet
) -> RunOutputs:
    """Run a graph, which ran in small batches, in the profile's other batches too, on a few of the images."""
    others = ExtraBatches.of(graph, eval_set)
    if run.problem or not others.sizes:
        return _run_other_batches(None, others, run, eval_set)
    with opened(execution, graph, None, max_batch=max(others.sizes)) as runner:
        return _run_other_batches(runner, others, run, eval_set)


def plan_batches(count: int, profile: BatchProfile, largest: int | None = None) -> tuple[int, ...]:
    """Batch sizes for `count` images: the profile's smallest first, then its largest, which `largest` limits."""
    largest = max(profile.min, min(profile.max, profile.max if largest is None else largest))
    first = min(profile.min, count)
    rest = count - first
    whole, last = divmod(rest, largest)
    return (first, *(largest for _ in range(whole)), *((last,) if last else ()))


def graph_batches(count: int, profile: BatchProfile) -> tuple[int, ...]:
    """Batch sizes for `count` images that run through a graph on a CPU."""
    return plan_batches(count, profile, LARGEST_BATCH)


def problem_before(execution: CpuExecution, graph: Path | bytes, example: Batch) -> str:
    """Why a graph cannot run on inputs like `example`, in a sentence; empty where it can.

    Raises UnavailableError where this machine cannot tell.
    """
    try:
        with opened(execution, graph, None) as runner:
            return _input_problem(runner.input_specs, example)
    except UsageError as error:
        _check_runtime(graph)
        return error.message


def problem_of(error: Exception) -> str:
    """Why a run failed, in a sentence. Raises `error` itself where the graph is not at fault."""
    if isinstance(error, (UnavailableError, UsageError)):
        raise error
    if isinstance(error, MismatchError):
        return error.message
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"It failed while it ran: {reason}"


def run_result(level: Level, run: RunOutputs, eval_set: EvaluationSet, bounds: Bounds) -> RunResult:
    """A run's outputs compared with the reference. A run with a problem gives a result that did not pass."""
    if run.problem:
        comparison = Comparison(len(eval_set), (), (), (run.problem,))
        verdict = judge(comparison, bounds.outputs)
        return RunResult(level, run.what, (), comparison, bounds, verdict, left_out=run.left_out)
    comparison = _compared(run.outputs, eval_set, range(len(eval_set)))
    exact = eval_set.logits
    answers = () if exact is None else notable_predictions(exact, eval_set.logits_of(run.outputs), eval_set.names)
    verdict = judge(comparison, bounds.outputs)
    if verdict.passed and run.repeated:
        again = judge(_compared(run.again, eval_set, run.repeated), bounds.outputs)
        sizes = and_listed(sorted(set(run.batches)))
        findings = tuple(f"{_WRONG_IN_SOME} {sizes} only: {text}" for text in again.findings)
        verdict = Verdict(again.passed, findings)
    return RunResult(level, run.what, run.batches, comparison, bounds, verdict, answers, run.left_out, run.outputs)


def _compared(outputs: Mapping[str, Array], eval_set: EvaluationSet, images: Sequence[int]) -> Comparison:
    chosen = list(images)
    reference = {name: array[chosen] for name, array in eval_set.expected.items()}
    expected, dtypes = expected_outputs(reference, eval_set.outputs), promised_dtypes(eval_set.outputs)
    names = tuple(eval_set.names[index] for index in chosen)
    return compare_outputs(expected, outputs, image_names=names, dtypes=dtypes, roles=roles_of(eval_set.outputs))


def and_listed(sizes: Sequence[int]) -> str:
    """Sizes as in a sentence: 1, 8 and 32."""
    *others, last = map(str, sizes)
    return f"{', '.join(others)} and {last}" if others else last


def in_runtime(what: str) -> str:
    """What ran on a CPU, and where, in words."""
    return f"{what} in {NAME}"


def _examine(
    execution: CpuExecution,
    graph: Path | bytes,
    eval_set: EvaluationSet,
    bounds: Bounds,
    what: str,
    watch: Watch | None = None,
    batches: ExtraBatches | None = None,
    *,
    is_export: bool = False,
) -> RunResult:
    batches, count = batches or ExtraBatches((), ()), len(eval_set)
    sizes = (batches.whole_run if is_export else graph_batches)(count, eval_set.batch)
    try:
        with opened(execution, graph, None, watch, max(*sizes, *batches.sizes, 0)) as runner:
            run = _run(runner, eval_set, sizes, in_runtime(what))
            if is_export:
                run = dataclasses.replace(run, left_out=batches.left_out)
            else:
                run = _run_other_batches(runner, batches, run, eval_set)
            found = run_result(Level.GRAPH, run, eval_set, bounds)
            if is_export and batches.sizes and not (found.passed or run.problem):
                found = _with_wrong_batches(found, runner, eval_set)
            return dataclasses.replace(found, activations=runner.seen)
    except UsageError as error:  # onnxruntime refused the graph
        _check_runtime(graph)
        return run_result(Level.GRAPH, RunOutputs(in_runtime(what), problem=error.message), eval_set, bounds)


def _with_wrong_batches(found: RunResult, runner: Runner, eval_set: EvaluationSet) -> RunResult:
    """A wrong result, which says so where the same images are right in small batches."""
    small = _run(runner, eval_set, graph_batches(len(eval_set), eval_set.batch), found.ran)
    if small.problem or not run_result(found.level, small, eval_set, found.bounds).passed:
        return found
    sizes = and_listed(sorted({*found.batches, *small.batches}))
    findings = tuple(
        text if text.startswith(_WRONG_IN_SOME) else f"{_WRONG_IN_SOME} {sizes} only: {text}"
        for text in found.verdict.findings
    )
    return dataclasses.replace(found, verdict=Verdict(False, findings))


def _check_runtime(graph: Path | bytes) -> None:
    """UnavailableError where the installed ONNX Runtime is too old for the graph's opset or IR version."""
    import onnxruntime

    needs, known = GraphNeeds.of(graph), runtimes().onnxruntime(onnxruntime.__version__)
    if needs is None or known is None:
        return
    if misfit := known.misfit(needs.in_fp32(), on_gpu=False):
        raise UnavailableError(f"{misfit}.", "pip install --upgrade onnxruntime")


def _run_and_judge(runner: Runner, level: Level, eval_set: EvaluationSet, bounds: Bounds, what: str) -> RunResult:
    """Run all batches of the profile and compare."""
    sizes = profile_batches(len(eval_set), eval_set.batch)
    return run_result(level, _run(runner, eval_set, sizes, f"{what} in {runner.name}"), eval_set, bounds)


def _run(runner: Runner, eval_set: EvaluationSet, sizes: tuple[int, ...], what: str) -> RunOutputs:
    if problem := _input_problem(runner.input_specs, eval_set.inputs(0, 1)):
        return RunOutputs(what, problem=problem)
    count = len(eval_set)
    images = repeated_images(count, sum(sizes))
    outputs = _outputs(runner, eval_set, images, sizes)
    if isinstance(outputs, str):
        return RunOutputs(what, problem=outputs)
    first, again = (
        {name: array[part] for name, array in outputs.items()} for part in (slice(count), slice(count, None))
    )
    return RunOutputs(what, sizes, first, repeated=images[count:], again=again)


def _run_other_batches(
    runner: Runner | None, others: ExtraBatches, run: RunOutputs, eval_set: EvaluationSet
) -> RunOutputs:
    if run.problem or runner is None or not others.sizes:
        return run if run.problem else dataclasses.replace(run, left_out=others.left_out)
    images = repeated_images(min(len(eval_set), _REPEATED), sum(others.sizes))
    again = _outputs(runner, eval_set, images, others.sizes)
    if isinstance(again, str):
        return RunOutputs(run.what, problem=again)
    return RunOutputs(run.what, (*run.batches, *others.sizes), run.outputs, "", images, again, others.left_out)


def _outputs(
    runner: Runner, eval_set: EvaluationSet, images: tuple[int, ...], sizes: tuple[int, ...]
) -> dict[str, Array] | str:
    """Outputs of `images` in batches of these sizes; or a sentence that says why there are none."""
    parts: list[Mapping[str, Array]] = []
    rest = iter(images)
    for size in sizes:
        try:
            parts.append(runner.run(feeds_of(_inputs(eval_set, tuple(itertools.islice(rest, size))))))
        except Exception as error:  # runtimes raise what they like for a graph that fails at some batch
            return problem_of(error)
        if problem := _row_problem(parts[-1], size):
            return problem
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _inputs(eval_set: EvaluationSet, chosen: tuple[int, ...]) -> Batch:
    """Inputs of some images; consecutive numbers are read together."""
    starts = [position for position, index in enumerate(chosen) if position == 0 or index != chosen[position - 1] + 1]
    runs = [chosen[start:stop] for start, stop in itertools.zip_longest(starts, starts[1:])]
    return joined([eval_set.inputs(run[0], run[-1] + 1) for run in runs])


def _row_problem(outputs: Mapping[str, Array], size: int) -> str:
    """An output that has not one row for each image, in a sentence; empty without one."""
    wrong = (
        f"Output '{name}' has shape {value.shape}" for name, value in outputs.items() if value.shape[:1] != (size,)
    )
    found = next(wrong, "")
    return f"{found} for a batch of {size}." if found else ""


def _input_problem(specs: Mapping[str, TensorSpec], example: Batch) -> str:
    """Why the graph cannot take inputs like `example`, in a sentence; empty where it can."""
    given = feeds_of(example)
    if specs.keys() == given.keys() and all(_takes(specs[name], array) for name, array in given.items()):
        return ""
    wanted = ", ".join(f"{name} {array.dtype} {_shown((None, *array.shape[1:]))}" for name, array in given.items())
    has = ", ".join(f"{name} {spec.dtype} {_shown(spec.shape)}" for name, spec in specs.items())
    return f"Its inputs are not the bundle's: it has {has or 'none'}; the bundle has {wanted}."


def _takes(spec: TensorSpec, array: Array) -> bool:
    """Whether an input of this spec takes such an array, in a batch of any size."""
    return (
        spec.dtype == str(array.dtype)
        and len(spec.shape) == array.ndim
        and all(have in (None, want) for have, want in zip(spec.shape[1:], array.shape[1:], strict=True))
    )


def _shown(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("batch" if extent is None else str(extent) for extent in shape) + ")"

"""From a checkpoint to a bundle: the visible list of stages.

    reference model -> static model -> exported graph -> typed graph -> engine.plan -> report -> bundle

Each step (`spach_deploy.pipeline.steps`) takes the result of the one before it. Three processes work beside this one:
a copy that traces what has to be traced, a copy that computes what PyTorch alone answers (the reference's logits, the
proof of the static model, the tolerances), and the one that builds the engine, beside all that can be asked of its
graph in the meantime. The FP32 graph is held to the reference in the form in which it is typed; where that is wrong,
the stages before it are asked for the first that is. What is not proven raises a `SpachError`, and nothing is
written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.bundle import store as bundles
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import MismatchError
from spach_deploy.common.files import Destination
from spach_deploy.common.progress import ExportObserver, Phases, Silent
from spach_deploy.common.threads import available_threads, torch_threads, worker_threads
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.precision.typed_graph import TypedGraph
from spach_deploy.graph.tracing import Tracing
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.command_line import export_command, validate_command
from spach_deploy.options.specs import ExportOptions
from spach_deploy.pipeline.ahead import Ahead
from spach_deploy.pipeline.steps import graph as stages
from spach_deploy.pipeline.steps import manifest as sections
from spach_deploy.pipeline.steps.engine import BuiltEngine, EngineBuild, choose_engine, engine_section, plan_of
from spach_deploy.pipeline.steps.quantization import CalibrationStep, calibrate, refuse_overlap
from spach_deploy.pipeline.steps.reference import ReferenceOutputs, answering, deriving
from spach_deploy.pipeline.steps.sensitivity import HeldOut, choose_layers, draw_sensitivity, labelled_images
from spach_deploy.quantization.calibration import Calibration
from spach_deploy.quantization.fake_quantization import fake_quantized
from spach_deploy.quantization.plan import QuantizationPlan, write_plan
from spach_deploy.report.files import load_page_modules, page_problem
from spach_deploy.runtime.onnxruntime_runner import save_model
from spach_deploy.validation.error_trace import ActivationTracer, ErrorTrace
from spach_deploy.validation.exact import ReferenceLogits
from spach_deploy.validation.provenance import Provenance
from spach_deploy.validation.report import write_report
from spach_deploy.validation.runs import EvaluationSet, RunResult, examine_typed
from spach_deploy.validation.tolerance import ToleranceSet
from spach_deploy.validation.user_answers import Agreement
from spach_deploy.validation.validate import ReportHeader, Validation, golden_set, manifest_section, validate_export

if TYPE_CHECKING:
    from spach_deploy.quantization.sensitivity import LayerSelection
    from spach_deploy.rewrites import RewriteResult
    from spach_deploy.rewrites.static_modules import StaticSpach
    from spach_deploy.runtime.beside import Beside


@dataclasses.dataclass(frozen=True)
class ReferenceModel:
    """The reference model and what it answered to the golden images."""

    loaded: LoadedModel
    photographs: stages.Photographs
    answers: ReferenceOutputs

    @property
    def logits(self) -> NDArray[np.float32]:
        """(N, classes)."""
        return self.answers.logits


@dataclasses.dataclass(frozen=True)
class QuantizationResult:
    """How it was calibrated, which layers were chosen where a bound was asked for, and the plan; nothing for other
    precisions.
    """

    stage: CalibrationStep | None = None
    choice: LayerSelection | None = None
    plan: QuantizationPlan | None = None

    def twin_of(self, static: StaticSpach) -> Callable[[], StaticSpach]:
        """What makes the model with its quantized layers rounded as planned."""
        assert self.plan is not None
        return functools.partial(fake_quantized, static, self.plan)

    def write(self, staging: Path, phases: Phases) -> None:
        """The plan and the picture of the choice, where there are such."""
        if self.plan is not None:
            write_plan(self.plan, staging / bundles.QUANTIZATION)
        if self.choice is not None and not draw_sensitivity(self.choice, staging / bundles.SENSITIVITY):
            phases.note("The plot of the layers' costs needs matplotlib: pip install 'spach-deploy[report]'.")


@dataclasses.dataclass(frozen=True)
class JudgedGraph:
    """What the typed graph computed, held against the reference."""

    trial: EvaluationSet
    tolerances: ToleranceSet
    evidence: tuple[RunResult, ...]
    trace: ErrorTrace | None

    def with_engine(self, subject: ReportHeader, engine: BuiltEngine | None, run: Provenance) -> Validation:
        """The whole: the engine too, where it runs here."""
        found = validate_export(subject, self.trial, self.evidence, plan_of(engine), self.tolerances.engine)
        return dataclasses.replace(found, trace=self.trace, run=run)


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """A finished export."""

    bundle: Bundle
    validation: Validation
    engine: BuiltEngine | None


def export(
    options: ExportOptions,
    observer: ExportObserver | None = None,
    *,
    place: Destination | None = None,
    ahead: Ahead | None = None,
) -> ExportResult:
    """Export, build, validate and write the bundle that `options` asks for. `place`: what `check_target` said of the
    target before, or another place, for somebody who moves the bundle to its target afterwards: what it says of itself
    names the target. `ahead`: what was begun before these modules were loaded.

    Raises a SpachError of the kind that fits; then nothing was written, and an earlier bundle is as it was.
    """
    phases, asked = Phases(observer or Silent()), options
    stages.check_options(options)
    flavour, options = choose_engine(options)
    with contextlib.ExitStack() as stack:
        ahead = ahead or stack.enter_context(Ahead(options.engine.flavour))
        build = stack.enter_context(EngineBuild(flavour, options, phases, ahead.builder))
        with phases.phase("load the model"):
            loaded = stages.load(options, phases)
            target = stages.target_directory(options, loaded)
            place = place or bundles.check_target(target, overwrite=options.overwrite)
        loaded, agreement = stages.hold_to_answers(loaded, options, phases)
        with phases.phase("read images"):
            photographs = stages.read_photographs(options, loaded.preprocessing, phases)
        static, answers, graph = exported(loaded, photographs, options, ahead.tracing, stack, phases)
        eight_bits = QuantizationResult()
        if options.precision.is_quantized:
            graph, answered = prove_graph(graph, photographs, answers, phases)
            eight_bits = quantize(graph, static.model, ReferenceModel(loaded, photographs, answered), options, phases)
            work = deriving(loaded, photographs, answered, options, eight_bits.twin_of(static.model))
            answers = begun(work, "derive tolerances", stack, phases)
        plan = eight_bits.plan
        with bundles.writing(place) as staging:
            with phases.phase("give the graph its form"):
                graph = stages.give_form(graph, photographs, options, plan)
                guess = start_early(graph, staging / bundles.GRAPH, build, options)
            awaited = functools.partial(reference_of, answers)
            with (
                phases.phase("measure ranges, set types"),
                stages.first_wrong_step(graph, static.model, photographs, awaited),
            ):
                typed = stages.type_precision(
                    graph, loaded, photographs, awaited, options, phases, plan=plan, guess=guess
                )
            reference = ReferenceModel(loaded, photographs, answers.result(available_threads()))
            with phases.phase("write the graph"):
                if stages.save_graph(typed, staging / bundles.GRAPH, guess):
                    build.start(staging / bundles.GRAPH)
                golden_of(reference, options).save(staging / bundles.GOLDEN)
                eight_bits.write(staging, phases)
            with build.finishing(typed.policy, plan, staging) as finished:
                judged = judge_graph(staging / bundles.GRAPH, reference, answers, options, phases)
                with phases.phase("wait for the engine"):
                    engine = finished()
            with phases.phase("validate the engine"):
                subject = subject_of(target, loaded, agreement, options)
                validation = judged.with_engine(subject, engine, validated(target))
            if not validation.passed:
                raise MismatchError(validation.failure(), "Nothing was written.")
            write_report(validation, Destination.of(staging / bundles.REPORT))
            manifest = bundles.seal(
                staging,
                {
                    **sections.tools_section(),
                    "command": export_command(named(asked, loaded)),
                    "model": sections.model_section(loaded, options),
                    "preprocessing": sections.preprocessing_section(photographs.preprocessing),
                    **sections.interface_sections(typed.interface, options),
                    "precision": sections.precision_section(typed),
                    **sections.quantization_sections(eight_bits.stage, eight_bits.choice, options),
                    "graph": sections.graph_section(static, reference.answers, graph, typed),
                    "engine": engine_section(engine, options),
                    "validation": manifest_section(validation, judged.tolerances),
                    "phases": [phase.to_dict() for phase in phases.done],
                    "notes": phases.notes,
                },
                {} if engine is None else engine.files,
            )
            if problem := page_problem(validation, manifest.content, Destination.of(staging / bundles.PAGE)):
                phases.note(problem)
    return ExportResult(Bundle.open(place.path, verify=False), validation, engine)


def exported(
    loaded: LoadedModel,
    photographs: stages.Photographs,
    options: ExportOptions,
    tracing: Tracing,
    stack: contextlib.ExitStack,
    phases: Phases,
) -> tuple[RewriteResult, Beside[ReferenceOutputs], stages.GraphStep]:
    """The static model, what PyTorch answers to the images, which is under way, and the exported graph."""
    with phases.phase("rewrite the model"):
        tracing.ask(stages.prototype(loaded, options), loaded.image_size)
        static = stages.rewrite_model(loaded, options)
    answers = begun(answering(loaded, static.model, photographs, options), "run the reference", stack, phases)
    with phases.phase("hash, load modules"):  # while the model is traced
        _ = loaded.weights_sha256
        stages.load_runtime()
        load_page_modules()
    with phases.phase("export the graph"), torch_threads(worker_threads(answers.is_under_way)):
        return static, answers, stages.export_graph(static.model, loaded.image_size, tracing.answer())


def begun(
    work: Beside[ReferenceOutputs], name: str, stack: contextlib.ExitStack, phases: Phases
) -> Beside[ReferenceOutputs]:
    """The work, under way in a copy of this process until the stack is left; or done, where no copy can be made."""
    stack.enter_context(work)
    if not work.is_under_way:
        with phases.phase(name):
            work.result(available_threads())
    return work


def reference_of(answers: Beside[ReferenceOutputs]) -> ReferenceLogits:
    """The reference's logits, when they have come."""
    return answers.result(available_threads()).reference


def start_early(graph: stages.GraphStep, path: Path, build: EngineBuild, options: ExportOptions) -> TypedGraph | None:
    """Begin to build the graph as it will be typed if every range fits, which mostly is so, written to `path`."""
    if not build.is_wanted or options.precision.is_quantized:
        return None
    guess = stages.guess_types(graph, options)
    if guess is not None:
        save_model(guess.model, path)
        build.start(path)
    return guess


def prove_graph(
    graph: stages.GraphStep, photographs: stages.Photographs, answers: Beside[ReferenceOutputs], phases: Phases
) -> tuple[stages.GraphStep, ReferenceOutputs]:
    """The exported graph, proven by itself before eight bits are planned on it, and what the reference answered."""
    with phases.phase("wait for the reference"):
        answered = answers.result(available_threads())
    with phases.phase("prove the graph"):
        return stages.prove_graph(graph, photographs, answered.reference), answered


def quantize(
    graph: stages.GraphStep, static: StaticSpach, reference: ReferenceModel, options: ExportOptions, phases: Phases
) -> QuantizationResult:
    """Layers for eight bits: all that the rules choose, or those that keep the bound that was asked for."""
    stage, choice = calibrated(graph, reference, options, phases), None
    if options.quantization.is_bounded:
        with phases.phase("choose the layers"):
            stage, choice = choose_layers(stage, static, held_out_images(reference, options, phases), options, phases)
    return QuantizationResult(stage, choice, dataclasses.replace(stage.plan, vnni=options.quantization.vnni))


def judge_graph(
    graph: Path,
    reference: ReferenceModel,
    answers: Beside[ReferenceOutputs],
    options: ExportOptions,
    phases: Phases,
) -> JudgedGraph:
    """Run the typed graph, and hold it to the tolerances, which are there by now; the engine may be under way."""
    derived = answers.result(available_threads()).bounds()
    if answers.seconds is not None:
        phases.record("reference, bounds (alongside)", answers.seconds)
    with phases.phase("validate the graph"):
        trial, along = evaluation_set(reference, options), ActivationTracer(reference.loaded.model, derived.parts)
        bounds = derived.tolerances.graph
        evidence = examine_typed(graph, options.rest, trial, bounds, watch=along.watch)
        trace = along.trace(evidence[-1], reference.photographs.names[0])
    return JudgedGraph(trial, derived.tolerances, evidence, trace)


def named(options: ExportOptions, loaded: LoadedModel) -> ExportOptions:
    """The options with the model's name, where it was inferred from a checkpoint."""
    return dataclasses.replace(options, model=dataclasses.replace(options.model, name=loaded.name))


def validated(target: Path) -> Provenance:
    """How to validate the bundle again."""
    return Provenance.here(validate_command(str(target)))


def subject_of(target: Path, loaded: LoadedModel, agreement: Agreement | None, options: ExportOptions) -> ReportHeader:
    """The export's facts for the head of its report."""
    is_demo = loaded.origin == "demo"
    return ReportHeader(str(target), loaded.name, options.precision.value, is_demo, loaded.settings, agreement)


def golden_of(reference: ReferenceModel, options: ExportOptions) -> Golden:
    """The golden pack: inputs as the engine's caller sends them, and the reference's logits."""
    photographs = reference.photographs
    return Golden(photographs.engine_input(options.outputs.io_dtype), reference.logits, photographs.names)


def evaluation_set(reference: ReferenceModel, options: ExportOptions) -> EvaluationSet:
    """The golden pack as a trial."""
    golden = golden_of(reference, options)
    trial = golden_set(golden, reference.photographs.source.description, options.outputs, options.engine.batch)
    return dataclasses.replace(trial, reference="PyTorch in FP32")


def calibrate_to_file(
    options: ExportOptions, file: Path | Destination, observer: ExportObserver | None = None
) -> Calibration:
    """Calibrate as an export with `options` would, and keep the result in `file` for later exports.

    A file that is there already is kept where it fits these options and images; UsageError names what differs, unless
    `options.overwrite`. A run that was killed is continued. Raises a SpachError of the kind that fits.
    """
    phases = Phases(observer or Silent())
    stages.check_options(options)
    place = file if isinstance(file, Destination) else Destination.of(file)
    cache = dataclasses.replace(options.quantization, cache=place)
    options = dataclasses.replace(options, quantization=cache)
    with phases.phase("load the model"):
        loaded = stages.load(options, phases)
    with phases.phase("read images"):
        photographs = stages.read_photographs(options, loaded.preprocessing, phases)
    with contextlib.ExitStack() as stack:
        tracing = stack.enter_context(Tracing())
        _, answers, graph = exported(loaded, photographs, options, tracing, stack, phases)
        graph, answered = prove_graph(graph, photographs, answers, phases)
    return calibrated(graph, ReferenceModel(loaded, photographs, answered), options, phases).calibration


def calibrated(
    graph: stages.GraphStep, reference: ReferenceModel, options: ExportOptions, phases: Phases
) -> CalibrationStep:
    """Which layers go into eight bits, with which scales."""
    loaded, photographs = reference.loaded, reference.photographs
    with phases.phase("calibrate"):
        assert isinstance(graph.model, ir.Model)
        quantized = calibrate(as_proto(graph.model), loaded, photographs.preprocessing, options, phases)
        refuse_overlap(quantized, [photographs.pixels], photographs.names, options, phases)
    return quantized


def held_out_images(reference: ReferenceModel, options: ExportOptions, phases: Phases) -> HeldOut:
    """Images to judge layers on: labelled ones for --max-drop, else those that the export is judged on."""
    photographs = reference.photographs
    if options.quantization.max_drop is not None:
        return labelled_images(reference.loaded, photographs.preprocessing, options, phases.note)
    return HeldOut(photographs.images, reference.logits)

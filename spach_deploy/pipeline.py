"""From a checkpoint to a bundle: the visible list of stages.

    reference model -> static model -> exported graph -> typed graph -> engine.plan -> report -> bundle

Each stage (`spach_deploy.stages`) takes the result of the one before it. Three processes work beside this one: a copy
that traces what has to be traced, a copy that computes what PyTorch alone answers (the reference's logits, the proof of
the static model, the tolerances), and the one that builds the engine, beside all that can be asked of its graph in the
meantime. The FP32 graph is held to the reference in the form in which it is typed; where that is wrong, the stages
before it are asked for the first that is. What is not proven raises a `SpachError`, and nothing is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spach_deploy import bundle as bundles
from spach_deploy import manifest as sections
from spach_deploy import stages
from spach_deploy.ahead import Ahead
from spach_deploy.bundle import Bundle
from spach_deploy.command_lines import ValidateWords, export_command, validate_command
from spach_deploy.errors import MismatchError
from spach_deploy.files import Place
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.onnx_graph.tracing import Tracing
from spach_deploy.phases import Observer, Phases, Silent
from spach_deploy.precision.half import TypedGraph
from spach_deploy.quantization.calibrate import Calibration
from spach_deploy.quantization.plan import QuantizationPlan, write_plan
from spach_deploy.quantization.twin import quantized_twin
from spach_deploy.report.files import load_page_modules, page_problem
from spach_deploy.runtime.saved_graph import save_model
from spach_deploy.runtime.threads import available_threads, threads_beside, torch_threads
from spach_deploy.specs import ExportOptions
from spach_deploy.stages_engine import BuiltEngine, EngineBuild, choose_engine, engine_section, plan_of
from spach_deploy.stages_quantization import QuantizationStage, calibrate, refuse_overlap
from spach_deploy.stages_reference import Answers, answering, deriving
from spach_deploy.stages_sensitivity import HeldOut, choose_layers, draw_sensitivity, labelled_images
from spach_deploy.validation.answers_file import Agreement
from spach_deploy.validation.evidence import Evidence, Trial, examine_typed
from spach_deploy.validation.exact import ReferenceLogits
from spach_deploy.validation.reference import Golden
from spach_deploy.validation.report import write_report
from spach_deploy.validation.run import Run
from spach_deploy.validation.tolerance import ToleranceSet
from spach_deploy.validation.trace import Along, Trace
from spach_deploy.validation.validate import (
    Subject,
    Validation,
    golden_trial,
    manifest_section,
    validate_export,
)

if TYPE_CHECKING:
    from spach_deploy.quantization.sensitivity import Choice
    from spach_deploy.rewrites import RewriteResult
    from spach_deploy.rewrites.static_modules import StaticSpach
    from spach_deploy.runtime.beside import Beside


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference model and what it answered to the golden images."""

    loaded: LoadedModel
    photographs: stages.Photographs
    answers: Answers

    @property
    def logits(self) -> NDArray[np.float32]:
        """(N, classes)."""
        return self.answers.logits


@dataclasses.dataclass(frozen=True)
class EightBits:
    """How it was calibrated, which layers were chosen where a bound was asked for, and the plan; nothing for other
    precisions.
    """

    stage: QuantizationStage | None = None
    choice: Choice | None = None
    plan: QuantizationPlan | None = None

    def twin_of(self, static: StaticSpach) -> Callable[[], StaticSpach]:
        """What makes the model with its quantized layers rounded as planned."""
        assert self.plan is not None
        return functools.partial(quantized_twin, static, self.plan)

    def write(self, staging: Path, phases: Phases) -> None:
        """The plan and the picture of the choice, where there are such."""
        if self.plan is not None:
            write_plan(self.plan, staging / bundles.QUANTIZATION)
        if self.choice is not None and not draw_sensitivity(self.choice, staging / bundles.SENSITIVITY):
            phases.note("The plot of the layers' costs needs matplotlib: pip install 'spach-deploy[report]'.")


@dataclasses.dataclass(frozen=True)
class JudgedGraph:
    """What the typed graph computed, held against the reference."""

    trial: Trial
    tolerances: ToleranceSet
    evidence: tuple[Evidence, ...]
    trace: Trace | None

    def with_engine(self, subject: Subject, engine: BuiltEngine | None, run: Run) -> Validation:
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
    observer: Observer | None = None,
    *,
    place: Place | None = None,
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
        eight_bits = EightBits()
        if options.precision.is_quantized:
            graph, answered = prove_graph(graph, photographs, answers, phases)
            eight_bits = quantize(graph, static.model, Reference(loaded, photographs, answered), options, phases)
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
                stages.first_wrong_stage(graph, static.model, photographs, awaited),
            ):
                typed = stages.type_precision(
                    graph, loaded, photographs, awaited, options, phases, plan=plan, guess=guess
                )
            reference = Reference(loaded, photographs, answers.result(available_threads()))
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
            write_report(validation, Place.of(staging / bundles.REPORT))
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
            if problem := page_problem(validation, manifest.content, Place.of(staging / bundles.PAGE)):
                phases.note(problem)
    return ExportResult(Bundle.open(place.path, verify=False), validation, engine)


def exported(
    loaded: LoadedModel,
    photographs: stages.Photographs,
    options: ExportOptions,
    tracing: Tracing,
    stack: contextlib.ExitStack,
    phases: Phases,
) -> tuple[RewriteResult, Beside[Answers], stages.GraphStage]:
    """The static model, what PyTorch answers to the images, which is under way, and the exported graph."""
    with phases.phase("rewrite the model"):
        tracing.ask(stages.prototype(loaded, options), loaded.image_size)
        static = stages.rewrite_model(loaded, options)
    answers = begun(answering(loaded, static.model, photographs, options), "run the reference", stack, phases)
    with phases.phase("hash, load modules"):  # while the model is traced
        _ = loaded.weights_sha256
        stages.load_runtime()
        load_page_modules()
    with phases.phase("export the graph"), torch_threads(threads_beside(answers.is_under_way)):
        return static, answers, stages.export_graph(static.model, loaded.image_size, tracing.answer())


def begun(work: Beside[Answers], name: str, stack: contextlib.ExitStack, phases: Phases) -> Beside[Answers]:
    """The work, under way in a copy of this process until the stack is left; or done, where no copy can be made."""
    stack.enter_context(work)
    if not work.is_under_way:
        with phases.phase(name):
            work.result(available_threads())
    return work


def reference_of(answers: Beside[Answers]) -> ReferenceLogits:
    """The reference's logits, when they have come."""
    return answers.result(available_threads()).reference


def start_early(graph: stages.GraphStage, path: Path, build: EngineBuild, options: ExportOptions) -> TypedGraph | None:
    """Begin to build the graph as it will be typed if every range fits, which mostly is so, written to `path`."""
    if not build.is_wanted or options.precision.is_quantized:
        return None
    guess = stages.guess_types(graph, options)
    if guess is not None:
        save_model(guess.model, path)
        build.start(path)
    return guess


def prove_graph(
    graph: stages.GraphStage, photographs: stages.Photographs, answers: Beside[Answers], phases: Phases
) -> tuple[stages.GraphStage, Answers]:
    """The exported graph, proven by itself before eight bits are planned on it, and what the reference answered."""
    with phases.phase("wait for the reference"):
        answered = answers.result(available_threads())
    with phases.phase("prove the graph"):
        return stages.prove_graph(graph, photographs, answered.reference), answered


def quantize(
    graph: stages.GraphStage, static: StaticSpach, reference: Reference, options: ExportOptions, phases: Phases
) -> EightBits:
    """Layers for eight bits: all that the rules choose, or those that keep the bound that was asked for."""
    stage, choice = calibrated(graph, reference, options, phases), None
    if options.quantization.is_bounded:
        with phases.phase("choose the layers"):
            stage, choice = choose_layers(stage, static, held_out_images(reference, options, phases), options, phases)
    return EightBits(stage, choice, dataclasses.replace(stage.plan, vnni=options.quantization.vnni))


def judge_graph(
    graph: Path,
    reference: Reference,
    answers: Beside[Answers],
    options: ExportOptions,
    phases: Phases,
) -> JudgedGraph:
    """Run the typed graph, and hold it to the tolerances, which are there by now; the engine may be under way."""
    derived = answers.result(available_threads()).bounds()
    if answers.seconds is not None:
        phases.record("reference, bounds (alongside)", answers.seconds)
    with phases.phase("validate the graph"):
        trial, along = trial_of(reference, options), Along(reference.loaded.model, derived.parts)
        bounds = derived.tolerances.graph
        evidence = examine_typed(graph, options.rest, trial, bounds, watch=along.watch)
        trace = along.trace(evidence[-1], reference.photographs.names[0])
    return JudgedGraph(trial, derived.tolerances, evidence, trace)


def named(options: ExportOptions, loaded: LoadedModel) -> ExportOptions:
    """The options with the model's name, where it was inferred from a checkpoint."""
    return dataclasses.replace(options, model=dataclasses.replace(options.model, name=loaded.name))


def validated(target: Path) -> Run:
    """How to validate the bundle again."""
    return Run.here(validate_command(ValidateWords(str(target))))


def subject_of(target: Path, loaded: LoadedModel, agreement: Agreement | None, options: ExportOptions) -> Subject:
    """The export's facts for the head of its report."""
    is_demo = loaded.origin == "demo"
    return Subject(str(target), loaded.name, options.precision.value, is_demo, loaded.settings, agreement)


def golden_of(reference: Reference, options: ExportOptions) -> Golden:
    """The golden pack: inputs as the engine's caller sends them, and the reference's logits."""
    photographs = reference.photographs
    return Golden(photographs.engine_input(options.outputs.io_dtype), reference.logits, photographs.names)


def trial_of(reference: Reference, options: ExportOptions) -> Trial:
    """The golden pack as a trial."""
    golden = golden_of(reference, options)
    trial = golden_trial(golden, reference.photographs.source.description, options.outputs, options.engine.batch)
    return dataclasses.replace(trial, reference="PyTorch in FP32")


def calibrate_to_file(options: ExportOptions, file: Path | Place, observer: Observer | None = None) -> Calibration:
    """Calibrate as an export with `options` would, and keep the result in `file` for later exports.

    A file that is there already is kept where it fits these options and images; UsageError names what differs, unless
    `options.overwrite`. A run that was killed is continued. Raises a SpachError of the kind that fits.
    """
    phases = Phases(observer or Silent())
    stages.check_options(options)
    place = file if isinstance(file, Place) else Place.of(file)
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
    return calibrated(graph, Reference(loaded, photographs, answered), options, phases).calibration


def calibrated(
    graph: stages.GraphStage, reference: Reference, options: ExportOptions, phases: Phases
) -> QuantizationStage:
    """Which layers go into eight bits, with which scales."""
    loaded, photographs = reference.loaded, reference.photographs
    with phases.phase("calibrate"):
        assert graph.model is not None
        quantized = calibrate(graph.model, loaded, photographs.preprocessing, options, phases)
        refuse_overlap(quantized, [photographs.pixels], photographs.names, options, phases)
    return quantized


def held_out_images(reference: Reference, options: ExportOptions, phases: Phases) -> HeldOut:
    """Images to judge layers on: labelled ones for --max-drop, else those that the export is judged on."""
    photographs = reference.photographs
    if options.quantization.max_drop is not None:
        return labelled_images(reference.loaded, photographs.preprocessing, options, phases.note)
    return HeldOut(photographs.images, reference.logits)

"""From a checkpoint to a bundle: the visible list of stages.

    reference model -> static model -> exported graph -> typed graph -> engine.plan -> report -> bundle

Each stage (`spach_deploy.stages`) takes the result of the one before it and raises a `SpachError` rather than hand on
something unproven. Tolerances are derived beside the tracing of the model, and the engine is built beside the
validation of the graph it is built from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spach_deploy import bundle as bundles
from spach_deploy import manifest as sections
from spach_deploy import stages
from spach_deploy.bundle import Bundle
from spach_deploy.command_lines import ValidateWords, export_command, validate_command
from spach_deploy.engine.build import EngineResult, RunningBuild, start_build
from spach_deploy.engine.flavours import EngineFlavour, choose_flavour
from spach_deploy.engine.network_facts import AchievedPrecision, check_achieved_precision
from spach_deploy.engine.plan_facts import PlanFacts, read_plan_facts
from spach_deploy.errors import MismatchError
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.onnx_graph.warm import exporter_loading
from spach_deploy.phases import Observer, Phases, Silent
from spach_deploy.precision.policy import PrecisionPolicy
from spach_deploy.quantization.calibrate import Calibration
from spach_deploy.quantization.plan import QuantizationPlan, write_plan
from spach_deploy.quantization.twin import quantized_twin
from spach_deploy.report.files import load_page_modules, page_problem
from spach_deploy.runtime.threads import available_threads, threads_beside_a_build, torch_threads
from spach_deploy.specs import EngineTarget, ExportOptions
from spach_deploy.stages_quantization import QuantizationStage, calibrate, refuse_overlap
from spach_deploy.stages_sensitivity import HeldOut, choose_layers, draw_sensitivity, labelled_images
from spach_deploy.stages_tolerances import deriving
from spach_deploy.validation.depth import Depth
from spach_deploy.validation.evidence import Evidence, Trial, examine_typed
from spach_deploy.validation.reference import Golden
from spach_deploy.validation.report import write_report
from spach_deploy.validation.run import Run
from spach_deploy.validation.tolerance import ToleranceSet
from spach_deploy.validation.trace import Trace, trace
from spach_deploy.validation.validate import (
    Plan,
    Subject,
    Validation,
    golden_trial,
    manifest_section,
    validate_export,
    what_runs_a_plan,
)

if TYPE_CHECKING:
    from spach_deploy.quantization.sensitivity import Choice
    from spach_deploy.runtime.beside import Beside
    from spach_deploy.stages_tolerances import Derived


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """The engine, what was checked of it and what its plan's text says."""

    result: EngineResult
    achieved: AchievedPrecision
    facts: PlanFacts | None


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference model and its logits (N, classes) of the golden images."""

    loaded: LoadedModel
    photographs: stages.Photographs
    logits: NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class JudgedGraph:
    """What the typed graph computed, held against the reference."""

    trial: Trial
    tolerances: ToleranceSet
    evidence: tuple[Evidence, ...]
    along: Trace | None

    def with_engine(self, subject: Subject, engine: BuiltEngine | None, run: Run) -> Validation:
        """The whole: the engine too, where it runs here."""
        found = validate_export(subject, self.trial, self.evidence, plan_of(engine), self.tolerances.engine)
        return dataclasses.replace(found, trace=self.along, run=run)


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """A finished export."""

    bundle: Bundle
    validation: Validation
    engine: BuiltEngine | None


def export(options: ExportOptions, observer: Observer | None = None, *, place: Path | None = None) -> ExportResult:
    """Export, build, validate and write the bundle that `options` asks for; to `place`, if that is given, for somebody
    who moves it to its target afterwards: what the bundle says of itself names the target.

    Raises a SpachError of the kind that fits; then nothing was written, and an earlier bundle is as it was.
    """
    phases, asked = Phases(observer or Silent()), options
    stages.check_options(options)
    flavour, options = choose_engine(options)
    with phases.phase("load the model"):
        loaded = stages.load(options, phases)
        target = stages.target_directory(options, loaded)
        place = place or target
        bundles.check_target(place, overwrite=options.overwrite)
    with phases.phase("read images"):
        photographs = stages.read_photographs(options, loaded.image_size, phases)
    with phases.phase("run the reference"), exporter_loading():
        reference = stages.reference_logits(loaded, photographs)
    with contextlib.ExitStack() as beside:
        derivation: Beside[Derived] | None = None
        if not options.precision.is_quantized:
            derivation = beside.enter_context(deriving(loaded, photographs, reference, options))
        threads = threads_beside(derivation is not None and derivation.is_under_way)
        with phases.phase("rewrite and prove"), torch_threads(threads):
            static = stages.rewrite_and_prove(loaded, photographs, reference, options)
        with phases.phase("export and prove the graph"), torch_threads(threads):
            graph = stages.export_graph(loaded, static, photographs, reference)
        answered = Reference(loaded, photographs, reference)
        quantized, choice = chosen(graph, static, answered, options, phases)
        plan = None if quantized is None else dataclasses.replace(quantized.plan, vnni=options.quantization.vnni)
        if plan is not None:
            twin = functools.partial(quantized_twin, static.result.model, plan)
            derivation = beside.enter_context(deriving(loaded, photographs, reference, options, twin))
        assert derivation is not None
        with phases.phase("measure ranges, set types"):
            graph = stages.give_form(graph, photographs, options, plan)
            typed = stages.type_precision(graph, loaded, photographs, reference, options, phases, plan)
        with bundles.writing(place, overwrite=options.overwrite) as staging:
            with phases.phase("write the graph"):
                stages.save_graph(typed, staging / bundles.GRAPH)
                golden_of(photographs, reference, options).save(staging / bundles.GOLDEN)
                if plan is not None:
                    write_plan(plan, staging / bundles.QUANTIZATION)
                if choice is not None and not draw_sensitivity(choice, staging / bundles.SENSITIVITY):
                    phases.note("The plot of the layers' costs needs matplotlib: pip install 'spach-deploy[report]'.")
            with building(staging / bundles.GRAPH, options, flavour, phases) as build:
                judged = judge_graph(staging / bundles.GRAPH, answered, derivation, build, options, phases)
                with phases.phase("wait for the engine"):
                    load_page_modules()
                    engine = finish(build, typed.policy, plan, staging, phases)
            with phases.phase("validate the engine"):
                subject = Subject(str(target), loaded.name, options.precision.value, loaded.origin == "demo")
                validation = judged.with_engine(subject, engine, validated(target))
            if not validation.passed:
                raise MismatchError(validation.failure(), "Nothing was written.")
            write_report(validation, staging / bundles.REPORT)
            manifest = bundles.seal(
                staging,
                {
                    **sections.tools_section(),
                    "command": export_command(named(asked, loaded)),
                    "model": sections.model_section(loaded, options),
                    "preprocessing": sections.preprocessing_section(photographs.preprocessing),
                    **sections.interface_sections(typed.interface, options),
                    "precision": sections.precision_section(typed),
                    **sections.quantization_sections(quantized, choice, options),
                    "graph": sections.graph_section(static, graph, typed),
                    "engine": engine_section(engine, options),
                    "validation": manifest_section(validation, judged.tolerances),
                    "phases": [phase.to_dict() for phase in phases.done],
                    "notes": phases.notes,
                },
            )
            if problem := page_problem(validation, manifest.content, staging / bundles.PAGE):
                phases.note(problem)
    return ExportResult(Bundle.open(place, verify=False), validation, engine)


def chosen(
    graph: stages.GraphStage, static: stages.StaticStage, reference: Reference, options: ExportOptions, phases: Phases
) -> tuple[QuantizationStage | None, Choice | None]:
    """Layers for eight bits: all that the rules choose, or those that keep the bound that was asked for."""
    loaded, photographs, logits = reference.loaded, reference.photographs, reference.logits
    quantized = calibrated(graph, loaded, photographs, options, phases)
    if quantized is None or not options.quantization.is_bounded:
        return quantized, None
    with phases.phase("choose the layers"):
        held_out = held_out_images(loaded, photographs, logits, options)
        return choose_layers(quantized, static.result.model, held_out, options, phases)


def judge_graph(
    graph: Path,
    reference: Reference,
    derivation: Beside[Derived],
    build: RunningBuild | None,
    options: ExportOptions,
    phases: Phases,
) -> JudgedGraph:
    """Run the typed graph, and hold it to the tolerances, which are there by now; the engine may be under way."""
    threads = threads_beside(build is not None)
    with phases.phase("derive tolerances"):
        derived = derivation.result(threads)
    if derivation.seconds is not None:
        phases.record("tolerances (alongside)", derivation.seconds)
    with phases.phase("validate the graph"), torch_threads(threads):
        trial = trial_of(reference.photographs, reference.logits, options)
        evidence = examine_typed(graph, options.rest, trial, derived.tolerances.graph, threads=threads)
        along = trace_depth(graph, reference.loaded, reference.photographs, options, derived.depth)
    return JudgedGraph(trial, derived.tolerances, evidence, along)


def choose_engine(options: ExportOptions) -> tuple[EngineFlavour | None, ExportOptions]:
    """The flavour that builds, and the options with its GPUs filled in; errors before any work."""
    flavour = choose_flavour(options.engine.flavour)
    if flavour is None:
        return None, options
    target = dataclasses.replace(resolved(flavour, options), flavour=flavour.flavour)
    return flavour, dataclasses.replace(options, engine=target)


def resolved(flavour: EngineFlavour, options: ExportOptions) -> EngineTarget:
    """The target with its GPUs, which must compute both the quantized layers and the rest."""
    target = flavour.resolve(options.engine, options.precision)
    return flavour.resolve(target, options.rest) if options.precision.is_quantized else target


def named(options: ExportOptions, loaded: LoadedModel) -> ExportOptions:
    """The options with the model's name, where it was inferred from a checkpoint."""
    return dataclasses.replace(options, model=dataclasses.replace(options.model, name=loaded.name))


def validated(target: Path) -> Run:
    """How to validate the bundle again."""
    return Run.here(validate_command(ValidateWords(str(target))))


def golden_of(photographs: stages.Photographs, reference: NDArray[np.float32], options: ExportOptions) -> Golden:
    """The golden pack: inputs as the engine's caller sends them, and the reference's logits."""
    return Golden(photographs.engine_input(options.outputs.io_dtype), reference, photographs.names)


def trial_of(photographs: stages.Photographs, reference: NDArray[np.float32], options: ExportOptions) -> Trial:
    """The golden pack as a trial."""
    golden = golden_of(photographs, reference, options)
    trial = golden_trial(golden, photographs.source.description, options.outputs, options.engine.batch)
    return dataclasses.replace(trial, reference="PyTorch in FP32")


def calibrate_to_file(options: ExportOptions, file: Path, observer: Observer | None = None) -> Calibration:
    """Calibrate as an export with `options` would, and keep the result in `file` for later exports.

    A file that is there already is kept where it fits these options and images; UsageError names what differs, unless
    `options.overwrite`. A run that was killed is continued. Raises a SpachError of the kind that fits.
    """
    phases = Phases(observer or Silent())
    stages.check_options(options)
    cache = dataclasses.replace(options.quantization, cache=file)
    options = dataclasses.replace(options, quantization=cache)
    with phases.phase("load the model"):
        loaded = stages.load(options, phases)
    with phases.phase("read images"):
        photographs = stages.read_photographs(options, loaded.image_size, phases)
    with phases.phase("run the reference"), exporter_loading():
        reference = stages.reference_logits(loaded, photographs)
    with phases.phase("rewrite and prove"):
        static = stages.rewrite_and_prove(loaded, photographs, reference, options)
    with phases.phase("export and prove the graph"):
        graph = stages.export_graph(loaded, static, photographs, reference)
    quantized = calibrated(graph, loaded, photographs, options, phases)
    assert quantized is not None
    return quantized.calibration


def calibrated(
    graph: stages.GraphStage,
    loaded: LoadedModel,
    photographs: stages.Photographs,
    options: ExportOptions,
    phases: Phases,
) -> QuantizationStage | None:
    """Which layers go into eight bits, with which scales; None for other precisions."""
    if not options.precision.is_quantized:
        return None
    with phases.phase("calibrate"):
        assert graph.model is not None
        quantized = calibrate(graph.model, loaded, photographs.preprocessing, options, phases)
        refuse_overlap(quantized, [photographs.pixels], photographs.names, options, phases)
    return quantized


def held_out_images(
    loaded: LoadedModel, photographs: stages.Photographs, reference: NDArray[np.float32], options: ExportOptions
) -> HeldOut:
    """Images to judge layers on: labelled ones for --max-drop, else those that the export is judged on."""
    if options.quantization.max_drop is not None:
        return labelled_images(loaded, photographs.preprocessing, options)
    return HeldOut(photographs.images, reference)


def trace_depth(
    graph: Path, loaded: LoadedModel, photographs: stages.Photographs, options: ExportOptions, depth: Depth
) -> Trace | None:
    """Errors along the network's depth, on the first image."""
    import onnx

    feed = photographs.engine_input(options.outputs.io_dtype)[:1]
    return trace(onnx.load(graph), loaded.model, feed, depth, name=photographs.names[0])


@contextlib.contextmanager
def building(
    graph: Path, options: ExportOptions, flavour: EngineFlavour | None, phases: Phases
) -> Iterator[RunningBuild | None]:
    """The engine's build, under way in another process; None with --engine none."""
    if flavour is None:
        yield None
        return
    observer = phases.observer
    with start_build(
        graph, options.engine, flavour, precision=options.precision, on_progress=observer.building
    ) as build:
        yield build


def finish(
    build: RunningBuild | None, policy: PrecisionPolicy, plan: QuantizationPlan | None, staging: Path, phases: Phases
) -> BuiltEngine | None:
    """Wait for the engine, write it, and check that the precision is the one that was asked for."""
    if build is None:
        return None
    result = build.wait()
    phases.record("engine build (alongside)", result.seconds)
    quantized = () if plan is None else plan.product_nodes
    kept = [entry.node for entry in policy.kept]
    achieved = check_achieved_precision(result.network, policy.precision, kept, quantized)
    (staging / bundles.PLAN).write_bytes(result.plan)
    log = result.log_text.replace(f"{staging}/", "")  # where it was built says nothing of where it lies
    (staging / bundles.BUILD_LOG).write_text(log, encoding="utf-8")
    for text, count in result.warnings:
        phases.note(f"The engine builder warns{'' if count == 1 else f' {count} times'}: {text}")
    return BuiltEngine(result, achieved, read_plan_facts(result.plan))


def threads_beside(is_busy: bool) -> int:
    """Threads to compute with; while other work is under way, it has a core."""
    return threads_beside_a_build() if is_busy else available_threads()


def plan_of(engine: BuiltEngine | None) -> Plan | None:
    """The plan with what is needed to run it."""
    if engine is None:
        return None
    result = engine.result
    gpus = [str(gpu) for gpu in result.gpus]
    return Plan(result.plan, result.flavour, what_runs_a_plan(result.flavour.value, result.flavour_version, gpus))


def engine_section(engine: BuiltEngine | None, options: ExportOptions) -> dict[str, Any]:
    """The manifest's engine section."""
    if engine is None:
        return sections.no_engine_section("--engine none was asked for")
    return sections.engine_section(engine.result, engine.achieved, engine.facts, options)

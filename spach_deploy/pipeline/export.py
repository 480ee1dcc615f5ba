"""The export from a checkpoint to a bundle: all its steps, in order. docs/how_it_works.md explains each of them.

Each step is a function of `pipeline.steps` that takes the results of earlier steps. Whether submitted steps run at once
or concurrently in a worker process is decided by `pipeline.scheduler`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spach_deploy.bundle import store as bundles
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import MismatchError
from spach_deploy.common.files import Destination
from spach_deploy.common.progress import ExportObserver, Phases
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.options.command_line import export_command
from spach_deploy.options.specs import ExportOptions
from spach_deploy.pipeline.scheduler import Scheduler, Sequential
from spach_deploy.pipeline.steps import manifest as sections
from spach_deploy.pipeline.steps.engine import BuiltEngine, check_engine, choose_engine, engine_section, start_engine
from spach_deploy.pipeline.steps.graph import export_graph, give_form, prove_graph, rewrite_in_float, rewrite_model
from spach_deploy.pipeline.steps.images import read_images
from spach_deploy.pipeline.steps.model import check_options, hold_to_answers, load, target_directory
from spach_deploy.pipeline.steps.precision import measure_ranges, set_types
from spach_deploy.pipeline.steps.quantize import Quantized, calibrated, quantize
from spach_deploy.pipeline.steps.reference import derive_tolerances, reference_outputs
from spach_deploy.pipeline.steps.validation import judge_engine, judge_graph
from spach_deploy.quantization.calibration import Calibration
from spach_deploy.report.page import page_problem, why_no_pages
from spach_deploy.validation.result import Validation, manifest_section, write_report


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """A finished export: the bundle, its validation, and the engine, if one was built."""

    bundle: Bundle
    validation: Validation
    engine: BuiltEngine | None


def export(
    options: ExportOptions,
    observer: ExportObserver | None = None,
    *,
    destination: Destination | None = None,
    scheduler: Scheduler | None = None,
    loaded: LoadedModel | None = None,
) -> ExportResult:
    """Export a model, build its engine, validate both, and write the bundle.

    `destination`: what `check_target` returned for the target, if that was called before; or another destination, from
    which the caller moves the bundle to its target (manifest and report name the target). `scheduler`: decides when the
    steps run; by default `Sequential`. `loaded`: the model, if it is there already.

    Raises a subclass of SpachError; nothing has been written then, and an earlier bundle is untouched.
    """
    phases, given = Phases(observer or ExportObserver()), options
    do = phases.do  # `do` and `submit` wait for the futures among a step's inputs
    check_options(options)
    flavour, options = choose_engine(options)

    loaded = do("load the model", load, options, phases, loaded)
    scheduler = scheduler_for(loaded, scheduler)
    submit = scheduler.submit
    target = target_directory(options, loaded)
    destination = destination or bundles.check_target(target, overwrite=options.overwrite)
    loaded, agreement = hold_to_answers(loaded, options, phases)
    images = do("read images", read_images, options, loaded, phases)
    static = do("rewrite the model", rewrite_model, loaded, options)
    reference = submit(reference_outputs, loaded.model, static.model, images.inputs, options)
    graph = do("export the graph", export_graph, static.model, loaded.image_size, loaded.channels, static.known)
    quantized = Quantized()
    if options.precision.is_quantized:
        graph = do("prove the graph", prove_graph, graph, images, reference)
        quantized = quantize(graph, static.model, loaded, images, reference.result(), options, phases)
        static = do("rewrite the layers in float", rewrite_in_float, static, graph, quantized.plan, options)
    tolerances = submit(
        derive_tolerances, loaded.model, static.model, images.inputs, reference, quantized.plan, options
    )
    graph = do("give the graph its form", give_form, graph, loaded, images, quantized.plan, options)
    measured = do("measure ranges", measure_ranges, graph, images, options, phases)
    typed = do("set types", set_types, measured, static.model, loaded, images, reference, quantized.plan, options)
    del graph, measured  # the typed graph holds the weights now
    with bundles.writing(destination) as staging:
        typed = do("write the graph", typed.written, staging / bundles.GRAPH)
        images.pack(reference.result().outputs, options.outputs.io_dtype).save(staging / bundles.GOLDEN)
        quantized.write(staging, phases)
        # A build that fails raises where its result is taken (`do`, below); then the staging folder is removed.
        with start_engine(staging / bundles.GRAPH, flavour, options, phases) as build:
            scheduler.started(build)
            judged = do(
                *("validate the graph", judge_graph, staging / bundles.GRAPH, loaded, images, reference),
                *(tolerances, options),
            )
            no_page = why_no_pages()  # loads what draws, while the engine is built
            engine = do("wait for the engine", check_engine, build, typed, quantized.plan, staging, phases)
        validation = do("validate the engine", judge_engine, judged, engine, target, loaded, agreement, options)
        if not validation.passed:
            raise MismatchError(validation.failure(), "Nothing was written.")
        write_report(validation, Destination.of(staging / bundles.REPORT))
        if no_page:
            phases.note(no_page)
        manifest = sections.seal(
            staging,
            {} if engine is None else engine.files,
            command=_command(given, loaded),
            model=sections.model_section(loaded, options),
            preprocessing=sections.preprocessing_section(images.preprocessing),
            interface=sections.interface_sections(
                typed.model.graph, loaded.model.outputs, options, loaded.takes.images
            ),
            precision=sections.precision_section(typed),
            quantization=sections.quantization_sections(quantized.calibration, quantized.selection, static, options),
            graph=sections.graph_section(static, reference.result(), typed, options),
            engine=engine_section(engine, options),
            validation=manifest_section(validation, judged.tolerances),
            phases=phases.done,
            notes=phases.notes,
        )
        page = Destination.of(staging / bundles.PAGE)
        if not no_page and (problem := page_problem(validation, manifest, page)):
            phases.note(problem)
    return ExportResult(Bundle.open(destination.path, verify=False), validation, engine)


def calibrate_to_file(
    options: ExportOptions,
    file: Path | Destination,
    observer: ExportObserver | None = None,
    *,
    scheduler: Scheduler | None = None,
) -> Calibration:
    """Calibrate as an export with `options` would, and write the result to `file` for later exports.

    An existing file is kept where it fits these options and images; otherwise UsageError names the difference, unless
    `options.overwrite`. A run that was killed is continued. Raises a subclass of SpachError.
    """
    phases = Phases(observer or ExportObserver())
    check_options(options)
    destination = file if isinstance(file, Destination) else Destination.of(file)
    options = dataclasses.replace(options, quantization=dataclasses.replace(options.quantization, cache=destination))
    loaded = phases.do("load the model", load, options, phases)
    images = phases.do("read images", read_images, options, loaded, phases)
    static = phases.do("rewrite the model", rewrite_model, loaded, options)
    scheduler = scheduler_for(loaded, scheduler)
    reference = scheduler.submit(reference_outputs, loaded.model, static.model, images.inputs, options)
    graph = phases.do("export the graph", export_graph, static.model, loaded.image_size, loaded.channels)
    graph = phases.do("prove the graph", prove_graph, graph, images, reference)
    return calibrated(graph, static.model, loaded, images, options, phases).calibration


def scheduler_for(loaded: LoadedModel, wanted: Scheduler | None) -> Scheduler:
    """The scheduler for a model: of a user's own module, whose classes exist in this process alone, `Sequential`."""
    return Sequential() if wanted is None or loaded.origin == "module" else wanted


def _command(options: ExportOptions, loaded: LoadedModel) -> str:
    """The command that does this export again; of a module that was given in Python, how it was called."""
    if loaded.origin == "module" and options.model.module is None:
        return f"spach_deploy.export({loaded.name}(...), ...)  # spach-export's options: {export_command(options)}"
    return export_command(_named(options, loaded))


def _named(options: ExportOptions, loaded: LoadedModel) -> ExportOptions:
    """The options with the published model's name filled in, which may have been inferred from the checkpoint."""
    if options.model.architecture is not None or loaded.name not in ARCHITECTURES:
        return options
    return dataclasses.replace(options, model=dataclasses.replace(options.model, name=loaded.name))

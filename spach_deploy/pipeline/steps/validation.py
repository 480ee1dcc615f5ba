"""Steps "validate the graph" and "validate the engine": compare both with the reference within tolerances."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spach_deploy.bundle.outputs import graph_outputs
from spach_deploy.bundle.schema import TraceEntry
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.command_line import validate_command
from spach_deploy.options.specs import ExportOptions
from spach_deploy.pipeline.steps.engine import BuiltEngine
from spach_deploy.pipeline.steps.images import GoldenImages
from spach_deploy.pipeline.steps.reference import DerivedTolerances, ReferenceOutputs
from spach_deploy.validation.error_trace import ActivationTracer
from spach_deploy.validation.result import Provenance, ReportHeader, Validation, validate_export
from spach_deploy.validation.runs import EXPORT_MACS, EvaluationSet, RunResult, examine_typed
from spach_deploy.validation.tolerance import ToleranceSet
from spach_deploy.validation.user_answers import Agreement


@dataclasses.dataclass(frozen=True)
class JudgedGraph:
    """Comparison of the typed graph with the reference."""

    images: EvaluationSet
    tolerances: ToleranceSet
    runs: tuple[RunResult, ...]
    trace: TraceEntry | None


def judge_graph(
    graph: Path,
    loaded: LoadedModel,
    images: GoldenImages,
    reference: ReferenceOutputs,
    derived: DerivedTolerances,
    options: ExportOptions,
) -> JudgedGraph:
    """Run the typed graph in the file `graph` on the golden images, in the batch sizes of its profile, and compare."""
    given = images.engine_input(options.outputs.io_dtype)
    outputs = graph_outputs(loaded.model.outputs, options.outputs)
    evaluated = EvaluationSet(
        inputs=lambda start, stop: given[start:stop],
        expected=reference.outputs,
        names=images.names,
        images=images.source.description,
        reference="PyTorch in FP32",
        outputs=outputs,
        batch=options.engine.batch,
    )
    expected = dataclasses.replace(reference.activations, rounding_errors=derived.rounding_errors)
    tracer = ActivationTracer(loaded.model, expected)
    bounds = derived.tolerances.graph
    runs = examine_typed(graph, options.rest, evaluated, bounds, watch=tracer.watch, most_macs=EXPORT_MACS)
    return JudgedGraph(evaluated, derived.tolerances, runs, tracer.trace(runs[-1], images.names[0]))


def judge_engine(
    judged: JudgedGraph,
    engine: BuiltEngine | None,
    target: Path,
    loaded: LoadedModel,
    agreement: Agreement | None,
    options: ExportOptions,
) -> Validation:
    """The whole validation: the graph's comparison, and the engine's where it can run on this machine."""
    is_demo, is_own = loaded.origin == "demo", loaded.origin == "module"
    precision = options.precision.value
    header = ReportHeader(str(target), loaded.name, precision, is_demo, loaded.settings, agreement, is_own)
    plan = None if engine is None else engine.plan
    validation = validate_export(header, judged.images, judged.runs, plan, judged.tolerances.engine)
    provenance = Provenance.here(validate_command(str(target)))
    return dataclasses.replace(validation, trace=judged.trace, run=provenance)

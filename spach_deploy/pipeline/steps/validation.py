"""Hold what was exported against the reference: the typed graph, and the engine where it runs here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.command_line import validate_command
from spach_deploy.options.specs import ExportOptions
from spach_deploy.pipeline.steps.engine import BuiltEngine
from spach_deploy.pipeline.steps.images import GoldenImages
from spach_deploy.pipeline.steps.reference import DerivedTolerances, ReferenceOutputs
from spach_deploy.validation.error_trace import ActivationTracer, ErrorTrace
from spach_deploy.validation.result import Provenance, ReportHeader, Validation, golden_set, validate_export
from spach_deploy.validation.runs import EvaluationSet, RunResult, examine_typed
from spach_deploy.validation.tolerance import ToleranceSet
from spach_deploy.validation.user_answers import Agreement


@dataclasses.dataclass(frozen=True)
class JudgedGraph:
    """What the typed graph computed, held against the reference."""

    images: EvaluationSet
    tolerances: ToleranceSet
    runs: tuple[RunResult, ...]
    trace: ErrorTrace | None


def judge_graph(
    graph: Path,
    loaded: LoadedModel,
    images: GoldenImages,
    reference: ReferenceOutputs,
    derived: DerivedTolerances,
    options: ExportOptions,
) -> JudgedGraph:
    """The typed graph in the file `graph`, run on the golden images in every batch of its profile."""
    golden = images.pack(reference.logits, options.outputs.io_dtype)
    evaluated = golden_set(golden, images.source.description, options.outputs, options.engine.batch)
    evaluated = dataclasses.replace(evaluated, reference="PyTorch in FP32")
    tracer = ActivationTracer(loaded.model, derived.parts)
    runs = examine_typed(graph, options.rest, evaluated, derived.tolerances.graph, watch=tracer.watch)
    return JudgedGraph(evaluated, derived.tolerances, runs, tracer.trace(runs[-1], images.names[0]))


def judge_engine(
    judged: JudgedGraph,
    engine: BuiltEngine | None,
    target: Path,
    loaded: LoadedModel,
    agreement: Agreement | None,
    options: ExportOptions,
) -> Validation:
    """The whole validation: the engine too, where there is one and it runs here."""
    is_demo = loaded.origin == "demo"
    header = ReportHeader(str(target), loaded.name, options.precision.value, is_demo, loaded.settings, agreement)
    plan = None if engine is None else engine.plan
    found = validate_export(header, judged.images, judged.runs, plan, judged.tolerances.engine)
    again = Provenance.here(validate_command(str(target)))
    return dataclasses.replace(found, trace=judged.trace, run=again)

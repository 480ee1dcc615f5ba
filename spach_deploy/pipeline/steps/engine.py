"""Step "build the engine": start the build in a process of its own, and check the finished engine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from concurrent.futures import Future
from pathlib import Path

from spach_deploy.bundle import store as bundles
from spach_deploy.bundle.schema import EngineSection
from spach_deploy.common.errors import MismatchError
from spach_deploy.common.progress import Phases
from spach_deploy.engine.build import EngineResult, start_build
from spach_deploy.engine.flavours import EngineFlavour, choose_flavour
from spach_deploy.engine.network_facts import AchievedPrecision, check_achieved_precision
from spach_deploy.engine.plan_facts import PlanFacts, read_plan_facts
from spach_deploy.options.specs import EngineTarget, ExportOptions
from spach_deploy.pipeline.steps import manifest as sections
from spach_deploy.pipeline.steps.precision import CertifiedGraph
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.validation.result import EnginePlan, what_runs_a_plan


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """A checked engine. `facts`: what the text in its plan says; `files`: digests of the bundle's files so far."""

    result: EngineResult
    achieved: AchievedPrecision
    facts: PlanFacts | None
    files: bundles.FileDigests

    @property
    def plan(self) -> EnginePlan:
        """The plan's bytes, and what is needed to run them."""
        result = self.result
        gpus = [str(gpu) for gpu in result.gpus]
        return EnginePlan(
            result.plan, result.flavour, what_runs_a_plan(result.flavour.value, result.flavour_version, gpus)
        )


def choose_engine(options: ExportOptions) -> tuple[EngineFlavour | None, ExportOptions]:
    """The TensorRT flavour (None for --engine none), and the options with its GPUs filled in; before any work."""
    flavour = choose_flavour(options.engine.flavour)
    if flavour is None:
        return None, options
    target = dataclasses.replace(_resolved(flavour, options), flavour=flavour.flavour)
    return flavour, dataclasses.replace(options, engine=target)


def _resolved(flavour: EngineFlavour, options: ExportOptions) -> EngineTarget:
    """The target with its GPUs, which must support the precision of the quantized layers and of the rest."""
    target = flavour.resolve(options.engine, options.precision)
    return flavour.resolve(target, options.rest) if options.precision.is_quantized else target


def start_engine(
    graph: Path, flavour: EngineFlavour | None, options: ExportOptions, phases: Phases
) -> contextlib.AbstractContextManager[Future[EngineResult] | None]:
    """Start building the engine of the typed graph in the file `graph`; None with --engine none. Leaving the context
    stops an unfinished build.
    """
    if flavour is None:
        return contextlib.nullcontext()
    on_progress = phases.observer.building
    return start_build(graph, options.engine, flavour, precision=options.precision, on_progress=on_progress)


def check_engine(
    result: EngineResult | None, typed: CertifiedGraph, plan: QuantizationPlan | None, staging: Path, phases: Phases
) -> BuiltEngine | None:
    """Check the engine, and write plan and log into `staging`. MismatchError where it was built from another graph,
    PrecisionError where a layer does not have the requested precision.
    """
    if result is None:
        return None
    digests = bundles.digest_files(staging)
    _check_built_from(digests[bundles.GRAPH].sha256, result)
    quantized = () if plan is None else plan.product_nodes
    kept = [entry.node for entry in typed.policy.kept]
    achieved = check_achieved_precision(result.network, typed.policy.precision, kept, quantized)
    (staging / bundles.PLAN).write_bytes(result.plan)
    log = result.log_text.replace(f"{staging}{os.sep}", "")  # the bundle is moved away from there
    (staging / bundles.BUILD_LOG).write_text(log, encoding="utf-8", newline="\n")
    phases.record("engine build (alongside)", result.seconds)
    for text, count in result.warnings:
        phases.note(f"The engine builder warns{'' if count == 1 else f' {count} times'}: {text}")
    return BuiltEngine(result, achieved, read_plan_facts(result.plan), bundles.digest_files(staging, digests))


def _check_built_from(graph_sha256: str, result: EngineResult) -> None:
    """MismatchError where the engine was built from another file than the graph that is validated."""
    if result.graph_sha256 != graph_sha256:
        raise MismatchError(
            f"The engine was built from another graph (SHA-256 {result.graph_sha256[:16]}) than {bundles.GRAPH}"
            f" ({graph_sha256[:16]}).",
            "Let nothing else write to the bundle while it is made, and export again.",
        )


def engine_section(engine: BuiltEngine | None, options: ExportOptions) -> EngineSection:
    """The manifest's engine section."""
    if engine is None:
        return sections.no_engine_section("--engine none was asked for")
    return sections.engine_section(engine.result, engine.achieved, engine.facts, options)

"""The engine's stage: built in a process of its own, beside what the rest of an export does meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from spach_deploy.bundle import store as bundles
from spach_deploy.common.errors import MismatchError
from spach_deploy.common.progress import Phases
from spach_deploy.engine.build import Builder, EngineResult, RunningBuild, start_build
from spach_deploy.engine.flavours import EngineFlavour, choose_flavour
from spach_deploy.engine.network_facts import AchievedPrecision, check_achieved_precision
from spach_deploy.engine.plan_facts import PlanFacts, read_plan_facts
from spach_deploy.graph.precision.decision import PrecisionPolicy
from spach_deploy.options.specs import EngineTarget, ExportOptions
from spach_deploy.pipeline.steps import manifest as sections
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.validation.validate import EnginePlan, what_runs_a_plan

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """The engine, what was checked of it, what its plan's text says, and the bundle's files up to it."""

    result: EngineResult
    achieved: AchievedPrecision
    facts: PlanFacts | None
    files: bundles.FileDigests


def choose_engine(options: ExportOptions) -> tuple[EngineFlavour | None, ExportOptions]:
    """The flavour that builds, and the options with its GPUs filled in; errors before any work."""
    flavour = choose_flavour(options.engine.flavour)
    if flavour is None:
        return None, options
    target = dataclasses.replace(_resolved(flavour, options), flavour=flavour.flavour)
    return flavour, dataclasses.replace(options, engine=target)


def _resolved(flavour: EngineFlavour, options: ExportOptions) -> EngineTarget:
    """The target with its GPUs, which must compute both the quantized layers and the rest."""
    target = flavour.resolve(options.engine, options.precision)
    return flavour.resolve(target, options.rest) if options.precision.is_quantized else target


class EngineBuild:
    """The build of an export's engine, by a process that is there already; nothing at all without a flavour (--engine
    none). Leaving ends it, whatever it does.
    """

    def __init__(
        self, flavour: EngineFlavour | None, options: ExportOptions, phases: Phases, builder: Builder | None
    ) -> None:
        self._flavour = flavour
        self._options = options
        self._phases = phases
        self._stack = contextlib.ExitStack()
        self._builder = builder
        self._build: RunningBuild | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def is_wanted(self) -> bool:
        """Whether there will be an engine."""
        return self._flavour is not None

    def start(self, graph: Path) -> None:
        """Begin to build `graph`, or begin again where it has become another one."""
        if self._flavour is None:
            return
        if self._build is not None:
            self._build.cancel()
            self._builder = None
        self._build = start_build(
            graph,
            self._options.engine,
            self._flavour,
            precision=self._options.precision,
            on_progress=self._phases.observer.building,
            builder=self._builder,
        )
        self._stack.enter_context(self._build)

    @contextlib.contextmanager
    def finishing(
        self, policy: PrecisionPolicy, plan: QuantizationPlan | None, staging: Path
    ) -> Iterator[Callable[[], BuiltEngine | None]]:
        """As soon as there is an engine, it is written and checked beside what the block does, which may ask for it.

        What it gives waits, and raises MismatchError where another graph was built, PrecisionError where the precision
        is not the one that was asked for, or what `RunningBuild.wait` raises. No file is written behind the block.
        """
        build = self._build
        if build is None:
            yield lambda: None
            return
        with ThreadPoolExecutor(1, "finish-engine") as pool:
            engine = pool.submit(_finished, build, policy, plan, staging)
            try:
                yield lambda: self._told(engine.result())
            except BaseException:
                build.cancel()
                raise

    def _told(self, engine: BuiltEngine) -> BuiltEngine:
        """The engine, with what is to be said of it said."""
        self._phases.record("engine build (alongside)", engine.result.seconds)
        for text, count in engine.result.warnings:
            self._phases.note(f"The engine builder warns{'' if count == 1 else f' {count} times'}: {text}")
        return engine


def _finished(
    build: RunningBuild, policy: PrecisionPolicy, plan: QuantizationPlan | None, staging: Path
) -> BuiltEngine:
    """Wait for the engine, write it, and check that the precision is the one that was asked for."""
    settled = bundles.digest_files(staging)
    result = build.wait()
    _check_built_from(settled[bundles.GRAPH]["sha256"], result)
    with ThreadPoolExecutor(1) as pool:
        facts = pool.submit(read_plan_facts, result.plan)
        quantized = () if plan is None else plan.product_nodes
        kept = [entry.node for entry in policy.kept]
        achieved = check_achieved_precision(result.network, policy.precision, kept, quantized)
        (staging / bundles.PLAN).write_bytes(result.plan)
        log = result.log_text.replace(f"{staging}/", "")  # where it was built says nothing of where it lies
        (staging / bundles.BUILD_LOG).write_text(log, encoding="utf-8")
        return BuiltEngine(result, achieved, facts.result(), bundles.digest_files(staging, settled))


def _check_built_from(graph_sha256: str, result: EngineResult) -> None:
    """Refuse an engine of another graph than the one that is validated."""
    if result.graph_sha256 != graph_sha256:
        raise MismatchError(
            f"The engine was built from another graph (SHA-256 {result.graph_sha256[:16]}) than {bundles.GRAPH}"
            f" ({graph_sha256[:16]}).",
            "Let nothing else write to the bundle while it is made, and export again.",
        )


def plan_of(engine: BuiltEngine | None) -> EnginePlan | None:
    """The plan with what is needed to run it."""
    if engine is None:
        return None
    result = engine.result
    gpus = [str(gpu) for gpu in result.gpus]
    return EnginePlan(result.plan, result.flavour, what_runs_a_plan(result.flavour.value, result.flavour_version, gpus))


def engine_section(engine: BuiltEngine | None, options: ExportOptions) -> dict[str, Any]:
    """The manifest's engine section."""
    if engine is None:
        return sections.no_engine_section("--engine none was asked for")
    return sections.engine_section(engine.result, engine.achieved, engine.facts, options)

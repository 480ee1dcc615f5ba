"""A graph bisected: located, diagnosed, and told.

Which stage of an export introduced a disagreement: each is done again and compared with the reference.

reference -> static model -> FP32 graph -> typed graph -> engine. The first three are made again here from the weights;
of the last two the validation has compared what there is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from spach_deploy.bundle.golden import LOGITS as LOGITS_OUTPUT
from spach_deploy.common.errors import SpachError
from spach_deploy.common.metrics import relative_l2
from spach_deploy.graph.export import INPUT, LOGITS, export_canonical
from spach_deploy.graph.passes import TENSORRT_PASSES, Pass, apply_passes
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.specs import Precision
from spach_deploy.rewrites import rewrite
from spach_deploy.rewrites.static_modules import StaticSpach
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner, saved_graph
from spach_deploy.validation.bisect.fault_diagnosis import Fault, diagnose
from spach_deploy.validation.bisect.locate import Location, Suspicion, locate
from spach_deploy.validation.bisect.probe_points import Float32Array
from spach_deploy.validation.bisect.reference import ProbedReference
from spach_deploy.validation.bisect.result import (
    AGREES,
    DISAGREES,
    NOT_RUN,
    Bisection,
    ModuleResult,
    StepResult,
    Suspect,
    Unmatched,
)
from spach_deploy.validation.exact import rounding_limit
from spach_deploy.validation.rounding_error import evaluate, parts_of
from spach_deploy.validation.runs import Level, RunResult
from spach_deploy.validation.tolerance import measured_fp32_error


def bisect_graph(graph: ir.Model, reference: ProbedReference) -> Bisection:
    """Hold every module of `graph` to the reference's. UsageError where the graph cannot be taken apart."""
    location = locate(graph, reference)
    return Bisection(tuple(_suspects(location)), tuple(_modules(location)), tuple(_unmapped(location)))


def _suspects(location: Location) -> Iterator[Suspect]:
    named: set[str] = set()
    for suspicion in location.suspicions:
        module = location.view.places[suspicion.place].module
        if module in named:
            continue
        named.add(module)
        found = suspicion.found
        if found is not None:
            recorded = found.match.candidate.recorded
            value = found.value if suspicion.value is None else suspicion.value
            error = relative_l2(value, recorded.value) if suspicion.value is not None else found.local
            diagnosis = diagnose(recorded, value)
            yield Suspect(module, diagnosis.fault.value, _finite(error), found.allowed, diagnosis.why)
        else:
            yield _hidden(location, suspicion, module)


def _finite(error: float) -> float:
    return error if error == error else float("inf")


def _hidden(location: Location, suspicion: Suspicion, module: str) -> Suspect:
    """A place without a tensor: what follows it shows it."""
    seen = location.found[suspicion.seen_at]
    why = f"No tensor of the graph stands for its output, and {suspicion.seen_at}, which follows, is wrong."
    return Suspect(module, Fault.WEIGHT.value, seen.local, seen.allowed, why)


def _modules(location: Location) -> Iterator[ModuleResult]:
    for place, found in location.found.items():
        yield ModuleResult(place, found.inherited, found.local, found.allowed, found.match.tensor)


def _unmapped(location: Location) -> Iterator[Unmatched]:
    for place in location.unmapped:
        yield Unmatched(place, "The graph has it folded into its neighbours; what follows it is right.")


REFERENCE, STATIC, GRAPH, TYPED, ENGINE = "reference", "static model", "FP32 graph", "typed graph", "engine"


@dataclasses.dataclass(frozen=True)
class Sources:
    """What an export was made from: weights, images (N, 3, S, S) and the logits (N, classes) that were stored of them.

    `disabled` and `quantize` are what the rewrites were told, `quantize` None where nothing was quantized;
    `passes` gave the graph its target's form, but for those that are `disabled`.
    """

    loaded: LoadedModel
    images: Float32Array
    logits: Float32Array
    disabled: tuple[str, ...] = ()
    quantize: tuple[str, ...] | None = None
    passes: tuple[Pass, ...] = TENSORRT_PASSES


@dataclasses.dataclass
class RepeatedSteps:
    """The stages made again, as far as they went, and how each compared.

    `limit`: the relative L2 that rounding explains.
    """

    limit: float = rounding_limit(0.0)
    results: list[StepResult] = dataclasses.field(default_factory=list)
    static: StaticSpach | None = None
    graph: ir.Model | None = None


def remake(sources: Sources, say: Callable[[str], None]) -> RepeatedSteps:
    """Reference, static model and FP32 graph, made again up to the first that disagrees."""
    remade = RepeatedSteps()
    expected = _stage(remade, REFERENCE, lambda: _answered(remade, sources), sources.logits)
    if expected is None:
        return remade
    say("Rewriting again.")
    if _stage(remade, STATIC, lambda: _rewritten(remade, sources), expected) is None:
        return remade
    say("Exporting again.")
    _stage(remade, GRAPH, lambda: _exported(remade, sources), expected)
    return remade


def _stage(
    remade: RepeatedSteps, name: str, answer: Callable[[], Float32Array], expected: Float32Array
) -> Float32Array | None:
    """The logits where they agree, else None."""
    start = time.perf_counter()
    try:
        logits = answer()
    except SpachError as error:
        why = error.message
        remade.results.append(StepResult(name, None, remade.limit, DISAGREES, why, time.perf_counter() - start))
        return None
    error_l2 = relative_l2(logits, expected)
    verdict = AGREES if error_l2 <= remade.limit else DISAGREES
    remade.results.append(StepResult(name, error_l2, remade.limit, verdict, "", time.perf_counter() - start))
    return logits if verdict == AGREES else None


def _answered(remade: RepeatedSteps, sources: Sources) -> Float32Array:
    model, images = sources.loaded.model, sources.images
    logits = evaluate(model, images)
    remade.limit = rounding_limit(measured_fp32_error(model, images, logits, Precision.FP32).rel_l2)
    return logits


def _rewritten(remade: RepeatedSteps, sources: Sources) -> Float32Array:
    remade.static = rewrite(sources.loaded.model, sources.disabled, sources.quantize).model
    return evaluate(remade.static, sources.images)


def _exported(remade: RepeatedSteps, sources: Sources) -> Float32Array:
    assert remade.static is not None
    remade.graph = export_canonical(remade.static, sources.loaded.image_size)
    apply_passes(remade.graph, sources.passes, sources.disabled)
    with saved_graph(remade.graph) as path, OnnxRuntimeRunner(path, max_batch=2) as runner:
        logits: Float32Array = runner.run({INPUT: sources.images})[LOGITS]
    return logits


def judged(evidence: Sequence[RunResult], missing_engine: str | None) -> Iterator[StepResult]:
    """The typed graph and the engine, as the validation compared them; the worst of several runs."""
    for name, level in ((TYPED, Level.GRAPH), (ENGINE, Level.ENGINE)):
        runs = [item for item in evidence if item.level is level]
        if runs:
            yield _judged(name, max(runs, key=lambda item: (not item.passed, _error(item) or 0.0)))
        elif name == ENGINE and missing_engine is not None:
            yield StepResult(name, None, None, NOT_RUN, missing_engine)


def _judged(name: str, run: RunResult) -> StepResult:
    tolerance = run.bounds.outputs.get(LOGITS_OUTPUT)
    why = "" if run.passed else "; ".join(run.verdict.findings[:1])
    verdict = AGREES if run.passed else DISAGREES
    return StepResult(name, _error(run), None if tolerance is None else tolerance.rel_l2, verdict, why)


def _error(run: RunResult) -> float | None:
    return next((output.rel_l2_worst for output in run.comparison.outputs if output.name == LOGITS_OUTPUT), None)


def first_wrong_part(
    published: nn.Module, static: StaticSpach, images: Float32Array, limit: float
) -> tuple[str, float]:
    """The first part of the static model (stem, block, downsampling, norm, head) that is wrong given right inputs.

    Its path and its relative L2, more than `limit`; ("", 0.0) where each is right.
    """
    inputs, outputs = _parts_of(published, images)
    parts = dict(static.named_modules(remove_duplicate=False))
    with torch.inference_mode():
        for path, x in inputs.items():
            expected = outputs[path].numpy()
            try:
                value = parts[path](_as_stream(x, parts[path])).numpy().reshape(expected.shape)
            except (RuntimeError, ValueError):  # not even shapes fit
                return path, float("inf")
            if (error := relative_l2(value, expected)) > limit:
                return path, error
    return "", 0.0


def _parts_of(published: nn.Module, images: Float32Array) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def watch(path: str, part: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
            inputs[path], outputs[path] = given[0], made

        return part.register_forward_hook(hook)

    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for path, part in parts_of(published):
            hooks.enter_context(watch(path, part))
        published(torch.from_numpy(images))
    return inputs, outputs


def _as_stream(tokens: torch.Tensor, part: nn.Module) -> torch.Tensor:
    """Tokens (B, N, C) as a static part takes them: on their grid where it works on one."""
    encoding: Any = getattr(part, "cpe_net", part)
    if not getattr(encoding, "grid_stream", False) or tokens.ndim != 3:
        return tokens
    height, width = encoding.grid
    return tokens.reshape(len(tokens), height, width, tokens.shape[-1])

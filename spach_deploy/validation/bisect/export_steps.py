"""Repeat the steps of an export, each compared with the reference, to find the step that introduced a disagreement.

reference -> static model -> FP32 graph -> typed graph -> engine. The first three are made again from the weights. The
validation has already compared the last two, as far as they ran.
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

from spach_deploy.blocks import rewrite
from spach_deploy.bundle.golden import LOGITS as LOGITS_OUTPUT
from spach_deploy.common.errors import SpachError
from spach_deploy.common.metrics import relative_l2
from spach_deploy.graph.export import INPUT, LOGITS, export_canonical
from spach_deploy.graph.passes import TENSORRT_PASSES, Pass, apply_passes
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.specs import Precision
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner, saved_graph
from spach_deploy.validation.bisect.probe_points import Float32Array
from spach_deploy.validation.bisect.result import (
    AGREES,
    DISAGREES,
    NOT_RUN,
    StepResult,
)
from spach_deploy.validation.rounding_error import evaluate, parts_of
from spach_deploy.validation.runs import Level, RunResult
from spach_deploy.validation.tolerance import measured_fp32_error, rounding_limit

REFERENCE, STATIC, GRAPH, TYPED, ENGINE = "reference", "static model", "FP32 graph", "typed graph", "engine"


@dataclasses.dataclass(frozen=True)
class Sources:
    """What an export was made from.

    `images` float32 (N, 3, S, S); `logits` (N, classes): the reference's, as the bundle stores them. `disabled`:
    rewrites and passes that were turned off. `quantize`: modules that were quantized against the rules, None where
    nothing was quantized. `passes`: those that gave the graph its target's form, `disabled` ones included.
    """

    loaded: LoadedModel
    images: Float32Array
    logits: Float32Array
    disabled: tuple[str, ...] = ()
    quantize: tuple[str, ...] | None = None
    passes: tuple[Pass, ...] = TENSORRT_PASSES


@dataclasses.dataclass
class RepeatedSteps:
    """The repeated steps, up to the first that disagrees.

    `limit`: the relative L2 that FP32 rounding explains.
    """

    limit: float = rounding_limit(0.0)
    results: list[StepResult] = dataclasses.field(default_factory=list)
    static: nn.Module | None = None
    graph: ir.Model | None = None


def repeat_steps(sources: Sources, say: Callable[[str], None]) -> RepeatedSteps:
    """Make reference, static model and FP32 graph again; stop at the first that disagrees."""
    repeated = RepeatedSteps()
    expected = _run_step(repeated, REFERENCE, lambda: _reference_logits(repeated, sources), sources.logits)
    if expected is None:
        return repeated
    say("Rewriting again.")
    if _run_step(repeated, STATIC, lambda: _static_logits(repeated, sources), expected) is None:
        return repeated
    say("Exporting again.")
    _run_step(repeated, GRAPH, lambda: _graph_logits(repeated, sources), expected)
    return repeated


def _run_step(
    repeated: RepeatedSteps, name: str, run_step: Callable[[], Float32Array], expected: Float32Array
) -> Float32Array | None:
    """Run one step and compare its logits with `expected`; returns them where they agree, else None."""
    start = time.perf_counter()
    try:
        logits = run_step()
    except SpachError as error:
        why = error.message
        repeated.results.append(StepResult(name, None, repeated.limit, DISAGREES, why, time.perf_counter() - start))
        return None
    error_l2 = relative_l2(logits, expected)
    verdict = AGREES if error_l2 <= repeated.limit else DISAGREES
    repeated.results.append(StepResult(name, error_l2, repeated.limit, verdict, "", time.perf_counter() - start))
    return logits if verdict == AGREES else None


def _reference_logits(repeated: RepeatedSteps, sources: Sources) -> Float32Array:
    model, images = sources.loaded.model, sources.images
    logits = evaluate(model, images)
    repeated.limit = rounding_limit(measured_fp32_error(model, images, logits, Precision.FP32).rel_l2)
    return logits


def _static_logits(repeated: RepeatedSteps, sources: Sources) -> Float32Array:
    repeated.static = rewrite(sources.loaded.model, sources.disabled, sources.quantize).model
    return evaluate(repeated.static, sources.images)


def _graph_logits(repeated: RepeatedSteps, sources: Sources) -> Float32Array:
    assert repeated.static is not None
    repeated.graph = export_canonical(repeated.static, sources.loaded.image_size)
    apply_passes(repeated.graph, sources.passes, sources.disabled)
    with saved_graph(repeated.graph) as path, OnnxRuntimeRunner(path, max_batch=2) as runner:
        logits: Float32Array = runner.run({INPUT: sources.images})[LOGITS]
    return logits


def compared_steps(evidence: Sequence[RunResult], missing_engine: str | None) -> Iterator[StepResult]:
    """Results of typed graph and engine, which the validation has compared; of several runs the worst."""
    for name, level in ((TYPED, Level.GRAPH), (ENGINE, Level.ENGINE)):
        runs = [item for item in evidence if item.level is level]
        if runs:
            yield _step_of_run(name, max(runs, key=lambda item: (not item.passed, _error(item) or 0.0)))
        elif name == ENGINE and missing_engine is not None:
            yield StepResult(name, None, None, NOT_RUN, missing_engine)


def _step_of_run(name: str, run: RunResult) -> StepResult:
    tolerance = run.bounds.outputs.get(LOGITS_OUTPUT)
    why = "" if run.passed else "; ".join(run.verdict.findings[:1])
    verdict = AGREES if run.passed else DISAGREES
    return StepResult(name, _error(run), None if tolerance is None else tolerance.rel_l2, verdict, why)


def _error(run: RunResult) -> float | None:
    return next((output.rel_l2_worst for output in run.comparison.outputs if output.name == LOGITS_OUTPUT), None)


def first_wrong_part(published: nn.Module, static: nn.Module, images: Float32Array, limit: float) -> tuple[str, float]:
    """The first part of the static model (stem, block, downsampling, norm, head) that is wrong given right inputs.

    Returns its module path and relative L2, or ("", 0.0) where no part exceeds `limit`.
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
    """Inputs and outputs of the model's parts, by module path."""
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
    """Tokens (B, N, C) in the layout that a static part takes: (B, H, W, C) where it works on a grid."""
    layout: Any = part
    if not getattr(layout, "grid_stream", False) or tokens.ndim != 3:
        return tokens
    height, width = layout.grid
    return tokens.reshape(len(tokens), height, width, tokens.shape[-1])

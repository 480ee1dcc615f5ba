"""Repeat the steps of an export, each compared with the reference, to find the step that introduced a disagreement.

reference -> static model -> FP32 graph -> typed graph -> engine. The first three are made again from the weights. The
validation has already compared the last two, as far as they ran.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from spach_deploy.blocks import rewrite
from spach_deploy.bundle.outputs import DERIVED, INPUT
from spach_deploy.common.errors import SpachError
from spach_deploy.common.metrics import relative_l2
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import TENSORRT_PASSES, Pass, apply_passes
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.specs import Precision, Role
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner, saved_graph
from spach_deploy.validation.bisect.probe_points import Float32Array
from spach_deploy.validation.bisect.result import (
    AGREES,
    DISAGREES,
    NOT_RUN,
    StepResult,
)
from spach_deploy.validation.rounding_error import evaluate_outputs, parts_of
from spach_deploy.validation.runs import Level, RunResult
from spach_deploy.validation.tolerance import measured_fp32_errors, rounding_limit

Outputs = Mapping[str, Float32Array]
"""Outputs (N, ...) by name."""

REFERENCE, STATIC, GRAPH, TYPED, ENGINE = "reference", "static model", "FP32 graph", "typed graph", "engine"


@dataclasses.dataclass(frozen=True)
class Sources:
    """What an export was made from.

    `images` float32 (N, 3, S, S); `expected` (N, ...): the reference's outputs, as the bundle stores them. `disabled`:
    rewrites and passes that were turned off. `quantize`: modules that were quantized against the rules, None where
    nothing was quantized. `passes`: those that gave the graph its target's form, `disabled` ones included.
    """

    loaded: LoadedModel
    images: Float32Array
    expected: Outputs
    disabled: tuple[str, ...] = ()
    quantize: tuple[str, ...] | None = None
    passes: tuple[Pass, ...] = TENSORRT_PASSES


@dataclasses.dataclass
class RepeatedSteps:
    """The repeated steps, up to the first that disagrees.

    `limits`: the relative L2 of each output that FP32 rounding explains.
    """

    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    results: list[StepResult] = dataclasses.field(default_factory=list)
    static: nn.Module | None = None
    graph: ir.Model | None = None

    @property
    def least_limit(self) -> float:
        """The smallest of them."""
        return min(self.limits.values(), default=rounding_limit(0.0))


def repeat_steps(sources: Sources, say: Callable[[str], None]) -> RepeatedSteps:
    """Make reference, static model and FP32 graph again; stop at the first that disagrees."""
    repeated = RepeatedSteps(dict.fromkeys(sources.expected, rounding_limit(0.0)))
    expected = _run_step(repeated, REFERENCE, lambda: _of_reference(repeated, sources), sources.expected)
    if expected is None:
        return repeated
    say("Rewriting again.")
    if _run_step(repeated, STATIC, lambda: _of_static(repeated, sources), expected) is None:
        return repeated
    say("Exporting again.")
    _run_step(repeated, GRAPH, lambda: _of_graph(repeated, sources), expected)
    return repeated


def _run_step(repeated: RepeatedSteps, name: str, run_step: Callable[[], Outputs], expected: Outputs) -> Outputs | None:
    """Run one step and compare its outputs with `expected`; returns them where they agree, else None.

    The result has the figures of the output that is furthest from what is allowed.
    """
    start = time.perf_counter()
    try:
        outputs = run_step()
    except SpachError as error:
        why, limit = error.message, next(iter(repeated.limits.values()))
        repeated.results.append(StepResult(name, None, limit, DISAGREES, why, time.perf_counter() - start))
        return None
    errors = {output: relative_l2(outputs[output], array) for output, array in expected.items()}
    worst = max(errors, key=lambda output: _share(errors[output], repeated.limits[output]))
    verdict = AGREES if all(errors[output] <= repeated.limits[output] for output in errors) else DISAGREES
    error_l2, limit = errors[worst], repeated.limits[worst]
    repeated.results.append(StepResult(name, error_l2, limit, verdict, "", time.perf_counter() - start))
    return outputs if verdict == AGREES else None


def _share(error: float, allowed: float) -> float:
    """The error over what is allowed; infinite for NaN."""
    return error / allowed if error == error and allowed else float("inf")


def _of_reference(repeated: RepeatedSteps, sources: Sources) -> Outputs:
    model, images = sources.loaded.model, sources.images
    outputs = evaluate_outputs(model, images)
    noise = measured_fp32_errors(model, images, outputs, Precision.FP32)
    repeated.limits = {name: rounding_limit(error.rel_l2) for name, error in noise.items()}
    return outputs


def _of_static(repeated: RepeatedSteps, sources: Sources) -> Outputs:
    repeated.static = rewrite(sources.loaded.model, sources.disabled, sources.quantize).model
    return evaluate_outputs(repeated.static, sources.images)


def _of_graph(repeated: RepeatedSteps, sources: Sources) -> Outputs:
    assert repeated.static is not None
    repeated.graph = export_canonical(repeated.static, sources.loaded.image_size, sources.loaded.channels)
    apply_passes(repeated.graph, sources.passes, sources.disabled)
    with saved_graph(repeated.graph) as path, OnnxRuntimeRunner(path, max_batch=2) as runner:
        return runner.run({INPUT: sources.images})


def compared_steps(evidence: Sequence[RunResult], missing_engine: str | None) -> Iterator[StepResult]:
    """Results of typed graph and engine, which the validation has compared; of several runs the worst."""
    for name, level in ((TYPED, Level.GRAPH), (ENGINE, Level.ENGINE)):
        runs = [item for item in evidence if item.level is level]
        if runs:
            yield _step_of_run(name, max(runs, key=lambda item: (not item.passed, _error_and_allowed(item)[0] or 0.0)))
        elif name == ENGINE and missing_engine is not None:
            yield StepResult(name, None, None, NOT_RUN, missing_engine)


def _step_of_run(name: str, run: RunResult) -> StepResult:
    why = "" if run.passed else "; ".join(run.verdict.findings[:1])
    verdict = AGREES if run.passed else DISAGREES
    return StepResult(name, *_error_and_allowed(run), verdict, why)


def _error_and_allowed(run: RunResult) -> tuple[float | None, float | None]:
    """Of the output that is furthest from what is allowed, of those that the model computes."""
    bounds = run.bounds.outputs
    found = [
        (output.rel_l2_worst, bounds[output.name].rel_l2)
        for output in run.comparison.outputs
        if output.name in bounds and Role(output.role) not in DERIVED
    ]
    first = next(iter(bounds.values()), None)
    return max(found, key=lambda pair: _share(*pair), default=(None, None if first is None else first.rel_l2))


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
        def hook(_module: nn.Module, given: tuple[object, ...], made: object) -> None:
            if len(given) == 1 and isinstance(given[0], torch.Tensor) and isinstance(made, torch.Tensor):
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

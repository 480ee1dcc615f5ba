"""A validation bisected: which stage introduced a disagreement, the first wrong module, and the kind of error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from spach_deploy.bundle.store import Bundle
from spach_deploy.data.preprocess import normalize
from spach_deploy.graph.passes import CPU_PASSES, TENSORRT_PASSES, Pass
from spach_deploy.options.specs import Flavour, IODtype
from spach_deploy.validation.bisect.export_steps import (
    GRAPH,
    RepeatedSteps,
    Sources,
    bisect_graph,
    first_wrong_part,
    judged,
    remake,
)
from spach_deploy.validation.bisect.reference import ProbedReference
from spach_deploy.validation.bisect.result import Bisection, StepResult, Suspect
from spach_deploy.validation.bundle_facts import BundleFacts, read_record
from spach_deploy.validation.live_reference import Weights, rebuild
from spach_deploy.validation.runs import EvaluationSet, truncated_by
from spach_deploy.validation.validate import Validation

Say = Callable[[str], None]

IMAGES = 4
"""Images on which stages are compared again, the worst of the validation first; modules look at fewer."""


@dataclasses.dataclass(frozen=True)
class BisectRequest:
    """What is bisected: a file with a graph, of a bundle, and who has its weights."""

    graph: Path
    bundle: Bundle
    facts: BundleFacts
    weights: Weights


def bisected(validation: Validation, what: BisectRequest, say: Say) -> Validation:
    """`validation` with its bisection. Raises UsageError when the weights are needed and not given."""
    say("Rebuilding the reference.")
    chosen = _worst_first(validation)
    sources = _sources(validation.trial, chosen, what)
    remade = remake(sources, say)
    missing = validation.missing_engine_run
    later = judged(validation.evidence, None if missing is None else missing.reason)
    stages = (*remade.results, *later)
    say("Bisecting by module.")
    bisection = _by_module(what, sources, remade, stages, _pixels(validation.trial, chosen, what.facts))
    truncating = truncated_by(what.graph, what.facts.rest)
    bisection = dataclasses.replace(bisection, stages=stages, truncated_by=truncating)
    return dataclasses.replace(validation, bisection=bisection)


def _by_module(
    what: BisectRequest,
    sources: Sources,
    remade: RepeatedSteps,
    stages: tuple[StepResult, ...],
    pixels: npt.NDArray[np.uint8] | None,
) -> Bisection:
    """The graph of the first stage that disagrees, module by module; the typed graph where none of ours does."""
    first = next((stage.stage for stage in stages if stage.disagrees), None)
    if remade.static is None or (remade.graph is None and first != GRAPH):
        return _of_static(sources, remade)
    reference = ProbedReference(
        sources.loaded.model, sources.images, static=remade.static, plan=read_record(what.facts), pixels=pixels
    )
    if first == GRAPH and remade.graph is not None:
        return bisect_graph(remade.graph, reference)
    return bisect_graph(ir.from_proto(onnx.load(what.graph)), reference)


def _of_static(sources: Sources, remade: RepeatedSteps) -> Bisection:
    """Where the static model itself is wrong, or could not be made: its first wrong part."""
    if remade.static is None:
        return Bisection((), (), ())
    path, error = first_wrong_part(sources.loaded.model, remade.static, sources.images, remade.limit)
    suspects = (Suspect(path, "wrong rewrite", error, 0.0, "Its static form computes something else."),) if path else ()
    return Bisection(suspects, (), ())


def _worst_first(validation: Validation) -> list[int]:
    """The images to look at: that with the largest error first."""
    worst = [output.worst_image for item in validation.evidence for output in item.comparison.outputs]
    count = len(validation.trial)
    return list(dict.fromkeys([*(index for index in worst if index < count), *range(count)]))[:IMAGES]


def _sources(trial: EvaluationSet, chosen: list[int], what: BisectRequest) -> Sources:
    facts, bundle = what.facts, what.bundle
    loaded = rebuild(bundle.manifest.model, what.weights)
    disabled, quantize = _told(bundle, facts)
    inputs = _inputs(trial, chosen)
    is_uint8 = facts.outputs.io_dtype is IODtype.UINT8
    images = normalize(inputs.astype(np.uint8), facts.preprocessing) if is_uint8 else inputs.astype(np.float32)
    return Sources(loaded, images, trial.logits[chosen], disabled, quantize, _passes(facts))


def _passes(facts: BundleFacts) -> tuple[Pass, ...]:
    """What gives the FP32 graph its form; none where it is compared before eight bits."""
    if facts.quantization is not None:
        return ()
    return CPU_PASSES if facts.flavour is Flavour.NONE else TENSORRT_PASSES


def _inputs(trial: EvaluationSet, chosen: list[int]) -> npt.NDArray[np.generic]:
    return np.concatenate([trial.inputs(index, index + 1) for index in chosen])


def _pixels(trial: EvaluationSet, chosen: list[int], facts: BundleFacts) -> npt.NDArray[np.uint8] | None:
    return _inputs(trial, chosen).astype(np.uint8) if facts.outputs.io_dtype is IODtype.UINT8 else None


def _told(bundle: Bundle, facts: BundleFacts) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Which rewrites were turned off, and what was quantized against the rules; None where nothing was quantized."""
    graph = bundle.manifest.graph
    passes = [step.name for step in TENSORRT_PASSES if step.name not in graph.passes]
    if facts.quantization is not None:
        return (*facts.quantization.disabled, *passes), facts.quantization.quantize
    off = (name for name, entry in graph.rewrites.items() if any("--no-rewrite" in why for why in entry.skipped))
    return (*off, *passes), None

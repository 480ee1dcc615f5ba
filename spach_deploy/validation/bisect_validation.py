"""Bisect a validation (`--bisect`): the first wrong export step, the first wrong module, and the kind of fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from spach_deploy.bundle.inputs import image_of, joined
from spach_deploy.bundle.store import Bundle
from spach_deploy.data.preprocess import normalize
from spach_deploy.graph.passes import CPU_PASSES, TENSORRT_PASSES, Pass
from spach_deploy.options.specs import Flavour, IODtype
from spach_deploy.validation.bisect.export_steps import (
    GRAPH,
    RepeatedSteps,
    Sources,
    compared_steps,
    first_wrong_part,
    repeat_steps,
)
from spach_deploy.validation.bisect.locate import bisect_graph
from spach_deploy.validation.bisect.result import Bisection, StepResult, Suspect
from spach_deploy.validation.bisect.tensor_matching import ProbedReference
from spach_deploy.validation.bundle_facts import BundleFacts, read_record, rewrites_left_out
from spach_deploy.validation.live_reference import Weights, rebuild
from spach_deploy.validation.result import Validation
from spach_deploy.validation.runs import EvaluationSet, truncated_by

Say = Callable[[str], None]

IMAGES = 4
"""Images on which steps are repeated, those with the largest errors first; modules are compared on fewer."""


@dataclasses.dataclass(frozen=True)
class BisectRequest:
    """What to bisect: a graph file, its bundle, and where its weights are."""

    graph: Path
    bundle: Bundle
    facts: BundleFacts
    weights: Weights


def bisected(validation: Validation, request: BisectRequest, say: Say) -> Validation:
    """`validation` with its bisection. UsageError where the weights, or the user's own module, are needed and not
    given, and for a graph of several inputs.
    """
    request.facts.check_one_input("--bisect looks into graphs of one", "Every output is compared: return more of them.")
    say("Rebuilding the reference.")
    chosen = _worst_first(validation)
    sources = _sources(validation.eval_set, chosen, request)
    repeated = repeat_steps(sources, say)
    missing = validation.missing_engine_run
    later = compared_steps(validation.evidence, None if missing is None else missing.reason)
    stages = (*repeated.results, *later)
    say("Bisecting by module.")
    bisection = _by_module(request, sources, repeated, stages, _pixels(validation.eval_set, chosen, request.facts))
    truncating = truncated_by(request.graph, request.facts.rest)
    bisection = dataclasses.replace(bisection, stages=stages, truncated_by=truncating)
    return dataclasses.replace(validation, bisection=bisection)


def _by_module(
    request: BisectRequest,
    sources: Sources,
    repeated: RepeatedSteps,
    stages: tuple[StepResult, ...],
    pixels: npt.NDArray[np.uint8] | None,
) -> Bisection:
    """Bisect by module the graph of the first step that disagrees; the given graph where no repeated step does."""
    first = next((stage.stage for stage in stages if stage.disagrees), None)
    if repeated.static is None or (repeated.graph is None and first != GRAPH):
        return _bisect_static(sources, repeated)
    reference = ProbedReference(
        sources.loaded.model, sources.images, static=repeated.static, plan=read_record(request.facts), pixels=pixels
    )
    if first == GRAPH and repeated.graph is not None:
        return bisect_graph(repeated.graph, reference)
    return bisect_graph(ir.from_proto(onnx.load(request.graph)), reference)


def _bisect_static(sources: Sources, repeated: RepeatedSteps) -> Bisection:
    """The first wrong part of the static model, where that is wrong; nothing where it could not be made."""
    if repeated.static is None:
        return Bisection((), (), ())
    path, error = first_wrong_part(sources.loaded.model, repeated.static, sources.images, repeated.least_limit)
    suspects = (Suspect(path, "wrong rewrite", error, 0.0, "Its static form computes something else."),) if path else ()
    return Bisection(suspects, (), ())


def _worst_first(validation: Validation) -> list[int]:
    """Indices of the images to run, those with the largest errors first."""
    worst = [output.worst_image for item in validation.evidence for output in item.comparison.outputs]
    count = len(validation.eval_set)
    return list(dict.fromkeys([*(index for index in worst if index < count), *range(count)]))[:IMAGES]


def _sources(eval_set: EvaluationSet, chosen: list[int], request: BisectRequest) -> Sources:
    facts, bundle = request.facts, request.bundle
    loaded = rebuild(bundle.manifest.model, request.weights, facts.outputs)
    quantize = None if facts.quantization is None else facts.quantization.quantize
    inputs = _inputs(eval_set, chosen)
    is_uint8 = facts.io_dtype is IODtype.UINT8
    images = normalize(inputs.astype(np.uint8), facts.preprocessing) if is_uint8 else inputs.astype(np.float32)
    expected = {name: array[chosen] for name, array in eval_set.expected.items()}
    return Sources(loaded, images, expected, rewrites_left_out(bundle), quantize, _passes(facts))


def _passes(facts: BundleFacts) -> tuple[Pass, ...]:
    """The passes that gave the FP32 graph its form; none for a quantized bundle, whose graph is compared without
    them.
    """
    if facts.quantization is not None:
        return ()
    return CPU_PASSES if facts.flavour is Flavour.NONE else TENSORRT_PASSES


def _inputs(eval_set: EvaluationSet, chosen: list[int]) -> npt.NDArray[np.generic]:
    return image_of(joined([eval_set.inputs(index, index + 1) for index in chosen]))


def _pixels(eval_set: EvaluationSet, chosen: list[int], facts: BundleFacts) -> npt.NDArray[np.uint8] | None:
    return _inputs(eval_set, chosen).astype(np.uint8) if facts.io_dtype is IODtype.UINT8 else None

"""Validate a model that a Triton server runs: send a bundle's golden images and compare the responses with the
reference.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, Bundle
from spach_deploy.common.versions import ROUNDS_FP16
from spach_deploy.runtime.onnxruntime_runner import REMEDY
from spach_deploy.runtime.triton_runner import ServedAt, TritonRunner
from spach_deploy.validation.bundle_facts import BundleFacts
from spach_deploy.validation.result import Validation, golden_set, report_header
from spach_deploy.validation.runs import EvaluationSet, Level, RunResult, examine_runner
from spach_deploy.validation.tolerance import ToleranceSet

_RUNS_THE_PLAN = ("tensorrt_plan", "tensorrt")


@dataclasses.dataclass(frozen=True)
class ServerRequest:
    """A model on a server, and the bundle that it should compute."""

    served: ServedAt
    bundle: Path


@dataclasses.dataclass(frozen=True)
class ServerValidation(Validation):
    """The validation of a served model. `platform`: Triton's name of its backend."""

    platform: str = ""

    def level_sentence(self) -> str:
        """The level of evidence, in one line."""
        what = "The plan itself ran" if self.level is Level.ENGINE else "The graph ran"
        return f"Level of evidence: {self.level.value}. {what}, on the server ({self.platform})."


def validate_server(request: ServerRequest) -> Validation:
    """Send the bundle's golden images to the server, and compare its responses with PyTorch in FP32.

    Responses that differ, and requests that are refused, are findings. Raises BundleError for a folder that is no
    bundle, ChangedFileError for a bundle whose files were changed, UnavailableError where the server does not respond
    or the model is not ready, UsageError where it has no such model, MissingPackageError without tritonclient.
    """
    bundle = Bundle.open(request.bundle)
    facts = BundleFacts.of(bundle)
    golden = Golden.load(bundle.file(GOLDEN))
    eval_set = golden_set(golden, bundle.manifest.validation.images, facts.outputs, facts.batch, facts.inputs)
    evidence, platform = _evidence(request, eval_set, facts.tolerances)
    header = report_header(str(request.served), bundle, facts.precision)
    return ServerValidation(header, eval_set, (evidence,), notes=truncation_hints(bundle, evidence), platform=platform)


def truncation_hints(bundle: Bundle, evidence: RunResult) -> tuple[str, ...]:
    """A hint where ONNX Runtime's truncation may explain that a server's FP16-based INT8 graph disagrees; else
    empty.
    """
    if evidence.passed or evidence.level is Level.ENGINE or not bundle.quantizes_fp16:
        return ()
    return (f"This graph makes INT8 of FP16, which ONNX Runtime before {ROUNDS_FP16} truncates on a CPU. {REMEDY}",)


def _evidence(request: ServerRequest, eval_set: EvaluationSet, tolerances: ToleranceSet) -> tuple[RunResult, str]:
    with TritonRunner(request.served) as runner:
        if runner.platform in _RUNS_THE_PLAN:
            ran = f"plan ({runner.platform})"
            return examine_runner(runner, Level.ENGINE, eval_set, tolerances.engine, ran), runner.platform
        ran = f"graph ({runner.platform})"
        return examine_runner(runner, Level.GRAPH, eval_set, tolerances.graph, ran), runner.platform

"""Validate what a Triton server answers: a bundle's golden pack, sent to a running model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, Bundle
from spach_deploy.runtime.triton_runner import ServedAt, TritonRunner
from spach_deploy.runtime.truncation import MENDED, REMEDY
from spach_deploy.validation.bundle_facts import BundleFacts
from spach_deploy.validation.runs import EvaluationSet, Level, RunResult, examine_runner
from spach_deploy.validation.tolerance import ToleranceSet
from spach_deploy.validation.validate import Validation, golden_set, report_header

_RUNS_THE_PLAN = ("tensorrt_plan", "tensorrt")


@dataclasses.dataclass(frozen=True)
class ServerRequest:
    """A model on a server, and the bundle that it should compute."""

    served: ServedAt
    bundle: Path


@dataclasses.dataclass(frozen=True)
class ServerValidation(Validation):
    """A validation of a served model. `platform`: Triton's name of what ran."""

    platform: str = ""

    def level_sentence(self) -> str:
        """How far the evidence reaches, in one plain line."""
        what = "The plan itself ran" if self.level is Level.ENGINE else "The graph ran"
        return f"Level of evidence: {self.level.value}. {what}, on the server ({self.platform})."


def validate_server(request: ServerRequest) -> Validation:
    """Send the bundle's golden pack to the server, and compare its answers with PyTorch in FP32.

    Raises BundleError for what is no bundle, ChangedFileError for one whose files were changed, UnavailableError where
    the server does not answer or the model is not
    ready, UsageError where it has no such model, MissingPackageError without tritonclient. Answers that differ, and
    requests that are refused, are findings.
    """
    bundle = Bundle.open(request.bundle)
    facts = BundleFacts.of(bundle)
    golden = Golden.load(bundle.file(GOLDEN))
    trial = golden_set(golden, bundle.manifest.validation.images, facts.outputs, facts.batch)
    evidence, platform = _evidence(request, trial, facts.tolerances)
    subject = report_header(str(request.served), bundle, facts.precision)
    return ServerValidation(subject, trial, (evidence,), notes=truncation_hints(bundle, evidence), platform=platform)


def truncation_hints(bundle: Bundle, evidence: RunResult) -> tuple[str, ...]:
    """What may explain that a server's graph disagrees; nothing where it agrees, or its INT8 is not made of FP16."""
    if evidence.passed or evidence.level is Level.ENGINE or not bundle.quantizes_fp16:
        return ()
    return (f"This graph makes INT8 of FP16, which ONNX Runtime before {MENDED} truncates on a CPU. {REMEDY}",)


def _evidence(request: ServerRequest, trial: EvaluationSet, tolerances: ToleranceSet) -> tuple[RunResult, str]:
    with TritonRunner(request.served) as runner:
        if runner.platform in _RUNS_THE_PLAN:
            ran = f"plan ({runner.platform})"
            return examine_runner(runner, Level.ENGINE, trial, tolerances.engine, ran), runner.platform
        ran = f"graph ({runner.platform})"
        return examine_runner(runner, Level.GRAPH, trial, tolerances.graph, ran), runner.platform

"""The result of a validation: what ran, what is wrong, the level of evidence, the exit code, and report.json.

Level *engine*: the plan itself ran here. Level *graph*: the typed graph ran in ONNX Runtime, and by its hash the plan
was built from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from msgspec import convert, to_builtins

from spach_deploy._version import __version__
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.schema import AgreementEntry, TensorInfo, TolerancesEntry, TraceEntry, ValidationSection
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import UnavailableError, UsageError
from spach_deploy.common.files import Destination
from spach_deploy.common.text import json_text
from spach_deploy.common.versions import tool_versions
from spach_deploy.models.hyperparameters import Setting, read_section
from spach_deploy.options.specs import BatchProfile, Flavour, Precision
from spach_deploy.validation.accuracy import Accuracy
from spach_deploy.validation.bisect.result import Bisection
from spach_deploy.validation.runs import EvaluationSet, Level, RunResult, examine_engine
from spach_deploy.validation.tolerance import Bounds, ToleranceSet
from spach_deploy.validation.user_answers import Agreement

REPORT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class ReportHeader:
    """The head of a report: what was validated.

    `settings`: hyperparameters that tensors do not show, each with its source. `answers`: how far the reference agrees
    with the user's answers. `is_own`: the reference is the user's own module.
    """

    target: str
    model: str
    precision: str
    is_demo: bool
    settings: tuple[Setting, ...] = ()
    answers: Agreement | None = None
    is_own: bool = False

    @property
    def answers_sentence(self) -> str:
        """Whether the reference agrees with the user's answers; empty for demo weights, and for the user's own
        module.
        """
        if self.answers is not None:
            return self.answers.sentence
        if self.is_demo or self.is_own:
            return ""
        return "Not compared with answers of your own code; --answers FILE.npz does (docs/own_checkpoint.md)."

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "target": self.target,
            "model": self.model,
            "precision": self.precision,
            "is_demo": self.is_demo,
            "hyperparameters": {setting.name: setting.to_dict() for setting in self.settings},
            "answers": None if self.answers is None else self.answers.to_dict(),
            "answers_sentence": self.answers_sentence,
        }


@dataclasses.dataclass(frozen=True)
class MissingEngineRun:
    """Why a plan did not run here, as a clause, and which machine would run it. `instead`: what ran, a sentence."""

    reason: str
    needs: str
    instead: str = "The graph that it was built from ran instead."

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"reason": self.reason, "needs": self.needs}


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """A plan's bytes, its TensorRT flavour, and in words which machine runs it."""

    content: bytes = dataclasses.field(repr=False)
    flavour: Flavour
    needs: str


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What repeats the validation: its command line, and versions by package. No time, so that equal runs give equal
    reports.
    """

    command: str
    tools: dict[str, str]

    @classmethod
    def here(cls, command: str) -> Provenance:
        """A command line with the versions installed here."""
        return cls(command, tool_versions())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Validation:
    """A finished validation.

    `findings`: faults that no comparison shows, such as a changed file. `notes`: facts that are no faults.
    `other_model`: why the reference is not the user's model, by the user's answers. `missing_engine_run`: set where
    there is a plan and it did not run. `graph_suffices`: the caller accepts evidence of level graph, so that the exit
    code is 0. `accuracy`: set where the images have labels. `bisection`: set where one was asked for. `trace`: set
    where the error trace was measured. `run`: the command that made it.
    """

    header: ReportHeader
    eval_set: EvaluationSet
    evidence: tuple[RunResult, ...]
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    missing_engine_run: MissingEngineRun | None = None
    graph_suffices: bool = False
    accuracy: Accuracy | None = None
    bisection: Bisection | None = None
    trace: TraceEntry | None = None
    run: Provenance | None = None
    other_model: str = ""

    @property
    def level(self) -> Level:
        """The highest level reached."""
        return Level.ENGINE if any(item.level is Level.ENGINE for item in self.evidence) else Level.GRAPH

    @property
    def all_findings(self) -> tuple[str, ...]:
        """Everything that is wrong, each finding once."""
        compared = (finding for item in self.evidence for finding in item.verdict.findings)
        dropped = self.accuracy.findings if self.accuracy else ()
        bisected = () if self.bisection is None else self.bisection.findings
        other = (self.other_model,) if self.other_model else ()
        return tuple(dict.fromkeys((*self.findings, *other, *compared, *bisected, *dropped)))

    @property
    def agreed(self) -> bool:
        """Whether the numbers agree, whatever the accuracy."""
        return dataclasses.replace(self, accuracy=None).passed

    @property
    def passed(self) -> bool:
        """Whether something ran and nothing is wrong."""
        return bool(self.evidence) and not self.all_findings

    @property
    def exit_code(self) -> int:
        """0 it agrees, 1 it does not, 3 it agrees as far as this machine can tell."""
        if not self.passed:
            return 1
        return 3 if self.missing_engine_run and not self.graph_suffices else 0

    def failure(self) -> str:
        """What is wrong, in one sentence; for a validation that did not pass."""
        findings = self.all_findings or ("Nothing was compared.",)
        more = f" (and {len(findings) - 1} more findings)" if len(findings) > 1 else ""
        return f"{self.header.target} does not agree with PyTorch: {findings[0].rstrip('.')}{more}."

    def level_sentence(self) -> str:
        """The level of evidence, in one line."""
        if self.level is Level.ENGINE:
            return "Level of evidence: engine. The plan itself ran here."
        missing = self.missing_engine_run
        if missing is None and self.evidence:
            return "Level of evidence: graph. It ran in ONNX Runtime; no plan was to be run."
        if missing is None:
            return "Level of evidence: none. Nothing ran here; no plan was to be run."
        level, instead = ("graph", missing.instead) if self.evidence else ("none", "Nothing ran instead.")
        return (
            f"Level of evidence: {level}. The plan itself did not run: {missing.reason}. {instead}"
            f" To run the plan: {missing.needs}."
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json: plain JSON, the same for the same inputs."""
        missing = self.missing_engine_run
        return {
            "report_version": REPORT_VERSION,
            "spach_deploy": __version__,
            **self.header.to_dict(),
            "passed": self.passed,
            "agreed": self.agreed,
            "exit_code": self.exit_code,
            "level": self.level.value,
            "level_sentence": self.level_sentence(),
            "engine_did_not_run": None if missing is None else missing.to_dict(),
            "findings": list(self.all_findings),
            "notes": list(self.notes),
            "run": None if self.run is None else self.run.to_dict(),
            "images": {
                "description": self.eval_set.images,
                "count": len(self.eval_set),
                "names": list(self.eval_set.names),
            },
            "reference": self.eval_set.reference,
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            "evidence": [item.to_dict() for item in self.evidence],
            "trace": to_builtins(self.trace),
            "bisect": None if self.bisection is None else self.bisection.to_dict(),
        }


def manifest_section(validation: Validation, tolerances: ToleranceSet) -> ValidationSection:
    """The manifest's section about an export's validation; later validations of the bundle read it."""
    answers = validation.header.answers
    return ValidationSection(
        passed=validation.passed,
        level=validation.level.value,
        level_sentence=validation.level_sentence(),
        images=validation.eval_set.images,
        image_count=len(validation.eval_set),
        batches=tuple(sorted({size for item in validation.evidence for size in item.batches})),
        batch_left_out=next((item.left_out for item in validation.evidence if item.left_out), ""),
        reference=validation.eval_set.reference,
        tolerances=convert(tolerances.to_dict(), TolerancesEntry),
        trace=validation.trace,
        answers=None if answers is None else convert(answers.to_dict(), AgreementEntry),
    )


def report_header(target: str, bundle: Bundle, precision: Precision) -> ReportHeader:
    """The head of a report, from a bundle's manifest."""
    model, answers = bundle.manifest.model, bundle.manifest.validation.answers
    return ReportHeader(
        target=target,
        model=model.name,
        precision=precision.value,
        is_demo=model.origin == "demo",
        is_own=model.origin == "module",
        settings=read_section(model.hyperparameters),
        answers=None if answers is None else Agreement.of(answers),
    )


def golden_set(
    golden: Golden,
    images: str,
    outputs: tuple[TensorInfo, ...],
    batch: BatchProfile,
    inputs: Sequence[TensorInfo] = (),
) -> EvaluationSet:
    """A golden pack as an evaluation set. `images`: in words, what its images are. `outputs`: those of the graph, and
    `inputs`, where it may have several.
    """
    given = golden.batch(inputs)
    return EvaluationSet(
        inputs=lambda start, stop: given[start:stop],
        expected=golden.outputs,
        names=golden.names,
        images=images,
        reference="PyTorch in FP32, as stored when the bundle was exported",
        outputs=outputs,
        batch=batch,
    )


def what_runs_a_plan(flavour: str, version: str, gpus: list[str]) -> str:
    """The machine that a plan needs, in words."""
    return f"an NVIDIA GPU ({', '.join(gpus)}) with {flavour} {version}".replace("()", "").replace("  ", " ").strip()


def try_plan(plan: EnginePlan, eval_set: EvaluationSet, bounds: Bounds) -> RunResult | MissingEngineRun:
    """Run a plan, or say why it does not run here. UsageError for bytes that are no plan."""
    try:
        return examine_engine(plan.content, plan.flavour, eval_set, bounds)
    except UnavailableError as error:
        reason = error.message.removeprefix("The engine cannot run here: ").rstrip(".")
        return MissingEngineRun(reason, plan.needs)


def validate_export(
    header: ReportHeader, eval_set: EvaluationSet, graph: tuple[RunResult, ...], plan: EnginePlan | None, bounds: Bounds
) -> Validation:
    """The validation of an export: its graph's runs and, where there is a plan and it runs here, the plan's.

    `bounds` are the engine's. Evidence of level graph suffices: an export is done when everything that could run
    agrees.
    """
    if plan is None:
        return Validation(header, eval_set, graph)
    tried = try_plan(plan, eval_set, bounds)
    if isinstance(tried, RunResult):
        return Validation(header, eval_set, (tried, *graph))
    return Validation(header, eval_set, graph, missing_engine_run=tried, graph_suffices=True)


# report.json


def as_json(validation: Validation) -> str:
    """The report as text."""
    return dumped(validation.to_dict())


def dumped(content: dict[str, Any]) -> str:
    """A report's content as text."""
    return json_text(content) + "\n"


def write_report(validation: Validation, destination: Destination) -> None:
    """Write report.json in one step. UsageError where it cannot be written."""
    write_whole(destination, as_json(validation))


def write_whole(destination: Destination, text: str) -> None:
    """Write a report or its page in one step: a killed run leaves the old file. UsageError where that fails."""
    try:
        destination.write_text(text)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"The report {destination.path} cannot be written ({reason}).", "Choose another --report FILE."
        ) from None

"""Validate what a user points at: a bundle, its engine.plan, its model.onnx, or another graph beside its manifest."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, GRAPH, MANIFEST, PLAN, REWRITTEN, Bundle, find_bundle
from spach_deploy.common.errors import (
    BundleError,
    ChangedFileError,
    MismatchError,
    SpachError,
    UnavailableError,
    UsageError,
    printable,
)
from spach_deploy.common.executors import ClusterAddress
from spach_deploy.common.files import sha256_of
from spach_deploy.common.machine import has_vnni
from spach_deploy.graph.external_data import missing_data
from spach_deploy.options.specs import WeightSource
from spach_deploy.runtime.plan_identity import PlanIdentity, identify_plan_file
from spach_deploy.validation.accuracy import Accuracy, paired
from spach_deploy.validation.bundle_facts import BundleFacts, QuantizationFacts
from spach_deploy.validation.error_trace import ErrorTrace
from spach_deploy.validation.live_reference import (
    ImagesReference,
    ImagesSpec,
    Weights,
    rebuild,
    rebuilt_in_parts,
    rebuilt_on_golden,
    rebuilt_on_images,
)
from spach_deploy.validation.runs import (
    EvaluationSet,
    Level,
    RunResult,
    examine_typed,
    executions_here,
    in_other_batches,
    run_result,
    runs_here,
    truncation_notes,
)
from spach_deploy.validation.tolerance import ToleranceSet
from spach_deploy.validation.validate import (
    EnginePlan,
    MissingEngineRun,
    Validation,
    golden_set,
    report_header,
    try_plan,
    what_runs_a_plan,
)

DEFAULT_MAX_IMAGES = 256
_EXPORT_AGAIN = "Export the bundle again."
_PLAN_SUFFIXES = (".plan", ".engine", ".trt")


class TargetKind(enum.Enum):
    """What was pointed at."""

    BUNDLE = "bundle"
    PLAN = "plan"
    GRAPH = "graph"


@dataclasses.dataclass(frozen=True)
class _Pointed:
    """What was pointed at, and the bundle that it belongs to."""

    path: Path
    kind: TargetKind
    bundle: Bundle
    facts: BundleFacts

    @property
    def graph(self) -> Path:
        return self.path if self.kind is TargetKind.GRAPH else self.bundle.path / GRAPH


@dataclasses.dataclass(frozen=True)
class ValidationRequest:
    """What `spach-validate` was asked. `weights` None, `ignore` empty: as when the bundle was made.

    `against`: the bundle that a graph of the user's own is held to; `bisect`: by module too.
    `labels`: of `images`, a file or the same folder. `max_drop`: of top-1, in points, beyond which it does not pass.
    `answers`: an npz of what the user's own code answered, which the reference is held to.
    `cluster`: the cluster that answers to `images`; None for this process.
    """

    target: Path
    images: Path | None = None
    checkpoint: Path | None = None
    weights: WeightSource | None = None
    ignore: tuple[str, ...] = ()
    max_images: int = DEFAULT_MAX_IMAGES
    accept_graph: bool = False
    bisect: bool = False
    against: Path | None = None
    labels: Path | None = None
    max_drop: float | None = None
    answers: Path | None = None
    cluster: ClusterAddress | None = None

    @classmethod
    def of(cls, target: Path, given: Mapping[str, Any]) -> ValidationRequest:
        """From the values of spach-validate's options, by their keys; what is not there is as by default."""
        weights = given.get("weights")
        return cls(
            target=target,
            images=given.get("images"),
            checkpoint=given.get("checkpoint"),
            weights=None if weights is None else WeightSource(weights),
            ignore=given.get("ignore", ()),
            max_images=given.get("max_images", DEFAULT_MAX_IMAGES),
            accept_graph=given.get("accept") == "graph",
            labels=given.get("labels"),
            max_drop=given.get("max_drop"),
            answers=given.get("answers"),
            bisect=given.get("bisect", False),
            against=given.get("against"),
            cluster=given.get("ray"),
        )


def validate_target(request: ValidationRequest, say: Callable[[str], None] = lambda text: None) -> Validation:
    """Compare what `request.target` computes with PyTorch in FP32.

    `say` gets a sentence for what takes long. Raises UsageError for what cannot be validated (no bundle, no reference
    that can be trusted, files that are no plan and no graph), UnavailableError when nothing can be run here.
    """
    _check_options(request)
    if request.against is not None:
        return _foreign(request, request.against, say)
    bundle = _open(request.target)
    kind = _kind(request.target, bundle)
    facts = BundleFacts.of(bundle)
    changed = _changed_files(bundle)
    _check_form(request.target, kind, changed)
    _check_processor(bundle)
    pointed = _Pointed(request.target, kind, bundle, facts)
    _check_cluster(request, pointed)
    answered = _answered(bundle, facts, request, changed, say, pointed.graph)
    found = _validation(request, pointed, answered, changed)
    found = _with_accuracy(found, request, answered)
    if request.answers is not None:
        found = _held_to_answers(
            found, request.answers, bundle, Weights(request.checkpoint, request.weights, request.ignore), say
        )
    return _bisected(found, request, pointed, say) if request.bisect else found


def _changed_files(bundle: Bundle) -> dict[str, str]:
    return {name: state for name, state in bundle.changed_files().items() if name not in REWRITTEN}


def _held_to_answers(
    found: Validation, answers: Path, bundle: Bundle, weights: Weights, say: Callable[[str], None]
) -> Validation:
    """The validation with how the bundle's reference agrees with the user's answers; where it does not, a finding."""
    from spach_deploy.validation.user_answers import compared, hold_to_answers, read_answers

    given = read_answers(answers)
    say("Comparing the reference with your answers.")
    loaded = rebuild(bundle.manifest.model, weights)
    loaded = dataclasses.replace(loaded, settings=found.subject.settings or loaded.settings)
    other = ""
    try:
        _, agreement = hold_to_answers(loaded, given, say, is_settled=True)
    except MismatchError as error:
        agreement, other = compared(loaded, given), f"{error.message} {error.hint}"
    return dataclasses.replace(found, other_model=other, subject=dataclasses.replace(found.subject, answers=agreement))


def _check_processor(bundle: Bundle) -> None:
    if bundle.needs_vnni and not has_vnni():
        raise UnavailableError(
            "The bundle's INT8 graph is for CPUs with VNNI, and this one has none: its sums would overflow here.",
            "Validate it where it will run, or export it without --vnni.",
        )


def _foreign(request: ValidationRequest, against: Path, say: Callable[[str], None]) -> Validation:
    """A graph of the user's own, held to what a bundle was made from."""
    from spach_deploy.validation.external_graph import validate_external

    if not against.is_dir():
        raise UsageError(f"--against {against} is no directory.", "Give a bundle.")
    if not request.target.is_file():
        raise UsageError(f"{request.target} is not there, or no file.", "Give an ONNX graph.")
    _check_is_onnx(request.target)
    bundle = Bundle.open(against, verify=False)
    facts = BundleFacts.of(bundle)
    changed = _changed_files(bundle)
    answered = _answered(bundle, facts, request, changed, say)
    subject = report_header(str(request.target), bundle, facts.precision)
    weights = Weights(request.checkpoint, request.weights, request.ignore)
    found = validate_external(subject, bundle, facts, answered, weights, say)
    return dataclasses.replace(found, findings=(*_file_findings(changed), *found.findings))


def _bisected(
    found: Validation, request: ValidationRequest, pointed: _Pointed, say: Callable[[str], None]
) -> Validation:
    from spach_deploy.validation.bisect_validation import BisectRequest, bisected

    weights = Weights(request.checkpoint, request.weights, request.ignore)
    return bisected(found, BisectRequest(pointed.graph, pointed.bundle, pointed.facts, weights), say)


def _validation(
    request: ValidationRequest, pointed: _Pointed, answered: ImagesReference, changed: dict[str, str]
) -> Validation:
    kind, bundle, facts = pointed.kind, pointed.bundle, pointed.facts
    trial, notes = answered.trial, answered.notes
    subject = report_header(str(request.target), bundle, facts.precision)
    if kind is TargetKind.GRAPH:
        note = _graph_note(request.target, bundle)
        notes = (*notes, *truncation_notes(request.target, facts.rest))
        evidence = _graph_evidence(request.target, facts, answered)
        along = None if note else _traced(bundle)
        others = {name: state for name, state in changed.items() if name != request.target.name}
        findings = (*_file_findings(others), *_quantization_findings(pointed))
        return Validation(subject, trial, evidence, findings, notes=(*notes, *note), trace=along)
    other = (*_other_plan_findings(request.target, kind, bundle), *_other_graph_findings(kind, bundle))
    findings = (*_file_findings(changed), *other, *_quantization_findings(pointed))
    evidence, missing = _plan_or_graph(request.target, kind, bundle, facts, answered)
    if missing is not None and not findings:
        notes = (*notes, "By its SHA-256 the plan is the one that was built from this graph.")
    if any(item.level is Level.GRAPH for item in evidence):
        notes = (*notes, *truncation_notes(bundle.path / GRAPH, facts.rest))
    along = None if GRAPH in changed else _traced(bundle)
    return Validation(
        subject,
        trial,
        evidence,
        findings,
        notes,
        missing_engine_run=missing,
        graph_suffices=request.accept_graph,
        trace=along,
    )


def _traced(bundle: Bundle) -> ErrorTrace | None:
    """Errors along the depth as the export measured them; they are the unchanged graph's."""
    entry = bundle.manifest.validation.trace
    return None if entry is None else ErrorTrace.of(entry)


def _check_options(request: ValidationRequest) -> None:
    """Refuse labels without images, and a bound on the drop that is none or has nothing to be measured on."""
    _check_spread(request)
    if request.labels is not None and request.images is None:
        raise UsageError("--labels needs --images: the bundle's golden images are too few.", "Give --images PATH too.")
    if request.max_drop is None:
        return
    if not (math.isfinite(request.max_drop) and 0 <= request.max_drop <= 100):
        raise UsageError(f"--max-drop {request.max_drop:g} is no number of points.", "Give 0 to 100, such as 0.3.")
    brings_labels = request.images is not None and request.images.suffix.lower() == ".npz"
    if request.labels is None and not brings_labels:
        raise UsageError("--max-drop needs labels.", "Give --images PATH and --labels FILE.")


def _check_spread(request: ValidationRequest) -> None:
    """Refuse what a cluster does not do."""
    if request.cluster is None:
        return
    for option, is_given in (
        ("--against", request.against is not None),
        ("--bisect", request.bisect),
        ("--answers", request.answers is not None),
    ):
        if is_given:
            raise UsageError(
                f"{option} looks at a few images on this machine; --ray spreads many.", "Give one of them."
            )
    if request.images is None:
        raise UsageError(
            "--ray spreads many images over a cluster, and the golden pack holds few.",
            "Give --images PATH too, or leave --ray out.",
        )


def _check_cluster(request: ValidationRequest, pointed: _Pointed) -> None:
    """Refuse to run a plan: a cluster runs graphs. A plan that does not run here is told with the evidence."""
    if request.cluster is None:
        return
    hint = f"Give {pointed.bundle.path / GRAPH}, or leave --ray out."
    if pointed.kind is TargetKind.PLAN:
        raise UsageError("--ray runs graphs in ONNX Runtime, and no plans.", hint)
    plan = pointed.bundle.plan if pointed.kind is TargetKind.BUNDLE else None
    if plan is not None and plan.is_file() and runs_here(plan.read_bytes(), pointed.facts.flavour):
        raise UsageError("--ray runs graphs in ONNX Runtime, and this machine can run the plan itself.", hint)


# What it is


def _open(target: Path) -> Bundle:
    """The bundle that the target belongs to, its files not yet verified."""
    if not target.exists() and target.name == PLAN and (target.parent / MANIFEST).is_file():
        bundle = Bundle.open(target.parent, verify=False)
        _check_has_plan(bundle)
        raise ChangedFileError(f"{target} is missing from its bundle.", _EXPORT_AGAIN)
    return Bundle.open(find_bundle(target), verify=False)


def _check_has_plan(bundle: Bundle) -> None:
    if bundle.plan is None:
        raise BundleError(
            f"Bundle {bundle.path} has no {PLAN}: {bundle.manifest.engine.why_none}.",
            f"Validate the bundle or its {GRAPH}, or export it with --engine auto.",
        )


def _kind(target: Path, bundle: Bundle) -> TargetKind:
    if target.is_dir() or target.name == MANIFEST:
        return TargetKind.BUNDLE
    if target.suffix == ".onnx":
        return TargetKind.GRAPH
    identity = _identify(target)
    if target.suffix in _PLAN_SUFFIXES or identity.flavour is not None:
        _check_has_plan(bundle)
        return TargetKind.PLAN
    raise UsageError(
        f"{target} is neither a TensorRT plan nor an ONNX graph: {identity.problem}.",
        f"Give the bundle's directory, its {PLAN} or its {GRAPH}.",
    )


def _check_form(target: Path, kind: TargetKind, changed: dict[str, str]) -> None:
    """Refuse a file that is not what its name says, before any work: ChangedFileError where an export wrote it."""
    try:
        if kind is TargetKind.PLAN and not (identity := _identify(target)).is_plan:
            raise UsageError(f"{target} is not a whole TensorRT plan: {identity.problem}.", _EXPORT_AGAIN)
        if kind is TargetKind.GRAPH:
            _check_is_onnx(target)
    except UsageError as error:
        if target.name in changed:
            problem = f"{target} {changed[target.name]} since the bundle was exported. {error.message}"
            raise ChangedFileError(problem, _EXPORT_AGAIN) from None
        raise


def _identify(target: Path) -> PlanIdentity:
    try:
        return identify_plan_file(target)
    except OSError as error:
        raise BundleError(f"{target} cannot be read ({error.strerror or error}).", "Check its permissions.") from None


def _check_is_onnx(target: Path) -> None:
    import onnx

    try:
        model = onnx.load(target, load_external_data=False)
        graph, missing = model.graph, printable(missing_data(model, target.parent))
        if not missing and any(tensor.external_data for tensor in graph.initializer):
            onnx.load(target)  # weights in other files: there, whole, and not outside of the graph's directory
        has_nodes = bool(graph.node)
    except Exception as error:  # protobuf's own exceptions, and OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{target} is not an ONNX graph ({reason}).", f"Give a bundle's {GRAPH}.") from None
    if missing:
        problem = f"{target} keeps its weights in {missing}, which is not beside it."
        raise UsageError(problem, f"Put {missing} into {target.absolute().parent}, or give a graph with its weights.")
    if not has_nodes:
        raise UsageError(f"{target} is not an ONNX graph: it has no nodes.", f"Give a bundle's {GRAPH}.")


# Images and reference


def _answered(
    bundle: Bundle,
    facts: BundleFacts,
    request: ValidationRequest,
    changed: dict[str, str],
    say: Callable[[str], None],
    graph: Path | None = None,
) -> ImagesReference:
    """The images with the reference's answers, the bounds that hold for them, and remarks.

    With --ray also with what `graph` answers.
    """
    section, weights = bundle.manifest.model, Weights(request.checkpoint, request.weights, request.ignore)
    if request.images is not None:
        asked = ImagesSpec(request.images, request.max_images, request.labels)
        if request.cluster is not None and graph is not None:
            request.cluster.check()
            answered = rebuilt_in_parts(section, facts, asked, weights, graph, request.cluster, say)
        else:
            answered = rebuilt_on_images(section, facts, asked, weights, say)
        notes = (f"{GOLDEN} {changed[GOLDEN]}; it was not used.",) if GOLDEN in changed else ()
        return dataclasses.replace(answered, notes=(*notes, *answered.notes))
    if GOLDEN in changed:
        raise ChangedFileError(
            f"{bundle.path / GOLDEN} {changed[GOLDEN]} since the export, so there is no reference to trust.",
            "Give --images DIR with the --checkpoint FILE that the bundle was made from, or export it again.",
        )
    golden = Golden.load(bundle.file(GOLDEN))
    trial = golden_set(golden, bundle.manifest.validation.images, facts.outputs, facts.batch)
    if request.checkpoint is not None:
        trial = rebuilt_on_golden(section, facts, trial, weights, say)
    return ImagesReference(trial, facts.tolerances)


# Evidence


def _file_findings(changed: dict[str, str]) -> tuple[str, ...]:
    """A golden pack that was changed is no finding: it is not used then."""
    return tuple(f"{name} {state} since the bundle was exported." for name, state in changed.items() if name != GOLDEN)


def _other_graph_findings(kind: TargetKind, bundle: Bundle) -> tuple[str, ...]:
    """By the builder's own word, where it is kept."""
    built_from = bundle.manifest.engine.graph_sha256
    if kind is TargetKind.GRAPH or built_from in (None, bundle.manifest.sha256(GRAPH)):
        return ()
    return (f"By its manifest, {PLAN} was built from another graph than {GRAPH}.",)


def _other_plan_findings(target: Path, kind: TargetKind, bundle: Bundle) -> tuple[str, ...]:
    is_other = kind is TargetKind.PLAN and target.resolve() != (bundle.path / PLAN).resolve()
    if is_other and sha256_of(target) != bundle.manifest.sha256(PLAN):
        return (f"{target.name} is not the plan that was exported: its SHA-256 is not the manifest's.",)
    return ()


def _quantization_findings(pointed: _Pointed) -> tuple[str, ...]:
    """Where the graph's scales and pairs are not what the bundle's record of quantization says."""
    if pointed.facts.quantization is None or not pointed.graph.is_file():
        return ()
    findings = tuple(f"Quantization: {finding}." for finding in _audited(pointed.graph, pointed.facts.quantization))
    calibrated, weights = pointed.facts.quantization.weights_sha256, pointed.bundle.manifest.model.weights_sha256
    if calibrated == weights:
        return findings
    other = f"Quantization: its scales are of other weights ({calibrated[:16]}) than the bundle's ({weights[:16]})."
    return (other, *findings)


def _audited(graph: Path, facts: QuantizationFacts) -> Iterable[str]:
    import onnx
    import onnx_ir as ir

    from spach_deploy.quantization.plan import read_plan
    from spach_deploy.quantization.qdq import audit

    plan = read_plan(facts.record)
    try:
        return audit(ir.from_proto(onnx.load(graph)), plan)
    except Exception as error:  # a graph that somebody changed may break any reader, in the reader's own exceptions
        return (f"its scales cannot be read ({type(error).__name__}: {error})",)


def _graph_note(target: Path, bundle: Bundle) -> tuple[str, ...]:
    if sha256_of(target) == bundle.manifest.sha256(GRAPH):
        return ()
    return (f"{target.name} differs from the graph that was exported; the numbers decide.",)


def _plan_or_graph(
    target: Path, kind: TargetKind, bundle: Bundle, facts: BundleFacts, answered: ImagesReference
) -> tuple[tuple[RunResult, ...], MissingEngineRun | None]:
    """Evidence of the plan where it runs here, else of the graph, and why the plan did not run."""
    missing: MissingEngineRun | None = None
    if bundle.plan is not None:
        plan_file = target if kind is TargetKind.PLAN else bundle.plan
        tried = _try_file(plan_file, bundle, facts, answered.trial, answered.tolerances)
        if isinstance(tried, RunResult):
            return (tried,), None
        missing = tried
    graph = bundle.path / GRAPH
    if not graph.is_file():
        return (), missing
    return _graph_evidence(graph, facts, answered), missing


def _graph_evidence(graph: Path, facts: BundleFacts, answered: ImagesReference) -> tuple[RunResult, ...]:
    """What the graph gave beside the reference, judged; where it was not run yet, it runs now."""
    trial, bounds = answered.trial, answered.tolerances.graph
    if answered.graph is None:
        return examine_typed(graph, facts.rest, trial, bounds)
    first, *others = answered.graph
    whole = in_other_batches(executions_here(graph, facts.rest)[0], graph, first, trial)
    return tuple(run_result(Level.GRAPH, ran, trial, bounds) for ran in (whole, *others))


def _try_file(
    file: Path, bundle: Bundle, facts: BundleFacts, trial: EvaluationSet, tolerances: ToleranceSet
) -> RunResult | MissingEngineRun:
    engine = bundle.manifest.engine
    needs = what_runs_a_plan(facts.flavour.value, engine.version, list(engine.gpus))
    if not file.is_file():
        return MissingEngineRun(f"{file.name} is missing", needs)
    try:
        return try_plan(EnginePlan(file.read_bytes(), facts.flavour, needs), trial, tolerances.engine)
    except SpachError as error:  # a damaged plan in a bundle; that it was changed is a finding already
        return MissingEngineRun(error.message.rstrip("."), needs)


# Accuracy


def _with_accuracy(found: Validation, request: ValidationRequest, answered: ImagesReference) -> Validation:
    """With the accuracy of what ran first, where the images have labels."""
    labels = answered.labels
    if labels is None:
        _check_not_bounded(request, answered)
        return found
    ran = found.evidence[0] if found.evidence else None
    logits = None if ran is None else ran.logits
    if ran is None or logits is None or logits.shape != found.trial.logits.shape:
        return _without_accuracy(found)
    measured = paired(found.trial.logits, logits, labels.classes)
    accuracy = Accuracy(measured, ran.ran, labels.origin, request.max_drop, labels.notes)
    return dataclasses.replace(found, accuracy=accuracy)


def _check_not_bounded(request: ValidationRequest, answered: ImagesReference) -> None:
    if request.max_drop is not None:
        reason = answered.notes[-1] if answered.notes else f"{request.images} has no array 'labels'."
        raise UsageError(f"--max-drop needs labels. {reason}", "Give --labels FILE.")


def _without_accuracy(found: Validation) -> Validation:
    return dataclasses.replace(found, notes=(*found.notes, "Accuracy was not measured: there are no logits to rank."))

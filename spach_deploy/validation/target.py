"""Validate what a user points at: a bundle, its engine.plan, its model.onnx, or another graph beside its manifest."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from pathlib import Path

from spach_deploy.bundle import GOLDEN, GRAPH, MANIFEST, PLAN, REPORT, Bundle, find_bundle, sha256_of
from spach_deploy.errors import BundleError, SpachError, UsageError
from spach_deploy.runtime.plan_identity import PlanIdentity, identify_plan_file
from spach_deploy.specs import WeightSource
from spach_deploy.validation.bundle_facts import BundleFacts
from spach_deploy.validation.evidence import Evidence, Trial, examine_typed
from spach_deploy.validation.live_reference import Weights, rebuilt_on_golden, rebuilt_on_images
from spach_deploy.validation.reference import Golden
from spach_deploy.validation.tolerance import ToleranceSet
from spach_deploy.validation.validate import (
    MissingEngineRun,
    Plan,
    Subject,
    Validation,
    golden_trial,
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
class ValidationRequest:
    """What `spach-validate` was asked. `weights` None: those that the bundle was made with."""

    target: Path
    images: Path | None = None
    checkpoint: Path | None = None
    weights: WeightSource | None = None
    max_images: int = DEFAULT_MAX_IMAGES
    accept_graph: bool = False


def validate_target(request: ValidationRequest, say: Callable[[str], None] = lambda text: None) -> Validation:
    """Compare what `request.target` computes with PyTorch in FP32.

    `say` gets a sentence for what takes long. Raises UsageError for what cannot be validated (no bundle, no reference
    that can be trusted, files that are no plan and no graph), UnavailableError when nothing can be run here.
    """
    bundle = _open(request.target)
    kind = _kind(request.target, bundle)
    facts = BundleFacts.of(bundle)
    _check_form(request.target, kind)
    changed = {name: state for name, state in bundle.changed_files().items() if name != REPORT}
    trial, tolerances, notes = _trial(bundle, facts, request, changed, say)
    subject = _subject(request.target, bundle, facts)
    if kind is TargetKind.GRAPH:
        note = _graph_note(request.target, bundle)
        evidence = examine_typed(request.target, facts.precision, trial, tolerances.graph)
        return Validation(subject, trial, evidence, notes=(*notes, *note))
    findings = _file_findings(request.target, kind, bundle, changed)
    evidence, missing = _plan_or_graph(request.target, kind, bundle, facts, trial, tolerances)
    if missing is not None and not findings:
        notes = (*notes, "By its SHA-256 the plan is the one that was built from this graph.")
    return Validation(subject, trial, evidence, findings, notes, missing, request.accept_graph)


# What it is


def _open(target: Path) -> Bundle:
    """The bundle that the target belongs to, its files not yet verified."""
    if not target.exists() and target.name == PLAN and (target.parent / MANIFEST).is_file():
        bundle = Bundle.open(target.parent, verify=False)
        _check_has_plan(bundle)
        raise BundleError(f"{target} is missing from its bundle.", _EXPORT_AGAIN)
    return Bundle.open(find_bundle(target), verify=False)


def _check_has_plan(bundle: Bundle) -> None:
    if bundle.plan is None:
        reason = str(bundle.manifest.engine.get("reason", "none was built")).rstrip(".")
        raise BundleError(
            f"Bundle {bundle.path} has no {PLAN}: {reason}.",
            f"Validate the bundle or its {GRAPH}, or export it with --engine auto.",
        )


def _kind(target: Path, bundle: Bundle) -> TargetKind:
    if target.is_dir():
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


def _check_form(target: Path, kind: TargetKind) -> None:
    """Refuse a file that is not what its name says, before any work."""
    if kind is TargetKind.PLAN and not (identity := _identify(target)).is_plan:
        raise UsageError(f"{target} is not a whole TensorRT plan: {identity.problem}.", _EXPORT_AGAIN)
    if kind is TargetKind.GRAPH:
        _check_is_onnx(target)


def _identify(target: Path) -> PlanIdentity:
    try:
        return identify_plan_file(target)
    except OSError as error:
        raise BundleError(f"{target} cannot be read ({error.strerror or error}).", "Check its permissions.") from None


def _check_is_onnx(target: Path) -> None:
    import onnx

    try:
        has_nodes = bool(onnx.load(target, load_external_data=False).graph.node)
    except Exception as error:  # protobuf's own exceptions, and OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{target} is not an ONNX graph ({reason}).", f"Give a bundle's {GRAPH}.") from None
    if not has_nodes:
        raise UsageError(f"{target} is not an ONNX graph: it has no nodes.", f"Give a bundle's {GRAPH}.")


def _subject(target: Path, bundle: Bundle, facts: BundleFacts) -> Subject:
    model = bundle.manifest.model
    return Subject(str(target), str(model["name"]), facts.precision.value, model.get("origin") != "checkpoint")


# Images and reference


def _trial(
    bundle: Bundle,
    facts: BundleFacts,
    request: ValidationRequest,
    changed: dict[str, str],
    say: Callable[[str], None],
) -> tuple[Trial, ToleranceSet, tuple[str, ...]]:
    """The images with the reference's answers, the bounds that hold for them, and remarks."""
    section, weights = bundle.manifest.model, Weights(request.checkpoint, request.weights)
    if request.images is not None:
        trial, tolerances = rebuilt_on_images(section, facts, request.images, request.max_images, weights, say)
        notes = (f"{GOLDEN} {changed[GOLDEN]}; it was not used.",) if GOLDEN in changed else ()
        return trial, tolerances, notes
    if GOLDEN in changed:
        raise BundleError(
            f"{bundle.path / GOLDEN} {changed[GOLDEN]} since the export, so there is no reference to trust.",
            "Give --images DIR with the --checkpoint FILE that the bundle was made from, or export it again.",
        )
    golden = Golden.load(bundle.file(GOLDEN))
    images = str(bundle.manifest.content["validation"].get("images", "the bundle's golden pack"))
    trial = golden_trial(golden, images, facts.outputs, facts.batch)
    if request.checkpoint is not None:
        trial = rebuilt_on_golden(section, facts, trial, weights, say)
    return trial, facts.tolerances, ()


# Evidence


def _file_findings(target: Path, kind: TargetKind, bundle: Bundle, changed: dict[str, str]) -> tuple[str, ...]:
    findings = [f"{name} {state} since the bundle was exported." for name, state in changed.items() if name != GOLDEN]
    is_other = kind is TargetKind.PLAN and target.resolve() != (bundle.path / PLAN).resolve()
    if is_other and sha256_of(target) != bundle.manifest.files[PLAN]:
        findings.append(f"{target.name} is not the plan that was exported: its SHA-256 is not the manifest's.")
    return tuple(findings)


def _graph_note(target: Path, bundle: Bundle) -> tuple[str, ...]:
    if sha256_of(target) == bundle.manifest.files.get(GRAPH):
        return ()
    return (f"{target.name} differs from the graph that was exported; the numbers decide.",)


def _plan_or_graph(
    target: Path, kind: TargetKind, bundle: Bundle, facts: BundleFacts, trial: Trial, tolerances: ToleranceSet
) -> tuple[tuple[Evidence, ...], MissingEngineRun | None]:
    """Evidence of the plan where it runs here, else of the graph, and why the plan did not run."""
    missing: MissingEngineRun | None = None
    if bundle.plan is not None:
        plan_file = target if kind is TargetKind.PLAN else bundle.plan
        tried = _try_file(plan_file, bundle, facts, trial, tolerances)
        if isinstance(tried, Evidence):
            return (tried,), None
        missing = tried
    graph = bundle.path / GRAPH
    if not graph.is_file():
        return (), missing
    return examine_typed(graph, facts.precision, trial, tolerances.graph), missing


def _try_file(
    file: Path, bundle: Bundle, facts: BundleFacts, trial: Trial, tolerances: ToleranceSet
) -> Evidence | MissingEngineRun:
    engine = bundle.manifest.engine
    needs = what_runs_a_plan(facts.flavour.value, str(engine.get("version", "")), list(engine.get("gpus", ())))
    if not file.is_file():
        return MissingEngineRun(f"{file.name} is missing", needs)
    try:
        return try_plan(Plan(file.read_bytes(), facts.flavour, needs), trial, tolerances.engine)
    except SpachError as error:  # a damaged plan in a bundle; that it was changed is a finding already
        return MissingEngineRun(error.message.rstrip("."), needs)


def default_report(target: Path) -> Path | None:
    """Where a report goes that nobody asked a place for: into the bundle, when the target is a part of it."""
    directory = find_bundle(target)
    is_part = target.is_dir() or target.name in (PLAN, GRAPH)
    return directory / REPORT if is_part else None

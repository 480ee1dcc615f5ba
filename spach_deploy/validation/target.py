"""Validate what the user names: a bundle, its engine.plan or model.onnx, or another graph in the bundle's folder; or a
folder that spach-package onnxruntime wrote.

`validate_target` checks the options and the files, gets images with the reference's outputs, runs the plan or the
graph, and adds what was asked for: accuracy, the user's answers, bisection.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import of_role
from spach_deploy.bundle.store import (
    CONTEXT,
    GOLDEN,
    GRAPH,
    MANIFEST,
    ONNXRUNTIME,
    OPENVINO_MODEL,
    PLAN,
    REWRITTEN,
    Bundle,
    find_bundle,
)
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
from spach_deploy.graph.ep_context import EPContext
from spach_deploy.graph.external_data import missing_data
from spach_deploy.options.specs import Role, WeightSource
from spach_deploy.runtime.openvino_runner import runner_of
from spach_deploy.runtime.plan_identity import PlanIdentity, identify_plan_file
from spach_deploy.validation.accuracy import Accuracy, paired
from spach_deploy.validation.bundle_facts import BundleFacts, QuantizationFacts, check_interface
from spach_deploy.validation.live_reference import (
    ImagesReference,
    ImagesSpec,
    Weights,
    rebuild,
    rebuilt_on_cluster,
    rebuilt_on_golden,
    rebuilt_on_images,
)
from spach_deploy.validation.result import (
    EnginePlan,
    MissingEngineRun,
    ReportHeader,
    Validation,
    golden_set,
    report_header,
    try_plan,
    what_runs_a_plan,
)
from spach_deploy.validation.runs import (
    EvaluationSet,
    Level,
    RunResult,
    examine_runner,
    examine_typed,
    executions_here,
    in_other_batches,
    run_result,
    runs_here,
    truncation_notes,
)
from spach_deploy.validation.tolerance import ToleranceSet

DEFAULT_MAX_IMAGES = 256
_EXPORT_AGAIN = "Export the bundle again."
_PLAN_SUFFIXES = (".plan", ".engine", ".trt")


class TargetKind(enum.Enum):
    """What the user named."""

    BUNDLE = "bundle"
    PLAN = "plan"
    GRAPH = "graph"
    FOLDER = "folder"
    """A folder for ONNX Runtime: its graph, which no plan was built from, and the plan in an EPContext model."""


@dataclasses.dataclass(frozen=True)
class _Target:
    """What the user named, and the bundle that it belongs to."""

    path: Path
    kind: TargetKind
    bundle: Bundle
    facts: BundleFacts

    @property
    def graph(self) -> Path:
        return self.path if self.kind is TargetKind.GRAPH else self.bundle.path / GRAPH


@dataclasses.dataclass(frozen=True)
class ValidationRequest:
    """The options of `spach-validate`. `weights` None, `ignore` empty: as the export had them.

    `against`: the bundle to compare an external graph with. `bisect`: also find the wrong step and module. `labels`: of
    `images`, a file or the same folder. `max_drop`: allowed drop of top-1, in points. `answers`: an npz of the user's
    own inputs and logits, to compare the reference with. `cluster`: where to run the images; None for this process.
    """

    target: Path
    images: Path | None = None
    checkpoint: Path | None = None
    weights: WeightSource | None = None
    ignore: tuple[str, ...] = ()
    module: str | None = None
    max_images: int = DEFAULT_MAX_IMAGES
    accept_graph: bool = False
    bisect: bool = False
    against: Path | None = None
    labels: Path | None = None
    max_drop: float | None = None
    answers: Path | None = None
    cluster: ClusterAddress | None = None

    @property
    def given_weights(self) -> Weights:
        """Where the user's copy of the bundle's weights is."""
        return Weights(self.checkpoint, self.weights, self.ignore, self.module)

    @classmethod
    def of(cls, target: Path, given: Mapping[str, Any]) -> ValidationRequest:
        """From the values of spach-validate's options by key; missing ones have their defaults."""
        weights = given.get("weights")
        return cls(
            target=target,
            images=given.get("images"),
            checkpoint=given.get("checkpoint"),
            weights=None if weights is None else WeightSource(weights),
            ignore=given.get("ignore", ()),
            module=given.get("module"),
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

    `say` receives a sentence before each part that takes long. Raises UsageError for what cannot be validated (no
    bundle, no reference to trust, a file that is neither plan nor graph), UnavailableError where nothing can run here.
    """
    _check_options(request)
    if request.against is not None:
        return _validate_external(request, request.against, say)
    bundle = _open(request.target)
    kind = _kind(request.target, bundle)
    facts = BundleFacts.of(bundle)
    changed = _changed_files(bundle)
    check_has_classes(facts, request)
    _check_form(request.target, kind, changed)
    _check_processor(bundle)
    if GRAPH not in changed:
        check_interface(bundle)
    target = _Target(request.target, kind, bundle, facts)
    _check_cluster(request, target)
    reference = _images_reference(bundle, facts, request, changed, say, target.graph)
    validation = _validation(request, target, reference, changed)
    validation = _with_accuracy(validation, request, reference)
    if request.answers is not None:
        validation = _with_user_answers(validation, request.answers, bundle, request.given_weights, say)
    return _bisected(validation, request, target, say) if request.bisect else validation


def check_has_classes(facts: BundleFacts, request: ValidationRequest) -> None:
    """UsageError for labels, or a bound on accuracy, where the graph has no logits."""
    given = (("--labels", request.labels), ("--max-drop", request.max_drop))
    if of_role(facts.outputs, Role.LOGITS) is None and (flags := [flag for flag, value in given if value is not None]):
        names = ", ".join(tensor.name for tensor in facts.outputs)
        raise UsageError(
            f"{flags[0]} is about classes, and the bundle has no logits to rank; it gives {names}.",
            f"Leave {' and '.join(flags)} out, or export with --outputs logits too.",
        )


def _changed_files(bundle: Bundle) -> dict[str, str]:
    return {name: state for name, state in bundle.changed_files().items() if name not in REWRITTEN}


def _with_user_answers(
    validation: Validation, answers: Path, bundle: Bundle, weights: Weights, say: Callable[[str], None]
) -> Validation:
    """The validation, with the agreement of the bundle's reference with the user's answers; a finding where they
    disagree.
    """
    from spach_deploy.validation.user_answers import check_is_ours, compared, hold_to_answers, read_answers

    check_is_ours(bundle.manifest.model.origin)
    given = read_answers(answers)
    say("Comparing the reference with your answers.")
    loaded = rebuild(bundle.manifest.model, weights, bundle.manifest.outputs)
    loaded = dataclasses.replace(loaded, settings=validation.header.settings or loaded.settings)
    other = ""
    try:
        _, agreement = hold_to_answers(loaded, given, say, is_fixed=True)
    except MismatchError as error:
        agreement, other = compared(loaded, given), f"{error.message} {error.hint}"
    header = dataclasses.replace(validation.header, answers=agreement)
    return dataclasses.replace(validation, other_model=other, header=header)


def _check_processor(bundle: Bundle) -> None:
    if bundle.needs_vnni and not has_vnni():
        raise UnavailableError(
            "The bundle's INT8 graph is for CPUs with VNNI, and this one has none: its sums would overflow here.",
            "Validate it where it will run, or export it without --vnni.",
        )


def _validate_external(request: ValidationRequest, against: Path, say: Callable[[str], None]) -> Validation:
    """Validate a graph that did not come from an export, against the bundle of `--against`."""
    from spach_deploy.validation.external_graph import validate_external

    if not against.is_dir():
        raise UsageError(f"--against {against} is no directory.", "Give a bundle.")
    if not request.target.is_file():
        raise UsageError(f"{request.target} is not there, or no file.", "Give an ONNX graph.")
    _check_is_onnx(request.target)
    bundle = Bundle.open(against, verify=False)
    facts = BundleFacts.of(bundle)
    facts.check_one_input("--against compares graphs of one", "Validate the bundle itself.")
    changed = _changed_files(bundle)
    reference = _images_reference(bundle, facts, request, changed, say)
    header = report_header(str(request.target), bundle, facts.precision)
    weights = request.given_weights
    validation = validate_external(header, bundle, facts, reference, weights, say)
    return dataclasses.replace(validation, findings=(*_file_findings(changed), *validation.findings))


def _bisected(
    validation: Validation, request: ValidationRequest, target: _Target, say: Callable[[str], None]
) -> Validation:
    from spach_deploy.validation.bisect_validation import BisectRequest, bisected

    weights = request.given_weights
    return bisected(validation, BisectRequest(target.graph, target.bundle, target.facts, weights), say)


def _validation(
    request: ValidationRequest, target: _Target, reference: ImagesReference, changed: dict[str, str]
) -> Validation:
    header = report_header(str(request.target), target.bundle, target.facts.precision)
    if target.kind is TargetKind.GRAPH:
        return _graph_validation(header, target, reference, changed)
    of_kind = _folder_validation if target.kind is TargetKind.FOLDER else _plan_validation
    validation = of_kind(header, target, reference, changed)
    return dataclasses.replace(validation, graph_suffices=request.accept_graph)


def _graph_validation(
    header: ReportHeader, target: _Target, reference: ImagesReference, changed: dict[str, str]
) -> Validation:
    """The validation of a graph file, which may differ from the bundle's."""
    note = _graph_note(target.path, target.bundle)
    others = {name: state for name, state in changed.items() if name != target.path.name}
    return Validation(
        header,
        reference.eval_set,
        _graph_evidence(target.path, target.facts, reference),
        (*_file_findings(others), *_quantization_findings(target)),
        (*reference.notes, *truncation_notes(target.path, target.facts.rest), *note),
        trace=None if note or target.bundle.manifest.graph.made else target.bundle.manifest.validation.trace,
    )


def _plan_validation(
    header: ReportHeader, target: _Target, reference: ImagesReference, changed: dict[str, str]
) -> Validation:
    """The validation of a plan or a bundle; of its graph where the plan does not run here."""
    path, kind, bundle, facts, notes = target.path, target.kind, target.bundle, target.facts, reference.notes
    other = (*_other_plan_findings(path, kind, bundle), *_other_graph_findings(kind, bundle))
    findings = (*_file_findings(changed), *other, *_quantization_findings(target))
    evidence, missing = _plan_or_graph(path, kind, bundle, facts, reference)
    if missing is not None and not findings:
        notes = (*notes, "By its SHA-256 the plan is the one that was built from this graph.")
    if _lacks_openvino(bundle):
        notes = (*notes, "What --target cpu chose runs in OpenVINO and was not compared here: pip install openvino.")
    if any(item.level is Level.GRAPH for item in evidence):
        notes = (*notes, *truncation_notes(bundle.path / GRAPH, facts.rest))
    trace = None if GRAPH in changed else bundle.manifest.validation.trace  # of the export's graph
    return Validation(header, reference.eval_set, evidence, findings, notes, missing, trace=trace)


def _folder_validation(
    header: ReportHeader, target: _Target, reference: ImagesReference, changed: dict[str, str]
) -> Validation:
    """The validation of a folder for ONNX Runtime: its graph's runs, and the plan's where it runs here."""
    bundle, facts, graph = target.bundle, target.facts, target.graph
    evidence = _graph_evidence(graph, facts, reference) if graph.is_file() else ()
    findings, missing = _file_findings(changed, "the folder was written"), None
    if CONTEXT in changed:
        missing = MissingEngineRun(f"{CONTEXT} {changed[CONTEXT]}", _needs(bundle))
    elif CONTEXT in bundle.manifest.files:
        try:
            context = EPContext.read(bundle.path / CONTEXT)
            findings = (*findings, *(() if GRAPH in changed else context.problems(graph)))
            plan = EnginePlan(context.plan, facts.flavour, _needs(bundle))
            ran = try_plan(plan, reference.eval_set, reference.tolerances.engine)
            evidence, missing = ((ran, *evidence), None) if isinstance(ran, RunResult) else (evidence, ran)
        except SpachError as error:  # no EPContext model, or no plan where it names one
            findings = (*findings, error.message)
            missing = MissingEngineRun(error.message.rstrip("."), _needs(bundle))
        findings = (*findings, *_other_source_findings(bundle))
    if missing is not None:
        instead = f"{GRAPH} ran instead, in the form for ONNX Runtime."
        missing = dataclasses.replace(missing, instead=instead)
    notes = (*reference.notes, *truncation_notes(graph, facts.rest)) if graph.is_file() else reference.notes
    findings = (*findings, *_quantization_findings(target))
    return Validation(header, reference.eval_set, evidence, findings, notes, missing)


def _other_source_findings(bundle: Bundle) -> tuple[str, ...]:
    """A finding where graph and plan were not made of one graph, if the manifest has the hashes of both."""
    built_from, made = bundle.manifest.engine.graph_sha256, bundle.manifest.graph.made
    source = bundle.manifest.sha256(GRAPH) if made is None else made.graph_sha256
    if built_from in (None, source):
        return ()
    return (f"By its manifest, the plan was built from another graph than {GRAPH} was made of.",)


def _needs(bundle: Bundle) -> str:
    engine = bundle.manifest.engine
    return what_runs_a_plan(engine.flavour.value, engine.version, list(engine.gpus))


def _check_options(request: ValidationRequest) -> None:
    """Refuse --labels without --images, and a --max-drop that is no number of points or has no labels."""
    _check_cluster_options(request)
    if request.labels is not None and request.images is None:
        raise UsageError("--labels needs --images: the bundle's golden images are too few.", "Give --images PATH too.")
    if request.max_drop is None:
        return
    if not (math.isfinite(request.max_drop) and 0 <= request.max_drop <= 100):
        raise UsageError(f"--max-drop {request.max_drop:g} is no number of points.", "Give 0 to 100, such as 0.3.")
    brings_labels = request.images is not None and request.images.suffix.lower() == ".npz"
    if request.labels is None and not brings_labels:
        raise UsageError("--max-drop needs labels.", "Give --images PATH and --labels FILE.")


def _check_cluster_options(request: ValidationRequest) -> None:
    """Refuse options that a cluster does not support."""
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


def _check_cluster(request: ValidationRequest, target: _Target) -> None:
    """Refuse to run a plan: a cluster runs graphs. Why a plan does not run here is part of the result instead."""
    if request.cluster is None:
        return
    hint = f"Give {target.bundle.path / GRAPH}, or leave --ray out."
    if target.kind is TargetKind.PLAN:
        raise UsageError("--ray runs graphs in ONNX Runtime, and no plans.", hint)
    plan = target.bundle.plan if target.kind is TargetKind.BUNDLE else None
    if plan is not None and plan.is_file() and runs_here(plan.read_bytes(), target.facts.flavour):
        raise UsageError("--ray runs graphs in ONNX Runtime, and this machine can run the plan itself.", hint)


# The target


def _open(target: Path) -> Bundle:
    """The target's bundle, its files not yet verified."""
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
    if ONNXRUNTIME.lie_in(bundle.path) and (target.is_dir() or target.name in (MANIFEST, PLAN, CONTEXT)):
        return TargetKind.FOLDER
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
    """Refuse a file that is not what its name says, before any work. ChangedFileError where an export wrote it."""
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


def _images_reference(
    bundle: Bundle,
    facts: BundleFacts,
    request: ValidationRequest,
    changed: dict[str, str],
    say: Callable[[str], None],
    graph: Path | None = None,
) -> ImagesReference:
    """The images with the reference's outputs, the tolerances that hold for them, and notes.

    With --ray also the outputs of `graph`.
    """
    section, weights = bundle.manifest.model, request.given_weights
    if request.images is not None:
        spec = ImagesSpec(request.images, request.max_images, request.labels)
        if request.cluster is not None and graph is not None:
            request.cluster.check()
            reference = rebuilt_on_cluster(section, facts, spec, weights, graph, request.cluster, say)
        else:
            reference = rebuilt_on_images(section, facts, spec, weights, say)
        notes = (f"{GOLDEN} {changed[GOLDEN]}; it was not used.",) if GOLDEN in changed else ()
        return dataclasses.replace(reference, notes=(*notes, *reference.notes))
    if GOLDEN in changed:
        raise ChangedFileError(
            f"{bundle.path / GOLDEN} {changed[GOLDEN]} since the export, so there is no reference to trust.",
            "Give --images DIR with the --checkpoint FILE that the bundle was made from, or export it again.",
        )
    golden = Golden.load(bundle.file(GOLDEN))
    eval_set = golden_set(golden, bundle.manifest.validation.images, facts.outputs, facts.batch, facts.inputs)
    if request.checkpoint is not None or request.module is not None:
        eval_set = rebuilt_on_golden(section, facts, eval_set, weights, say)
    return ImagesReference(eval_set, facts.tolerances)


# Runs and findings


def _file_findings(changed: dict[str, str], since: str = "the bundle was exported") -> tuple[str, ...]:
    """Files that were changed. A changed golden pack is no finding, because it is not used then."""
    return tuple(f"{name} {state} since {since}." for name, state in changed.items() if name != GOLDEN)


def _other_graph_findings(kind: TargetKind, bundle: Bundle) -> tuple[str, ...]:
    """A finding where the plan was built from another graph, if the manifest has the hash that the builder reported."""
    built_from = bundle.manifest.engine.graph_sha256
    if kind is TargetKind.GRAPH or built_from in (None, bundle.manifest.sha256(GRAPH)):
        return ()
    return (f"By its manifest, {PLAN} was built from another graph than {GRAPH}.",)


def _other_plan_findings(target: Path, kind: TargetKind, bundle: Bundle) -> tuple[str, ...]:
    is_other = kind is TargetKind.PLAN and target.resolve() != (bundle.path / PLAN).resolve()
    if is_other and sha256_of(target) != bundle.manifest.sha256(PLAN):
        return (f"{target.name} is not the plan that was exported: its SHA-256 is not the manifest's.",)
    return ()


def _quantization_findings(target: _Target) -> tuple[str, ...]:
    """Where the graph's scales and Q/DQ pairs differ from the bundle's quantization plan."""
    if target.facts.quantization is None or not target.graph.is_file():
        return ()
    findings = tuple(f"Quantization: {finding}." for finding in _audited(target.graph, target.facts.quantization))
    calibrated, weights = target.facts.quantization.weights_sha256, target.bundle.manifest.model.weights_sha256
    if calibrated == weights:
        return findings
    other = f"Quantization: its scales are of other weights ({calibrated[:16]}) than the bundle's ({weights[:16]})."
    return (other, *findings)


def _audited(graph: Path, facts: QuantizationFacts) -> Iterable[str]:
    import onnx
    import onnx_ir as ir

    from spach_deploy.quantization.plan import read_plan
    from spach_deploy.quantization.qdq import audit
    from spach_deploy.quantization.spelt_quantize import join_quantizers

    plan = read_plan(facts.record)
    try:
        model = ir.from_proto(onnx.load(graph))
        join_quantizers(model)
        return audit(model, plan)
    except Exception as error:  # a graph that somebody changed may break any reader, in the reader's own exceptions
        return (f"its scales cannot be read ({type(error).__name__}: {error})",)


def _graph_note(target: Path, bundle: Bundle) -> tuple[str, ...]:
    if sha256_of(target) == bundle.manifest.sha256(GRAPH):
        return ()
    return (f"{target.name} differs from the graph that was exported; the numbers decide.",)


def _plan_or_graph(
    target: Path, kind: TargetKind, bundle: Bundle, facts: BundleFacts, reference: ImagesReference
) -> tuple[tuple[RunResult, ...], MissingEngineRun | None]:
    """The plan's run where it runs here; else the graph's runs, and why the plan did not run."""
    missing: MissingEngineRun | None = None
    if bundle.plan is not None:
        plan_file = target if kind is TargetKind.PLAN else bundle.plan
        tried = _try_plan_file(plan_file, bundle, facts, reference.eval_set, reference.tolerances)
        if isinstance(tried, RunResult):
            return (tried,), None
        missing = tried
    graph = bundle.path / GRAPH
    of_graph = _graph_evidence(graph, facts, reference) if graph.is_file() else ()
    return (*_in_openvino(bundle, reference), *of_graph), missing


def _in_openvino(bundle: Bundle, reference: ImagesReference) -> tuple[RunResult, ...]:
    """The run of what --target cpu chose, where that is for OpenVINO and OpenVINO is installed."""
    if _lacks_openvino(bundle) or not bundle.is_for_openvino or reference.graph is not None:
        return ()
    what = f"what --target cpu chose, {OPENVINO_MODEL if OPENVINO_MODEL in bundle.manifest.files else GRAPH},"
    with runner_of(bundle) as runner:
        return (examine_runner(runner, Level.GRAPH, reference.eval_set, reference.tolerances.graph, what),)


def _lacks_openvino(bundle: Bundle) -> bool:
    return bundle.is_for_openvino and importlib.util.find_spec("openvino") is None


def _graph_evidence(graph: Path, facts: BundleFacts, reference: ImagesReference) -> tuple[RunResult, ...]:
    """The graph's runs, compared. Where it did not run together with the reference, it runs now."""
    eval_set, bounds = reference.eval_set, reference.tolerances.graph
    if reference.graph is None:
        return examine_typed(graph, facts.rest, eval_set, bounds)
    first, *others = reference.graph
    whole = in_other_batches(executions_here(graph, facts.rest)[0], graph, first, eval_set)
    return tuple(run_result(Level.GRAPH, ran, eval_set, bounds) for ran in (whole, *others))


def _try_plan_file(
    file: Path, bundle: Bundle, facts: BundleFacts, eval_set: EvaluationSet, tolerances: ToleranceSet
) -> RunResult | MissingEngineRun:
    needs = _needs(bundle)
    if not file.is_file():
        return MissingEngineRun(f"{file.name} is missing", needs)
    try:
        return try_plan(EnginePlan(file.read_bytes(), facts.flavour, needs), eval_set, tolerances.engine)
    except SpachError as error:  # a damaged plan in a bundle; that it was changed is a finding already
        return MissingEngineRun(error.message.rstrip("."), needs)


# Accuracy


def _with_accuracy(validation: Validation, request: ValidationRequest, reference: ImagesReference) -> Validation:
    """The validation, with the accuracy of the first run where the images have labels."""
    labels = reference.labels
    if labels is None:
        _check_max_drop_unused(request, reference)
        return validation
    ran = validation.evidence[0] if validation.evidence else None
    exact = validation.eval_set.logits
    logits = None if ran is None else validation.eval_set.logits_of(ran.outputs)
    if ran is None or exact is None or logits is None or logits.shape != exact.shape:
        return _without_accuracy(validation)
    measured = paired(exact, logits, labels.classes)
    accuracy = Accuracy(measured, ran.ran, labels.origin, request.max_drop, labels.notes)
    return dataclasses.replace(validation, accuracy=accuracy)


def _check_max_drop_unused(request: ValidationRequest, reference: ImagesReference) -> None:
    if request.max_drop is not None:
        reason = reference.notes[-1] if reference.notes else f"{request.images} has no array 'labels'."
        raise UsageError(f"--max-drop needs labels. {reason}", "Give --labels FILE.")


def _without_accuracy(validation: Validation) -> Validation:
    note = "Accuracy was not measured: there are no logits to rank."
    return dataclasses.replace(validation, notes=(*validation.notes, note))

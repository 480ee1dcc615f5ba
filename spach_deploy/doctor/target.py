"""Whether this machine can run a bundle or a plan, and if not why, in the terms of what would have to change."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spach_deploy._version import __version__
from spach_deploy.bundle import GOLDEN, GRAPH, MANIFEST, PLAN, REPORT, Bundle, sha256_of
from spach_deploy.doctor.capability import RUNS_ON
from spach_deploy.doctor.commands import exporting
from spach_deploy.doctor.finding import Finding, Status, Task, blockers
from spach_deploy.doctor.fit import Plan, fit
from spach_deploy.doctor.here import Here, ask_tensorrt
from spach_deploy.doctor.other_file import what_it_is
from spach_deploy.doctor.plan_file import PlanFile, find_plan
from spach_deploy.doctor.probe import Answer
from spach_deploy.engine.gpus import parse_gpus
from spach_deploy.errors import BundleError, UsageError
from spach_deploy.specs import BatchProfile, ComputeCapability, Flavour

_RUN, _VERIFY = (Task.RUN,), (Task.VERIFY,)
_EXPORT_AGAIN = "Export it again."
_PLAN_SUFFIXES = (".plan", ".engine", ".trt")
_LISTED = 3

AskTensorRT = Callable[[Flavour, bytes], Answer]


@dataclasses.dataclass(frozen=True)
class Target:
    """What was found about a target. `name` says in words what it is."""

    path: str
    name: str
    findings: tuple[Finding, ...]

    @property
    def can_run(self) -> bool:
        """Whether nothing found stands in the way; TensorRT has the last word."""
        return not blockers(self.findings, Task.RUN)

    @property
    def is_bad(self) -> bool:
        """Whether the target itself is at fault, wherever it would run."""
        return any(finding.bad_target for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0 it can run here, 3 it cannot, 2 the target itself is at fault."""
        return 2 if self.is_bad else 0 if self.can_run else 3

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "spach_deploy": __version__,
            "exit_code": self.exit_code,
            "target": self.path,
            "is": self.name,
            "can_run": self.can_run and not self.is_bad,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def examine_target(path: Path, here: Here, ask: AskTensorRT = ask_tensorrt) -> Target:
    """What a bundle, a file of a bundle, or a plan from anywhere needs, against what is here.

    `ask` is what the installed TensorRT says of a plan's header. Raises UsageError for what is neither a bundle nor a
    plan, with what it is.
    """
    try:
        if path.is_dir():
            return _directory(path, here, ask)
        if path.name == PLAN and not path.exists() and (path.parent / MANIFEST).is_file():
            return _bundle(path, Bundle.open(path.parent, verify=False), here, ask)
        _check_is_file(path)
        return _file(path, here, ask)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}).", "Check its permissions.") from None


def _check_is_file(path: Path) -> None:
    if not path.exists():
        raise UsageError(f"{path} does not exist.", "Give a bundle directory or an engine.plan.")
    if not path.is_file():
        raise UsageError(f"{path} is neither a file nor a directory.", "Give a bundle directory or an engine.plan.")


def _directory(path: Path, here: Here, ask: AskTensorRT) -> Target:
    if (path / MANIFEST).is_file():
        return _bundle(path, Bundle.open(path, verify=False), here, ask)
    inside = sorted(found for suffix in _PLAN_SUFFIXES for found in _within(path, suffix))
    if not inside:
        raise BundleError(f"{path} is a directory without {MANIFEST}, so it is no bundle.", "Give a bundle or a plan.")
    listed = ", ".join(str(found) for found in inside[:_LISTED])
    more = f" and {len(inside) - _LISTED} more" if len(inside) > _LISTED else ""
    hint = f"It holds plans, though: {listed}{more}. Try spach-doctor {shlex.quote(str(inside[0]))}."
    raise BundleError(f"{path} is a directory without {MANIFEST}, so it is no bundle.", hint)


def _within(path: Path, suffix: str) -> Iterator[Path]:
    """Three levels down, as Triton's model repositories have them."""
    for depth in ("", "*/", "*/*/"):
        yield from path.glob(f"{depth}*{suffix}")


def _file(path: Path, here: Here, ask: AskTensorRT) -> Target:
    directory = path.parent
    if path.name in (MANIFEST, PLAN) and (directory / MANIFEST).is_file():
        return _bundle(path, Bundle.open(directory, verify=False), here, ask)
    plan = find_plan(path)
    other = what_it_is(path) if plan is None or plan.offset else None
    if plan is None or (other is not None and other.is_container):
        assert other is not None
        inside = f", with a plan inside it from byte {plan.offset} on" if plan is not None else ""
        raise UsageError(f"{path} is {other.kind}{inside}.", other.advice)
    if (bundle := _bundle_of(path)) is not None:
        return _bundle(directory, bundle, here, ask)
    return _plan(path, plan, here, ask)


def _bundle_of(path: Path) -> Bundle | None:
    """The bundle beside a plan of another name, if it is that bundle's plan."""
    if not (path.parent / MANIFEST).is_file():
        return None
    bundle = Bundle.open(path.parent, verify=False)
    return bundle if bundle.manifest.files.get(PLAN) == sha256_of(path) else None


# A plan without a manifest


def _plan(path: Path, plan: PlanFile, here: Here, ask: AskTensorRT) -> Target:
    name = f"a plan of {plan.flavour.value}, version {plan.version or 'not known'}"
    known = Plan(plan.flavour, plan.version, plan.gpus, plan.newer_gpus)
    findings = (*_shape(path, plan), _origin(), *fit(known, here), *_asked(plan, here, ask))
    return Target(str(path), name, findings)


def _shape(path: Path, plan: PlanFile) -> Iterator[Finding]:
    """Is it a plan and nothing else, and all of it."""
    quoted, size = shlex.quote(str(path)), f"{plan.total_bytes - plan.offset:,} bytes"
    if plan.offset:
        what = f"{plan.before} stand before the plan"
        means = "TensorRT takes the plan only, from its first byte."
        strip = f"tail -c +{plan.offset + 1} {quoted} > plain.plan"
        yield Finding(Status.PROBLEM, "form", what, means, strip, _RUN, bad_target=True)
    if plan.missing_bytes:
        means = "It is cut off, as by a copy that did not end. Copy or build it again."
        what = f"{size}, and its header declares {plan.missing_bytes:,} more"
        yield Finding(Status.PROBLEM, "size", what, means, None, _RUN, bad_target=True)
    elif plan.surplus_bytes:
        declared = plan.total_bytes - plan.offset - plan.surplus_bytes
        means = "Something was appended. What TensorRT makes of that is not known."
        cut = f"tail -c +{plan.offset + 1} {quoted} | head -c {declared} > plain.plan"
        what = f"{size}, {plan.surplus_bytes:,} more than its header declares"
        yield Finding(Status.PROBLEM, "size", what, means, cut, _RUN, bad_target=True)
    elif plan.perhaps_cut:
        means = (
            "Perhaps it is cut off: in published dumps of such headers the number at byte 16 is the size, and larger."
        )
        yield Finding(Status.UNKNOWN, "size", size, means)
    else:
        whole = (
            "As its header declares." if plan.flavour is Flavour.TENSORRT_RTX else "Nothing tells that it is cut off."
        )
        yield Finding(Status.OK, "size", size, whole)


def _origin() -> Finding:
    means = "So nothing tells what it computes, its input profile or whether it was changed; there is no golden data."
    return Finding(
        Status.MISSING, "manifest", "none beside it", means, "spach-export --checkpoint FILE --fp16", _VERIFY
    )


def _asked(plan: PlanFile, here: Here, ask: AskTensorRT) -> Iterator[Finding]:
    """What TensorRT itself says of the header, where there is a GPU to say it of; it loads nothing."""
    package = here.tensorrt.get(plan.flavour)
    if plan.flavour is not Flavour.TENSORRT_RTX or package is None or package.error or not here.driver.gpus:
        return
    said = ask(plan.flavour, plan.head).content or {}
    validity, flaws = said.get("validity"), ", ".join(said.get("flaws", ())).lower().replace("_", " ")
    topic, asked = "header", "asked of tensorrt-rtx itself"
    if validity == "VALID":
        yield Finding(Status.OK, topic, f"valid, {asked}", "It is likely to load.")
    elif validity == "SUBOPTIMAL":
        means = "It is likely to load, but a plan built for this GPU would be faster."
        yield Finding(Status.OK, topic, f"valid but not the best, {asked}", means)
    elif validity == "INVALID":
        means = f"It will not load: {flaws or 'the reason is not told'}."
        yield Finding(Status.PROBLEM, topic, f"invalid, {asked}", means, None, _RUN)


# A bundle


def _bundle(path: Path, bundle: Bundle, here: Here, ask: AskTensorRT) -> Target:
    batch, plan = _read(bundle)
    name = f"{bundle.manifest.model['name']} in {bundle.manifest.precision}, a bundle"
    changed = {name: state for name, state in bundle.changed_files().items() if name != REPORT}
    findings = (
        *_files(bundle, changed),
        _golden(bundle, changed),
        _inputs(bundle, batch),
        *_engine(bundle, plan, changed, here, ask),
        *_graph(bundle, here),
    )
    return Target(str(path), name, findings)


def _read(bundle: Bundle) -> tuple[BatchProfile, Plan]:
    """What the manifest says of batch and plan, and every entry that is used later is looked at once."""
    content = bundle.manifest.content
    try:
        batch, engine = BatchProfile(**content["batch"]), bundle.manifest.engine
        for section in ("model", "output_options", "validation"):
            _ = content[section].keys()
        plan = Plan(
            Flavour(engine["flavour"]),
            str(engine["version"]) if engine.get("version") else None,
            _capabilities(engine.get("gpus")),
            version_compatible=bool(engine.get("version_compatible")),
            hardware_compatible=bool(engine.get("hardware_compatible")),
            rebuild=functools.partial(exporting, bundle),
        )
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        where, reason = bundle.path / MANIFEST, f"{type(error).__name__}: {error}"
        raise BundleError(f"{where} has an entry of the wrong kind ({reason}).", _EXPORT_AGAIN) from None
    return batch, plan


def _files(bundle: Bundle, changed: dict[str, str]) -> Iterator[Finding]:
    for name, state in changed.items():
        means = f"It is not what was exported. {_EXPORT_AGAIN.rstrip('.')}, or copy the bundle again."
        blocks = {PLAN: _RUN, GRAPH: _VERIFY, GOLDEN: _VERIFY}.get(name, ())
        yield Finding(Status.PROBLEM, "files", f"{name} {state}", means, exporting(bundle), blocks, bad_target=True)
    if not changed:
        names = ", ".join(bundle.manifest.files)
        yield Finding(Status.OK, "files", names, "By SHA-256 they are what was exported.", exporting(bundle))


def _golden(bundle: Bundle, changed: dict[str, str]) -> Finding:
    validate = _validate(bundle)
    images = f"{validate} --images DIR --checkpoint FILE"
    if GOLDEN not in bundle.manifest.files or GOLDEN in changed:
        what = f"{GOLDEN} {changed.get(GOLDEN, 'is not in the bundle')}"
        means = "Without it there is nothing to compare with but the reference on other images."
        return Finding(Status.MISSING, "golden data", what, means, images, _VERIFY)
    validation = bundle.manifest.content["validation"]
    count, reference = validation.get("image_count", "some"), validation.get("reference", "the reference")
    what = f"{count} images, answered by {reference}"
    level = validation.get("level")
    if level == "engine":
        means = "At the export the plan itself ran and agreed."
    else:
        means = "At the export the graph agreed; the plan itself did not run there."
    return Finding(Status.OK, "golden data", what, means, validate)


def _validate(bundle: Bundle) -> str:
    return f"spach-validate {shlex.quote(str(bundle.path))}"


def _inputs(bundle: Bundle, batch: BatchProfile) -> Finding:
    """What a caller has to send."""
    tensors = "; ".join(
        f"{tensor.name}: {tensor.dtype} {' x '.join('N' if size is None else str(size) for size in tensor.shape)}"
        f"{f' ({tensor.layout})' if tensor.layout else ''}"
        for tensor in bundle.manifest.inputs
    )
    if batch.min == batch.max:
        means = f"N is {batch.min}, exactly."
    else:
        means = f"N is {batch.min} to {batch.max}; it is fastest at {batch.opt}. spach-validate splits larger batches."
    return Finding(Status.OK, "input profile", tensors, means, exporting(bundle, "--batch", str(batch)))


def _engine(bundle: Bundle, plan: Plan, changed: dict[str, str], here: Here, ask: AskTensorRT) -> Iterator[Finding]:
    if bundle.plan is None:
        reason = str(bundle.manifest.engine.get("reason", "none was built")).rstrip(".")
        again = exporting(bundle, "--engine", "auto")
        means = "The bundle was exported without an engine; its graph can be verified."
        yield Finding(Status.MISSING, PLAN, reason, means, again, _RUN)
        return
    found = None
    if PLAN not in changed:
        found = find_plan(bundle.plan)
        yield _header(plan, found, bundle)
    if plan.flavour in RUNS_ON:
        yield from fit(plan, here)
    if found is not None:
        yield from _asked(found, here, ask)


def _capabilities(gpus: Any) -> tuple[ComputeCapability, ...] | None:
    """What the manifest lists; None for anything but a list of GPUs that are known."""
    try:
        return parse_gpus(",".join(str(gpu) for gpu in gpus)) if isinstance(gpus, list) else None
    except UsageError:
        return None


def _header(plan: Plan, found: PlanFile | None, bundle: Bundle) -> Finding:
    """The plan's own first bytes against the manifest: a bundle may have been put together by hand."""
    size = bundle.file(PLAN).stat().st_size
    what = f"{plan.flavour.value} {plan.version or 'of unknown version'}, {size / 1e6:,.1f} MB"
    again = exporting(bundle, "--engine", plan.flavour.value)
    if found is None or not found.is_whole or found.flavour is not plan.flavour:
        means = "By its first bytes it is no whole plan of that flavour, whatever the manifest says."
        return Finding(Status.PROBLEM, PLAN, what, means, again, _RUN, bad_target=True)
    return Finding(Status.OK, PLAN, what, "A whole plan of that flavour, by its first bytes.", again)


def _graph(bundle: Bundle, here: Here) -> Iterator[Finding]:
    """The graph stands in for a plan that cannot run, where ONNX Runtime is here."""
    if GRAPH not in bundle.manifest.files:
        yield Finding(Status.MISSING, GRAPH, "not in the bundle", "So only the plan can be verified.", None, ())
        return
    accept = f"{_validate(bundle)} --accept graph"
    if here.onnxruntime is None or here.onnxruntime.broken:
        means = "With onnxruntime the graph that the plan was built from can be verified on the CPU."
        yield Finding(Status.MISSING, GRAPH, "onnxruntime is not here", means, accept, _VERIFY)
    else:
        means = "Even where the plan cannot run, the graph that it was built from can be verified."
        yield Finding(
            Status.OK, GRAPH, f"runs in ONNX Runtime {here.onnxruntime.files_version or ''}".rstrip(), means, accept
        )

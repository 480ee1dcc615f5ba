"""The doctor's report on a bundle or a plan: whether this machine can run it, and what would have to change if not.

`about_bundle` looks at a bundle's files, golden data, inputs, plan and graph. `about_form` and `about_header` look at
the bytes of a plan.
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spach_deploy._version import __version__
from spach_deploy.bundle.store import CONTEXT, GOLDEN, GRAPH, MANIFEST, PLAN, REWRITTEN, Bundle, golden_problem
from spach_deploy.common.errors import BundleError, ChangedFileError, UsageError
from spach_deploy.common.files import sha256_of
from spach_deploy.common.machine import has_vnni
from spach_deploy.doctor.commands import exporting, installing
from spach_deploy.doctor.compatibility import RUNS_ON, PlanRequirements, compatibility
from spach_deploy.doctor.driver import ProbeResult
from spach_deploy.doctor.finding import Finding, Status, Task, blockers
from spach_deploy.doctor.machine_info import InstalledOnnxRuntime, MachineInfo, ask_tensorrt
from spach_deploy.doctor.plan_file import PlanFile, find_plan, identify_other_file
from spach_deploy.graph.runtimes import GraphNeeds, readers, reading, runtimes
from spach_deploy.options.command_line import quoted
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import ComputeCapability, Flavour, Precision

FILES = "files"
"""Topic of the findings about changed files."""

_RUN, _VERIFY = (Task.RUN,), (Task.VERIFY,)


def about_bundle(
    bundle: Bundle, info: MachineInfo, ask: AskTensorRT, needs: GraphNeeds | None, runs: GraphRuntime
) -> tuple[Finding, ...]:
    """All findings about a bundle; compares its files with their hashes. `needs`, `runs`: of its graph.

    Raises BundleError for a manifest with entries of the wrong kind, OSError where a file cannot be read.
    """
    plan = _requirements(bundle)
    changed = {name: state for name, state in bundle.changed_files().items() if name not in REWRITTEN}
    return (
        *_files(bundle, changed),
        _golden(bundle, changed),
        _inputs(bundle),
        *_engine(bundle, plan, changed, info, ask, runs),
        _graph(bundle, info, needs),
        *_readers(bundle, needs),
    )


def _requirements(bundle: Bundle) -> PlanRequirements:
    """What the manifest says of the plan."""
    engine = bundle.manifest.engine
    return PlanRequirements(
        engine.flavour,
        engine.version or None,
        _capabilities(engine.gpus),
        version_compatible=engine.version_compatible,
        hardware_compatible=engine.hardware_compatible,
        rebuild=functools.partial(exporting, bundle),
    )


def _files(bundle: Bundle, changed: dict[str, str]) -> Iterator[Finding]:
    for name, state in changed.items():
        means = "It is not what was exported. Export it again, or copy the bundle again."
        blocks = {PLAN: _RUN, CONTEXT: _RUN, GRAPH: _VERIFY, GOLDEN: _VERIFY}.get(name, ())
        yield Finding(Status.PROBLEM, FILES, f"{name} {state}", means, exporting(bundle), blocks, bad_target=True)
    if not changed:
        names = ", ".join(bundle.manifest.files)
        yield Finding(Status.OK, FILES, names, "By SHA-256 they are what was exported.", exporting(bundle))


def _golden(bundle: Bundle, changed: dict[str, str]) -> Finding:
    validate = _validate(bundle)
    images = f"{validate} --images DIR --checkpoint FILE"
    if GOLDEN not in bundle.manifest.files or GOLDEN in changed:
        what = f"{GOLDEN} {changed.get(GOLDEN, 'is not in the bundle')}"
        means = "Without it there is nothing to compare with but the reference on other images."
        return Finding(Status.MISSING, "golden data", what, means, images, _VERIFY)
    if problem := golden_problem(bundle.path / GOLDEN):
        means = "So the bundle cannot be compared with it. Export it again, or compare on other images."
        return Finding(Status.PROBLEM, "golden data", f"{GOLDEN} {problem}", means, images, _VERIFY, bad_target=True)
    validation = bundle.manifest.validation
    what = f"{validation.image_count or 'some'} images, answered by {validation.reference}"
    if validation.level == "engine":
        means = "At the export the plan itself ran and agreed."
    else:
        plan = "" if bundle.plan is None else "; the plan itself did not run there"
        means = f"At the export the graph agreed{plan}."
    return Finding(Status.OK, "golden data", what, means, validate)


def _validate(bundle: Bundle) -> str:
    return f"spach-validate {quoted(bundle.path)}"


def _inputs(bundle: Bundle) -> Finding:
    """What a caller has to send."""
    batch = bundle.manifest.batch
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


def _engine(
    bundle: Bundle,
    plan: PlanRequirements,
    changed: dict[str, str],
    info: MachineInfo,
    ask: AskTensorRT,
    runs: GraphRuntime,
) -> Iterator[Finding]:
    if bundle.plan is None and CONTEXT in bundle.manifest.files:
        what = f"{plan.flavour.value} {plan.version or 'of unknown version'}, embedded"
        means = "The plan is in it, and ONNX Runtime's provider for TensorRT loads it from there (README.md)."
        yield Finding(Status.OK, CONTEXT, what, means)
        if plan.flavour in RUNS_ON:
            yield from compatibility(plan, info)
        return
    if bundle.plan is None:
        yield _without_plan(bundle, runs)
        return
    found = None
    if PLAN not in changed:
        found = find_plan(bundle.plan)
        yield _header(plan, found, bundle)
    if plan.flavour in RUNS_ON:
        yield from compatibility(plan, info)
    if found is not None:
        yield from about_header(found, plan, info, ask)


def _without_plan(bundle: Bundle, runs: GraphRuntime) -> Finding:
    """A bundle without an engine is whole: its graph runs in ONNX Runtime or OpenVINO. No engine is advised for one of
    --target cpu, which it would replace.
    """
    reason = bundle.manifest.engine.why_none
    engine = None if bundle.is_for_cpu else exporting(bundle, "--engine", "auto")
    if runs.name:
        return Finding(Status.OK, PLAN, reason, f"It needs none: {runs.name} runs its graph here.", engine)
    means = f"Nothing here runs its graph. {'; '.join(runs.reasons)}."
    return Finding(Status.MISSING, PLAN, reason, means, runs.remedy or engine, _RUN)


@dataclasses.dataclass(frozen=True)
class GraphRuntime:
    """The runtime that `Session` takes for a bundle's graph on this machine. `name` empty: none runs it. `reasons`: why
    those before it do not, as clauses; `remedy`: the command that installs the best one, where it is missing.
    """

    name: str = ""
    reasons: tuple[str, ...] = ()
    remedy: str | None = None

    @classmethod
    def find(cls, bundle: Bundle, info: MachineInfo, needs: GraphNeeds | None) -> GraphRuntime:
        """By the graph, the installed packages, and what the export chose for its machine's CPU."""
        if bundle.needs_vnni and not has_vnni():
            return cls(reasons=("It is for CPUs with VNNI, and this one has none",))
        order = ("openvino", "onnxruntime") if bundle.is_for_openvino else ("onnxruntime", "openvino")
        reasons: list[str] = []
        for package in order:
            problem = _PROBLEMS[package](bundle, info, needs)
            if not problem:
                return cls(_TITLES[package], tuple(reasons))
            reasons.append(problem)
        is_missing = reasons[0] == _missing(order[0])
        return cls("", tuple(reasons), installing(str(info.requirements.get(order[0]))) if is_missing else None)


_TITLES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


def _missing(package: str) -> str:
    return f"{package} is not here"


def _onnxruntime_problem(bundle: Bundle, info: MachineInfo, needs: GraphNeeds | None) -> str:
    """Why the installed ONNX Runtime does not run the graph, as a clause; empty where nothing is known against it."""
    if info.onnxruntime is None or info.onnxruntime.broken:
        return _missing("onnxruntime")
    version = _version(info.onnxruntime)
    known, on_gpu = runtimes().onnxruntime(version), "cuda" in info.onnxruntime.providers and bool(info.driver.gpus)
    if known is None:
        return ""
    if known.truncates_fp16 and bundle.quantizes_fp16 and not on_gpu:
        from spach_deploy.runtime.onnxruntime_runner import fault_of

        return fault_of(version)
    return known.misfit(needs, on_gpu=on_gpu) if needs else ""


def _openvino_problem(bundle: Bundle, info: MachineInfo, needs: GraphNeeds | None) -> str:
    """The same of OpenVINO. What the export measured in it runs."""
    version, wanted = info.packages.get("openvino"), info.requirements.get("openvino")
    if version is None:
        return _missing("openvino")
    if not wanted.is_met_by(version):
        return f"openvino {version} is older than any that was run ({wanted})"
    tried = [reader for reader in readers() if reader.name == _TITLES["openvino"]]
    misfit = tried[-1].misfit(needs) if needs and tried and not bundle.is_for_openvino else None
    return f"OpenVINO does not read such a graph: {misfit}" if misfit else ""


_PROBLEMS = {"openvino": _openvino_problem, "onnxruntime": _onnxruntime_problem}


def _version(runtime: InstalledOnnxRuntime) -> str:
    return runtime.files_version or next(iter(runtime.wheels.values()), "")


def _capabilities(gpus: tuple[str, ...]) -> tuple[ComputeCapability, ...] | None:
    """The manifest's GPUs; None for anything but known GPUs."""
    try:
        return parse_gpus(",".join(gpus)) if gpus else None
    except UsageError:
        return None


def _header(plan: PlanRequirements, found: PlanFile | None, bundle: Bundle) -> Finding:
    """Compare the plan's first bytes with the manifest: somebody may have put the bundle together by hand."""
    size = bundle.file(PLAN).stat().st_size
    what = f"{plan.flavour.value} {plan.version or 'of unknown version'}, {size / 1e6:,.1f} MB"
    again = exporting(bundle, "--engine", plan.flavour.value, *_gpu_words(plan))
    if found is None or not found.is_whole or found.flavour is not plan.flavour:
        means = "By its first bytes it is no whole plan of that flavour, whatever the manifest says."
        return Finding(Status.PROBLEM, PLAN, what, means, again, _RUN, bad_target=True)
    return Finding(Status.OK, PLAN, what, "A whole plan of that flavour, by its first bytes.", again)


def _gpu_words(plan: PlanRequirements) -> tuple[str, ...]:
    """The --gpu option: tensorrt-rtx builds for the GPUs that are named, tensorrt for this machine's."""
    return ("--gpu", ",".join(map(str, plan.gpus))) if plan.flavour is Flavour.TENSORRT_RTX and plan.gpus else ()


def _graph(bundle: Bundle, info: MachineInfo, needs: GraphNeeds | None) -> Finding:
    """Whether ONNX Runtime can verify the graph here, which stands in for a plan that cannot run."""
    accept = f"{_validate(bundle)} --accept graph"
    if GRAPH not in bundle.manifest.files:
        means = "So only the plan itself can be verified, where it runs."
        return Finding(Status.MISSING, GRAPH, "not in the bundle", means, exporting(bundle))
    if lacking := _lacking_data(bundle.path / GRAPH):
        means = "So the graph cannot be verified. Export it again, or copy the bundle again."
        return Finding(Status.PROBLEM, GRAPH, lacking, means, exporting(bundle), _VERIFY, bad_target=True)
    if info.onnxruntime is None or info.onnxruntime.broken:
        means = f"With onnxruntime {_graph_in_words(bundle)} can be verified on the CPU."
        wanted = str(info.requirements.get("onnxruntime"))
        return Finding(Status.MISSING, GRAPH, "onnxruntime is not here", means, installing(wanted), _VERIFY)
    if bundle.needs_vnni and not has_vnni():
        means = "ONNX Runtime's sums of it overflow here. Run it on CPUs with avx512_vnni, avx_vnni or amx_int8."
        again = exporting(bundle)
        return Finding(Status.PROBLEM, GRAPH, "INT8 for CPUs with VNNI, and this one has none", means, again, _VERIFY)
    return _in_runtime(bundle, _version(info.onnxruntime), accept, needs)


def _graph_in_words(bundle: Bundle) -> str:
    is_made = bundle.manifest.graph.made is not None
    if bundle.plan is None and not is_made:
        return "the graph"
    return "the graph, in the form for ONNX Runtime," if is_made else "the graph that it was built from"


def _lacking_data(graph: Path) -> str:
    """Which external data file of the graph is missing or outside the bundle, as a sentence; empty where none is.

    Importing onnx takes time, so it is asked only where the file contains the field name `location`.
    """
    if not graph.is_file() or not graph.stat().st_size:
        return ""
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"location") < 0:
            return ""
    try:
        from spach_deploy.graph.external_data import lacking_data
    except ImportError:
        return ""
    return lacking_data(graph)


def _needs(bundle: Bundle) -> GraphNeeds | None:
    """What the graph requires of a runtime: as it stands, else, where it cannot be read here, by its certificate."""
    certificate, precision = bundle.manifest.graph.certificate, bundle.manifest.precision
    try:
        found = GraphNeeds.of(bundle.path / GRAPH)
    except ImportError:  # the doctor also runs where packages are missing
        found = None
    if found is not None or certificate.opset is None or certificate.ir_version is None:
        return found
    return GraphNeeds(certificate.opset, certificate.ir_version, has_fp8=precision.asked is Precision.FP8)


def _in_runtime(bundle: Bundle, version: str, accept: str, needs: GraphNeeds | None) -> Finding:
    """Whether the installed ONNX Runtime loads the graph: as it is, or rounded to FP32 by spach-validate."""
    known = runtimes().onnxruntime(version)
    misfit = known.misfit(needs, on_gpu=False) if known and needs else ""
    if known is not None and known.truncates_fp16 and bundle.quantizes_fp16:
        from spach_deploy.runtime.onnxruntime_runner import REMEDY, fault_of

        means = f"In it the graph is wrong; spach-validate judges it in FP32 with every half tensor rounded. {REMEDY}"
        return Finding(Status.PROBLEM, GRAPH, fault_of(version), means, exporting(bundle))
    if not misfit or known is None or needs is None:
        where = "On a CPU" if bundle.plan is None else "Even where the plan cannot run"
        means = f"{where}, {_graph_in_words(bundle)} can be verified."
        return Finding(Status.OK, GRAPH, f"runs in ONNX Runtime {version}".rstrip(), means, accept)
    if known.misfit(needs.in_fp32(), on_gpu=False):
        newer = installing("--upgrade", "onnxruntime")
        return Finding(Status.PROBLEM, GRAPH, misfit, "So the graph cannot be verified here.", newer, _VERIFY)
    means = "In it the graph runs on no CPU as it is; spach-validate runs it in FP32, every bfloat16 tensor rounded."
    return Finding(Status.OK, GRAPH, misfit, means, accept)


def _readers(bundle: Bundle, needs: GraphNeeds | None) -> Iterator[Finding]:
    """Which runtimes read the graph, if graphs like it were tried; none was for processors with VNNI alone, and what
    was measured in OpenVINO runs there.
    """
    if needs is not None and not (bundle.needs_vnni or bundle.is_for_openvino) and (known := reading(needs)):
        means = "Known of small graphs of the same formats, opset and operators, on a CPU (docs/runtimes.md)."
        yield Finding(Status.OK, "read by", known, means)


AskTensorRT = Callable[[Flavour, bytes], ProbeResult]
"""Asks the installed TensorRT about a plan's first bytes: `machine_info.ask_tensorrt`, or a fake in tests."""

_CUDA_ERROR = "CUDA_ERROR"


def about_form(path: Path, plan: PlanFile) -> Iterator[Finding]:
    """Whether the file is a plan, whole, and nothing else."""
    name, size = quoted(path), f"{plan.total_bytes - plan.offset:,} bytes"
    if plan.offset:
        what = f"{plan.before} stand before the plan"
        means = "TensorRT takes the plan only, from its first byte."
        strip = f"tail -c +{plan.offset + 1} {name} > plain.plan"
        yield Finding(Status.PROBLEM, "form", what, means, strip, _RUN, bad_target=True)
    if plan.missing_bytes:
        means = "It is cut off, as by a copy that did not end. Copy or build it again."
        what = f"{size}, and its header declares {plan.missing_bytes:,} more"
        yield Finding(Status.PROBLEM, "size", what, means, None, _RUN, bad_target=True)
    elif plan.surplus_bytes:
        declared = plan.total_bytes - plan.offset - plan.surplus_bytes
        means = "Something was appended. What TensorRT makes of that is not known."
        cut = f"tail -c +{plan.offset + 1} {name} | head -c {declared} > plain.plan"
        what = f"{size}, {plan.surplus_bytes:,} more than its header declares"
        yield Finding(Status.PROBLEM, "size", what, means, cut, _RUN, bad_target=True)
    elif plan.perhaps_cut:
        means = "Perhaps it is cut off: the number at byte 16, the size in published dumps of such headers, is larger."
        yield Finding(Status.UNKNOWN, "size", size, means)
    else:
        is_told = plan.flavour is Flavour.TENSORRT_RTX
        yield Finding(
            Status.OK, "size", size, "As declared in its header." if is_told else "Its header tells no other."
        )


def about_origin() -> Finding:
    """A plan without a manifest."""
    means = "So nothing tells what it computes, its input profile or whether it was changed; there is no golden data."
    export = "spach-export --checkpoint FILE --fp16"
    return Finding(Status.MISSING, "manifest", "none beside it", means, export, _VERIFY)


def about_header(file: PlanFile, plan: PlanRequirements, info: MachineInfo, ask: AskTensorRT) -> Iterator[Finding]:
    """What TensorRT says of the header, without loading the plan; only where there is a GPU."""
    package = info.tensorrt.get(file.flavour)
    if file.flavour is not Flavour.TENSORRT_RTX or package is None or package.error or not info.driver.gpus:
        return
    said = ask(file.flavour, file.head).content or {}
    validity, flaws = said.get("validity"), [flaw for flaw in said.get("flaws", ()) if flaw != _CUDA_ERROR]
    topic, asked = "header", "asked of tensorrt-rtx itself"
    if validity == "VALID":
        yield Finding(Status.OK, topic, f"valid, {asked}", "It is likely to load.")
    elif validity == "SUBOPTIMAL":
        means = "It is likely to load, but a plan built for this GPU would be faster."
        yield Finding(Status.OK, topic, f"valid but not the best, {asked}", means)
    elif validity == "INVALID" and flaws:
        means = f"It will not load: {', '.join(flaws).lower().replace('_', ' ')}."
        again = plan.rebuilt("--engine", file.flavour.value, "--gpu", str(info.driver.gpus[0].capability))
        yield Finding(Status.PROBLEM, topic, f"invalid, {asked}", means, again, _RUN)
    elif validity == "INVALID":  # seen where CUDA does not work, with no flaw named
        means = "It will not load, and no flaw is named: tensorrt-rtx could not use the GPU."
        yield Finding(Status.PROBLEM, topic, f"not to be judged, {asked}", means, "nvidia-smi", _RUN)


_PLAN_SUFFIXES = (".plan", ".engine", ".trt")
_LISTED = 3


@dataclasses.dataclass(frozen=True)
class Target:
    """The findings about a target. `name` says in words what it is. `runtime`: what runs a bundle's graph here;
    empty where none does, and for an engine.
    """

    path: str
    name: str
    findings: tuple[Finding, ...]
    runtime: str = ""

    @property
    def can_run(self) -> bool:
        """Whether no finding blocks running it; TensorRT has the last word."""
        return not blockers(self.findings, Task.RUN)

    @property
    def is_bad(self) -> bool:
        """Whether the target itself is at fault, on any machine."""
        return any(finding.bad_target for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0 it can run here; 3 it cannot; 2 the target itself is at fault; 1 its files are not those that were
        exported.
        """
        if any(finding.bad_target and finding.topic == FILES for finding in self.findings):
            return ChangedFileError.exit_code
        return 2 if self.is_bad else 0 if self.can_run else 3

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "spach_deploy": __version__,
            "exit_code": self.exit_code,
            "target": self.path,
            "is": self.name,
            "can_run": self.can_run and not self.is_bad,
            "runtime": self.runtime or None,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def examine_target(path: Path, info: MachineInfo, ask: AskTensorRT = ask_tensorrt) -> Target:
    """Findings about a bundle, a file of a bundle, or a plan from anywhere.

    `ask` asks the installed TensorRT about a plan's header. Raises UsageError for a file that is neither, saying what
    it is.
    """
    try:
        if path.is_dir():
            return _directory(path, info, ask)
        if path.name == PLAN and not path.exists() and (path.parent / MANIFEST).is_file():
            return _bundle(path, Bundle.open(path.parent, verify=False), info, ask)
        _check_is_file(path)
        return _file(path, info, ask)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}).", "Check its permissions.") from None


def _check_is_file(path: Path) -> None:
    if not path.exists():
        raise UsageError(f"{path} does not exist.", "Give a bundle directory or an engine.plan.")
    if not path.is_file():
        raise UsageError(f"{path} is neither a file nor a directory.", "Give a bundle directory or an engine.plan.")


def _directory(path: Path, info: MachineInfo, ask: AskTensorRT) -> Target:
    if (path / MANIFEST).is_file():
        return _bundle(path, Bundle.open(path, verify=False), info, ask)
    inside = sorted(found for suffix in _PLAN_SUFFIXES for found in _within(path, suffix))
    if not inside:
        raise BundleError(f"{path} is a directory without {MANIFEST}, so it is no bundle.", "Give a bundle or a plan.")
    listed = ", ".join(str(found) for found in inside[:_LISTED])
    more = f" and {len(inside) - _LISTED} more" if len(inside) > _LISTED else ""
    hint = f"It holds plans, though: {listed}{more}. Try spach-doctor {quoted(inside[0])}."
    raise BundleError(f"{path} is a directory without {MANIFEST}, so it is no bundle.", hint)


def _within(path: Path, suffix: str) -> Iterator[Path]:
    """Files in `path` down to three levels, the depth of Triton's model repositories."""
    for depth in ("", "*/", "*/*/"):
        yield from path.glob(f"{depth}*{suffix}")


def _file(path: Path, info: MachineInfo, ask: AskTensorRT) -> Target:
    directory = path.parent
    if path.name in (MANIFEST, PLAN) and (directory / MANIFEST).is_file():
        return _bundle(path, Bundle.open(directory, verify=False), info, ask)
    plan = find_plan(path)
    other = identify_other_file(path) if plan is None or plan.offset else None
    if plan is None or (other is not None and other.is_container):
        assert other is not None
        inside = f", with a plan inside it from byte {plan.offset} on" if plan is not None else ""
        raise UsageError(f"{path} is {other.kind}{inside}.", other.advice)
    if (bundle := _bundle_of(path)) is not None:
        return _bundle(directory, bundle, info, ask)
    return _plan(path, plan, info, ask)


def _bundle_of(path: Path) -> Bundle | None:
    """The bundle in the same folder, if a plan of another name is that bundle's plan."""
    if not (path.parent / MANIFEST).is_file():
        return None
    bundle = Bundle.open(path.parent, verify=False)
    return bundle if bundle.manifest.sha256(PLAN) == sha256_of(path) else None


def _plan(path: Path, plan: PlanFile, info: MachineInfo, ask: AskTensorRT) -> Target:
    name = f"a plan of {plan.flavour.value}, version {plan.version or 'not known'}"
    known = PlanRequirements(plan.flavour, plan.version, plan.gpus, plan.newer_gpus)
    findings = (
        *about_form(path, plan),
        about_origin(),
        *compatibility(known, info),
        *about_header(plan, known, info, ask),
    )
    return Target(str(path), name, findings)


def _bundle(path: Path, bundle: Bundle, info: MachineInfo, ask: AskTensorRT) -> Target:
    needs = _needs(bundle)
    has_plan = bundle.plan is not None or CONTEXT in bundle.manifest.files
    runs = GraphRuntime() if has_plan else GraphRuntime.find(bundle, info, needs)
    findings = about_bundle(bundle, info, ask, needs, runs)
    name, precision = bundle.manifest.model.name, bundle.manifest.precision.asked.value
    return Target(str(path), f"{name} in {precision}, a bundle", findings, runs.name)

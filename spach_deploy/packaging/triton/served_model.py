"""The models of a Triton repository, made from bundles: name, versions, and the backend that loads each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spach_deploy.bundle.schema import Form, Manifest, TensorInfo
from spach_deploy.bundle.store import GRAPH, Bundle
from spach_deploy.common.errors import BundleError, UsageError
from spach_deploy.common.machine import VNNI_ONLY
from spach_deploy.common.operating_system import problem_of_name
from spach_deploy.graph.external_data import check_is_one_file
from spach_deploy.graph.runtimes import INSTEAD_OF_BFLOAT16, GraphNeeds, runtimes
from spach_deploy.options.specs import BatchProfile, Flavour, Precision
from spach_deploy.packaging.triton.options import Backend, Device, TritonOptions
from spach_deploy.runtime.onnxruntime_runner import REMEDY, fault_of
from spach_deploy.validation.bundle_facts import BundleFacts, check_interface

if TYPE_CHECKING:
    from spach_deploy.pipeline.runtime_form import RuntimeGraph

SERVE_GRAPH = "give --backend onnxruntime, which serves the graph"
RTX_REASON = "Triton's TensorRT backend is ordinary TensorRT, which does not load plans of TensorRT for RTX"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclasses.dataclass(frozen=True)
class BundleArgument:
    """A bundle on the command line. `name` None: the model's own name."""

    path: Path
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> BundleArgument:
        """Parse `BUNDLE` or `NAME=BUNDLE`. UsageError for a name that Triton does not accept."""
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists() or "/" in name:
            return cls(Path(text))
        check_name(name)
        return cls(Path(path), name)


def check_name(name: str) -> None:
    """UsageError unless `name` can name a model: it becomes a folder's name and part of a URL."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a model.", "Use letters, digits, dots, hyphens and underscores.")
    if problem := problem_of_name(name):
        raise UsageError(f"{name!r} is no name for a model: {problem}.", "Choose another.")


@dataclasses.dataclass(frozen=True)
class Version:
    """A version of a model: a bundle, and the file that is served (`artifact`), which `manifest` describes.

    `made`: the graph that was made of the bundle's for ONNX Runtime, whose file is deleted with it.
    """

    number: int
    bundle: Bundle
    artifact: Path
    manifest: Manifest
    made: RuntimeGraph | None = dataclasses.field(default=None, repr=False)

    @property
    def quantizes_fp16(self) -> bool:
        """Whether the file quantizes FP16, which some versions of ONNX Runtime do wrongly."""
        return dataclasses.replace(self.bundle, manifest=self.manifest).quantizes_fp16


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model of the repository. All versions have the same inputs and outputs.

    `batch`: the profile that every version accepts. `facts`: of the newest version. `accepts_rtx`: a version has a plan
    of TensorRT for RTX, which the user forced. `on_cpu`: its instances run on the CPU alone. `needs_gpu`: at least one
    version cannot run on a CPU. `needs`: what the graphs need from ONNX Runtime, if it serves them.
    `notes`: remarks; `warnings`: what will not work.
    """

    name: str
    backend: Backend
    versions: tuple[Version, ...]
    batch: BatchProfile
    facts: BundleFacts
    accepts_rtx: bool = False
    on_cpu: bool = False
    needs_gpu: bool = False
    needs: tuple[GraphNeeds, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def bundle(self) -> Bundle:
        """The bundle of the newest version."""
        return self.versions[-1].bundle

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """The inputs, in order."""
        return self.bundle.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """The outputs, in order."""
        return self.bundle.manifest.outputs

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.bundle.manifest.model.num_classes

    @property
    def batches(self) -> BatchingForm:
        """How Triton batches requests for the model."""
        return BatchingForm.of(self.batch, self.backend)


@dataclasses.dataclass(frozen=True)
class BatchingForm:
    """The batch in config.pbtxt.

    `max_batch_size` above 0: a request has up to that many samples, dims exclude the batch, and the server may join
    requests. 0: the server passes each request unchanged, and dims begin with `leading`: -1, or the only valid batch.
    """

    max_batch_size: int
    leading: int | None = None

    @classmethod
    def of(cls, batch: BatchProfile, backend: Backend) -> BatchingForm:
        """The form for a batch profile: 0 for an engine without batch 1, which the server would also send."""
        if backend is Backend.ONNXRUNTIME or batch.min == 1:
            return cls(batch.max)
        return cls(0, batch.max if batch.min == batch.max else -1)

    def dims(self, tensor: TensorInfo) -> list[int]:
        """A tensor's dims in config.pbtxt, -1 for free extents."""
        leading = [] if self.leading is None else [self.leading]
        return [*leading, *(-1 if size is None else size for size in tensor.shape[1:])]


def resolve_models(arguments: Sequence[BundleArgument], options: TritonOptions) -> tuple[ServedModel, ...]:
    """The models of a repository, in the order given. Bundles of the same name become its versions 1, 2, ...

    Raises BundleError for what is not a bundle or has no file for the backend, UsageError for versions that do not fit
    together or a graph that no known Triton image runs.
    """
    named: dict[str, list[Bundle]] = {}
    for argument in arguments:
        bundle = Bundle.open(argument.path)
        name = argument.name or bundle.manifest.model.name
        check_name(name)
        check_interface(bundle)
        named.setdefault(name, []).append(bundle)
    return tuple(_served(name, bundles, options) for name, bundles in named.items())


def _served(name: str, bundles: list[Bundle], options: TritonOptions) -> ServedModel:
    options = options.for_cpu() if all(bundle.is_for_cpu for bundle in bundles) else options
    facts = [BundleFacts.of(bundle) for bundle in bundles]
    choices = [_choose(bundle, fact, options) for bundle, fact in zip(bundles, facts, strict=True)]
    _check_alike(name, bundles, [choice.backend for choice in choices])
    if options.accelerator is not None and len(bundles) > 1:
        raise UsageError(
            f"--accelerator tensorrt: versions of {name} would share one folder of engines, which ONNX Runtime names by"
            " a graph's structure, whatever its weights.",
            "Give each a name of its own: NAME=BUNDLE.",
        )
    numbered = enumerate(zip(bundles, choices, strict=True), start=1)
    return ServedModel(
        name=name,
        backend=choices[0].backend,
        versions=tuple(
            Version(number, bundle, choice.artifact, choice.manifest, choice.made)
            for number, (bundle, choice) in numbered
        ),
        batch=_common_profile(name, [fact.batch for fact in facts]),
        facts=facts[-1],
        accepts_rtx=any(choice.is_rtx_plan for choice in choices),
        on_cpu=options.instances.device is Device.CPU,
        needs_gpu=options.accelerator is not None
        or any(choice.needs is None or bool(choice.needs.bfloat16) for choice in choices),
        needs=tuple(choice.needs for choice in choices if choice.needs is not None),
        notes=_once(note for choice in choices for note in (choice.note, *choice.further)),
        warnings=_once(choice.warning for choice in choices),
    )


def _once(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text))


@dataclasses.dataclass(frozen=True)
class _Choice:
    """The backend and the file for one bundle, and what describes that file. `needs`: what a graph needs from ONNX
    Runtime; None for a plan. `made`: as in `Version`. `note`, `further`: remarks.
    """

    backend: Backend
    artifact: Path
    manifest: Manifest
    made: RuntimeGraph | None = None
    needs: GraphNeeds | None = None
    note: str = ""
    further: tuple[str, ...] = ()
    warning: str = ""
    is_rtx_plan: bool = False


def _choose(bundle: Bundle, facts: BundleFacts, options: TritonOptions) -> _Choice:
    is_rtx = facts.flavour is Flavour.TENSORRT_RTX
    if options.accelerator is not None:
        return _accelerated(_graph(bundle, bundle, facts, options), bundle, facts)
    if options.backend is Backend.TENSORRT or (options.backend is Backend.AUTO and options.force and bundle.plan):
        return _plan(bundle, is_rtx=is_rtx)
    if options.backend is Backend.AUTO and bundle.plan is not None and not is_rtx:
        return _plan(bundle, is_rtx=False)
    choice = _without_integers(_in_its_form(bundle, facts, options), facts, options)
    is_truncated = dataclasses.replace(bundle, manifest=choice.manifest).quantizes_fp16
    return _truncated(choice, bundle, options.instances.device) if is_truncated else choice


def _in_its_form(bundle: Bundle, facts: BundleFacts, options: TritonOptions) -> _Choice:
    """The graph in ONNX Runtime's form, made here where the bundle's is TensorRT's, and the line that says so.

    The graph that will be served is the one judged: the bundle's own may have operators that no image runs.
    """
    from spach_deploy.pipeline.runtime_form import graph_for_runtime

    graph_needs(bundle)  # refuses what is no typed graph before anything is made of it
    in_integers = options.instances.device is Device.CPU and facts.precision is Precision.INT8
    graph = graph_for_runtime(bundle, rest=Precision.FP32 if in_integers else None)
    choice = _graph(bundle, graph, facts, options)
    is_for_vnni = Bundle(bundle.path, graph.manifest).needs_vnni and options.instances.device is not Device.GPU
    return dataclasses.replace(
        choice,
        artifact=graph.path,
        manifest=graph.manifest,
        made=graph if graph.is_made else None,
        further=(*choice.further, graph.note, VNNI_ONLY if is_for_vnni else ""),
    )


def _without_integers(choice: _Choice, facts: BundleFacts, options: TritonOptions) -> _Choice:
    """Add a note where eight bits gain nothing: on a GPU, whose CUDA provider computes Q/DQ pairs in floats."""
    if facts.quantization is None or options.instances.device is Device.CPU:
        return choice
    name = facts.precision.value.upper()
    text = (
        f"On a GPU {name} gains no time in ONNX Runtime: its CUDA provider has no integer kernels for Q/DQ, so it"
        f" rounds to {name} and multiplies in floats. A bundle in fp16 is faster there."
    )
    return dataclasses.replace(choice, further=(*choice.further, text))


def _accelerated(choice: _Choice, bundle: Bundle, facts: BundleFacts) -> _Choice:
    """A graph for ONNX Runtime's TensorRT provider, which compiles it: the form for TensorRT is the right one.

    UsageError for a precision that the provider's block cannot name.
    """
    since = " BF16 takes Triton 26.02 or newer." if precision_mode(facts) == "BF16" else ""
    note = (
        "Run by ONNX Runtime's TensorRT provider, which Triton's GPU images have; it compiles the graph when the"
        " model is loaded, for minutes, and keeps the engine in its cache folder"
    )
    wrong_form = bundle.manifest.form is not Form.TENSORRT
    form = f". The graph has the form for {bundle.manifest.form.value}: export it with an engine for TensorRT's"
    return dataclasses.replace(choice, note=f"{note}{form if wrong_form else ''}.{since}")


def precision_mode(facts: BundleFacts) -> str:
    """The `precision_mode` of ONNX Runtime's TensorRT provider in Triton for a bundle. UsageError where it has none:
    a mode names one type, and eight bits among FP16 would need two.
    """
    modes = {Precision.FP32: "FP32", Precision.FP16: "FP16", Precision.BF16: "BF16"}
    if facts.quantization is None:
        return modes[facts.precision]
    if (facts.precision, facts.rest) == (Precision.INT8, Precision.FP32):
        return "INT8"
    raise UsageError(
        f"--accelerator tensorrt: {facts.precision.value} with the rest in {facts.rest.value} has no precision_mode in"
        " Triton, which names one type.",
        "Export with --fp16, or with --int8 --rest fp32.",
    )


def _plan(bundle: Bundle, *, is_rtx: bool) -> _Choice:
    if bundle.plan is None:
        reason = bundle.manifest.engine.why_none
        raise BundleError(
            f"Bundle {bundle.path} has no engine for --backend tensorrt: {reason}.", instead_of_plan(bundle)
        )
    warning = f"{bundle.path} will not load: {RTX_REASON}. {instead_of_plan(bundle)}"
    return _Choice(
        Backend.TENSORRT, bundle.plan, bundle.manifest, warning=warning if is_rtx else "", is_rtx_plan=is_rtx
    )


def graph_needs(bundle: Bundle) -> GraphNeeds:
    """What a bundle's graph needs from ONNX Runtime. BundleError where it is not a typed graph."""
    check_is_one_file(bundle.file(GRAPH))
    needs = GraphNeeds.of(bundle.file(GRAPH))
    if needs is None:
        raise BundleError(f"{bundle.path / GRAPH} is no typed ONNX graph.", "Export the bundle again.")
    return needs


def instead_of_plan(bundle: Bundle) -> str:
    """The next step where a bundle's plan cannot be served: serve its graph, if a Triton image runs it, or export."""
    build = "export it on the serving GPU with --engine tensorrt."
    runs = runtimes().fitting((graph_needs(bundle),), on_gpu=True)
    return f"{SERVE_GRAPH[0].upper()}{SERVE_GRAPH[1:]}, or {build}" if runs else f"{build[0].upper()}{build[1:]}"


def _graph(bundle: Bundle, served: Bundle | RuntimeGraph, facts: BundleFacts, options: TritonOptions) -> _Choice:
    """The choice of a graph, `served`: the bundle's own, or one made of it. UsageError where no image runs it."""
    reasons = []
    if options.backend is not Backend.ONNXRUNTIME and options.accelerator is None:
        why = RTX_REASON if bundle.plan is not None else f"{bundle.path} has no engine"
        reasons.append(f"Served as ONNX, by onnxruntime: {why}.")
    needs = graph_needs(bundle)
    if not isinstance(served, Bundle) and served.is_made:
        needs = GraphNeeds.of(served.path) or needs
    known, on_gpu = runtimes(), options.instances.device is not Device.CPU
    if options.accelerator is not None:
        needs = known.of_tensorrt(needs)
    fitting = known.fitting((needs,), on_gpu=on_gpu)
    warning = ""
    if not fitting:
        newest = known.images[-1]
        where = "" if on_gpu or bundle.is_for_cpu else " with --device cpu"
        reason = f"in the newest, {newest.release}, {known.misfit(newest, (needs,), on_gpu=on_gpu)}"
        warning = f"No known Triton image runs the graph of {bundle.path}{where}: {reason}."
        if not options.force:
            raise UsageError(warning, _instead_of_graph(needs, bundle, facts))
    elif fitting[0] is not known.images[0]:
        kernels = "ONNX Runtime has kernels for bfloat16 on GPUs only. " if needs.bfloat16 else ""
        first = fitting[0]
        reasons.append(f"{kernels}It takes ONNX Runtime {first.onnxruntime} or newer: Triton from {first.release} on.")
    file = bundle.file(GRAPH)
    return _Choice(Backend.ONNXRUNTIME, file, bundle.manifest, needs=needs, note=" ".join(reasons), warning=warning)


def _instead_of_graph(needs: GraphNeeds, bundle: Bundle, facts: BundleFacts) -> str:
    """The next step where no Triton image runs a graph."""
    if needs.bfloat16 and bundle.is_for_cpu:
        return INSTEAD_OF_BFLOAT16
    if runtimes().fitting((needs,), on_gpu=True):
        return "Leave --device cpu out."
    if needs.has_fp8:
        return "Export it again: graphs with FP8 have opset 21 now."
    if needs.bfloat16 and bundle.manifest.form is Form.TENSORRT:
        return "Export it with --engine none, whose graph has ONNX Runtime's form, or with --fp16."
    half = "--rest fp16" if facts.quantization is not None else "--fp16"
    return f"Export it with {half}, or on the serving GPU with --engine tensorrt, which needs no ONNX Runtime."


def _truncated(choice: _Choice, bundle: Bundle, device: Device | None) -> _Choice:
    """Add a note or warning for a graph that quantizes FP16, which some Triton images truncate on CPUs."""
    images = [image for image in runtimes().images if runtimes().truncates_fp16(image.onnxruntime)]
    if device is Device.GPU or not images:
        return choice
    carried = f"Triton {images[0].release} to {images[-1].release} carry it or an older one"
    text = f"{bundle.path} answers wrongly on a CPU: {fault_of(images[-1].onnxruntime)}, and {carried}. {REMEDY}"
    if device is Device.CPU:
        return dataclasses.replace(choice, warning=text)
    return dataclasses.replace(choice, note=f"{choice.note} {text}".strip())


def _check_alike(name: str, bundles: list[Bundle], backends: list[Backend]) -> None:
    """UsageError for versions that differ: a model has one config.pbtxt for all its versions."""
    first = bundles[0]
    advice = "Give one of them a name of its own: NAME=BUNDLE."
    for bundle, backend in zip(bundles[1:], backends[1:], strict=True):
        if backend is not backends[0]:
            raise UsageError(
                f"{first.path} and {bundle.path} are versions of {name} for different backends.",
                f"Give --backend onnxruntime. {advice}",
            )
        for what in ("inputs", "outputs", "preprocessing"):
            if getattr(bundle.manifest, what) != getattr(first.manifest, what):
                raise UsageError(f"{first.path} and {bundle.path}, versions of {name}, differ in {what}.", advice)


def _common_profile(name: str, profiles: list[BatchProfile]) -> BatchProfile:
    smallest = max(profile.min for profile in profiles)
    largest = min(profile.max for profile in profiles)
    if smallest > largest:
        raise UsageError(
            f"The versions of {name} accept no batch in common: {', '.join(map(str, profiles))}.",
            "Give one of them a name of its own: NAME=BUNDLE.",
        )
    usual = min(max(profiles[-1].opt, smallest), largest)
    return BatchProfile(smallest, usual, largest)

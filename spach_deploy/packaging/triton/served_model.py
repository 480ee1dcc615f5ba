"""Bundles as the models that a repository serves: names, versions, and the backend that will load them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.bundle.store import GRAPH, Bundle
from spach_deploy.common.errors import BundleError, UsageError
from spach_deploy.graph.external_data import check_is_one_file
from spach_deploy.graph.runtimes import GraphNeeds, runtimes
from spach_deploy.options.specs import BatchProfile, Flavour
from spach_deploy.packaging.triton.options import Backend, Device, TritonOptions
from spach_deploy.runtime.truncation import REMEDY, fault_of
from spach_deploy.validation.bundle_facts import BundleFacts

SERVE_GRAPH = "give --backend onnxruntime, which serves the graph"
RTX_REASON = "Triton's TensorRT backend is ordinary TensorRT, which does not load plans of TensorRT for RTX"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclasses.dataclass(frozen=True)
class BundleArgument:
    """A bundle on the command line. `name` None: the model's own."""

    path: Path
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> BundleArgument:
        """`BUNDLE`, or `NAME=BUNDLE`. UsageError for a name that Triton would not take."""
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists() or "/" in name:
            return cls(Path(text))
        check_name(name)
        return cls(Path(path), name)


def check_name(name: str) -> None:
    """UsageError unless `name` is one for a model, which is a folder's and part of a URL."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a model.", "Use letters, digits, dots, hyphens and underscores.")


@dataclasses.dataclass(frozen=True)
class Version:
    """A version of a model: a bundle, and which of its files is served."""

    number: int
    bundle: Bundle
    artifact: Path


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model of the repository. All versions have the same inputs and outputs.

    `batch` is what every version accepts. `needs_gpu`: no version runs on a CPU. `needs`: what the graphs ask of ONNX
    Runtime, where it serves them. `notes` are facts worth reading; `warnings` say what will not work.
    """

    name: str
    backend: Backend
    versions: tuple[Version, ...]
    batch: BatchProfile
    facts: BundleFacts
    accepts_rtx: bool = False
    needs_gpu: bool = False
    needs: tuple[GraphNeeds, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def bundle(self) -> Bundle:
        """The newest version's."""
        return self.versions[-1].bundle

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Inputs, in order."""
        return self.bundle.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Outputs, in order."""
        return self.bundle.manifest.outputs

    @property
    def classes(self) -> int:
        """How many classes the model tells apart."""
        return self.bundle.manifest.model.num_classes

    @property
    def batches(self) -> BatchingForm:
        """How requests become batches."""
        return BatchingForm.of(self.batch, self.backend)


@dataclasses.dataclass(frozen=True)
class BatchingForm:
    """How Triton sees the batch.

    `max_batch_size` above 0: a request has up to so many samples, and the server may join requests. 0: the server
    passes each request as it is, and the tensors' first extent is `leading`: -1, or the one batch that is accepted.
    """

    max_batch_size: int
    leading: int | None = None

    @classmethod
    def of(cls, batch: BatchProfile, backend: Backend) -> BatchingForm:
        """An engine that does not take single samples must not get the batches that a server makes up."""
        if backend is Backend.ONNXRUNTIME or batch.min == 1:
            return cls(batch.max)
        return cls(0, batch.max if batch.min == batch.max else -1)

    def dims(self, tensor: TensorInfo) -> list[int]:
        """A tensor's dims in config.pbtxt."""
        leading = [] if self.leading is None else [self.leading]
        return [*leading, *(-1 if size is None else size for size in tensor.shape[1:])]


def resolve_models(arguments: Sequence[BundleArgument], options: TritonOptions) -> tuple[ServedModel, ...]:
    """The models of a repository, in the order given; bundles of one name become versions 1, 2, … of it.

    Raises BundleError for what is no bundle or has no file for the backend, UsageError for versions that differ.
    """
    named: dict[str, list[Bundle]] = {}
    for argument in arguments:
        bundle = Bundle.open(argument.path)
        name = argument.name or bundle.manifest.model.name
        check_name(name)
        named.setdefault(name, []).append(bundle)
    return tuple(_served(name, bundles, options) for name, bundles in named.items())


def _served(name: str, bundles: list[Bundle], options: TritonOptions) -> ServedModel:
    facts = [BundleFacts.of(bundle) for bundle in bundles]
    choices = [_choose(bundle, fact, options) for bundle, fact in zip(bundles, facts, strict=True)]
    _check_alike(name, bundles, [choice.backend for choice in choices])
    numbered = enumerate(zip(bundles, choices, strict=True), start=1)
    return ServedModel(
        name=name,
        backend=choices[0].backend,
        versions=tuple(Version(number, bundle, choice.artifact) for number, (bundle, choice) in numbered),
        batch=_common_profile(name, [fact.batch for fact in facts]),
        facts=facts[-1],
        accepts_rtx=any(choice.is_rtx_plan for choice in choices),
        needs_gpu=any(choice.needs is None or bool(choice.needs.bfloat16) for choice in choices),
        needs=tuple(choice.needs for choice in choices if choice.needs is not None),
        notes=_once(choice.note for choice in choices),
        warnings=_once(choice.warning for choice in choices),
    )


def _once(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text))


@dataclasses.dataclass(frozen=True)
class _Choice:
    """`needs`: what a graph asks of ONNX Runtime; None for a plan."""

    backend: Backend
    artifact: Path
    needs: GraphNeeds | None = None
    note: str = ""
    warning: str = ""
    is_rtx_plan: bool = False


def _choose(bundle: Bundle, facts: BundleFacts, options: TritonOptions) -> _Choice:
    is_rtx = facts.flavour is Flavour.TENSORRT_RTX
    if options.backend is Backend.TENSORRT or (options.backend is Backend.AUTO and options.force and bundle.plan):
        return _plan(bundle, is_rtx=is_rtx)
    if options.backend is Backend.AUTO and bundle.plan is not None and not is_rtx:
        return _plan(bundle, is_rtx=False)
    choice = _graph(bundle, facts, options)
    return _truncated(choice, bundle, options.instances.device) if bundle.quantizes_fp16 else choice


def _plan(bundle: Bundle, *, is_rtx: bool) -> _Choice:
    if bundle.plan is None:
        reason = bundle.manifest.engine.why_none
        raise BundleError(
            f"Bundle {bundle.path} has no engine for --backend tensorrt: {reason}.", instead_of_plan(bundle)
        )
    warning = f"{bundle.path} will not load: {RTX_REASON}. {instead_of_plan(bundle)}"
    return _Choice(Backend.TENSORRT, bundle.plan, warning=warning if is_rtx else "", is_rtx_plan=is_rtx)


def graph_needs(bundle: Bundle) -> GraphNeeds:
    """What a bundle's graph asks of ONNX Runtime. UsageError where it is no typed graph, or has not all its weights."""
    check_is_one_file(bundle.file(GRAPH))
    needs = GraphNeeds.of(bundle.file(GRAPH))
    if needs is None:
        raise BundleError(f"{bundle.path / GRAPH} is no typed ONNX graph.", "Export the bundle again.")
    return needs


def instead_of_plan(bundle: Bundle) -> str:
    """What to do where a bundle's plan cannot be served: its graph is named where some Triton image runs it."""
    build = "export it on the serving GPU with --engine tensorrt."
    runs = runtimes().fitting((graph_needs(bundle),), on_gpu=True)
    return f"{SERVE_GRAPH[0].upper()}{SERVE_GRAPH[1:]}, or {build}" if runs else f"{build[0].upper()}{build[1:]}"


def _graph(bundle: Bundle, facts: BundleFacts, options: TritonOptions) -> _Choice:
    reasons = []
    if options.backend is not Backend.ONNXRUNTIME:
        why = RTX_REASON if bundle.plan is not None else f"{bundle.path} has no engine"
        reasons.append(f"Served as ONNX, by onnxruntime: {why}.")
    needs = graph_needs(bundle)
    known, on_gpu = runtimes(), options.instances.device is not Device.CPU
    fitting = known.fitting((needs,), on_gpu=on_gpu)
    warning = ""
    if not fitting:
        newest = known.images[-1]
        where = "" if on_gpu else " with --device cpu"
        reason = f"in the newest, {newest.release}, {known.misfit(newest, (needs,), on_gpu=on_gpu)}"
        warning = f"No known Triton image runs the graph of {bundle.path}{where}: {reason}."
        if not options.force:
            raise UsageError(warning, _instead_of_graph(needs, facts))
    elif fitting[0] is not known.images[0]:
        kernels = "ONNX Runtime has kernels for bfloat16 on GPUs only. " if needs.bfloat16 else ""
        first = fitting[0]
        reasons.append(f"{kernels}It takes ONNX Runtime {first.onnxruntime} or newer: Triton from {first.release} on.")
    return _Choice(Backend.ONNXRUNTIME, bundle.file(GRAPH), needs, note=" ".join(reasons), warning=warning)


def _instead_of_graph(needs: GraphNeeds, facts: BundleFacts) -> str:
    """What to do where no Triton image runs a graph."""
    if runtimes().fitting((needs,), on_gpu=True):
        return "Leave --device cpu out."
    if needs.has_fp8:
        return "Export it again: graphs with FP8 have opset 21 now."
    half = "--rest fp16" if facts.quantization is not None else "--fp16"
    return f"Export it with {half}, or on the serving GPU with --engine tensorrt, which needs no ONNX Runtime."


def _truncated(choice: _Choice, bundle: Bundle, device: Device | None) -> _Choice:
    """Said of a graph that quantizes FP16: on a CPU it answers wrongly in the Triton images that truncate."""
    images = [image for image in runtimes().images if runtimes().truncates_fp16(image.onnxruntime)]
    if device is Device.GPU or not images:
        return choice
    carried = f"Triton {images[0].release} to {images[-1].release} carry it or an older one"
    text = f"{bundle.path} answers wrongly on a CPU: {fault_of(images[-1].onnxruntime)}, and {carried}. {REMEDY}"
    if device is Device.CPU:
        return dataclasses.replace(choice, warning=text)
    return dataclasses.replace(choice, note=f"{choice.note} {text}".strip())


def _check_alike(name: str, bundles: list[Bundle], backends: list[Backend]) -> None:
    """A model has one config.pbtxt for all its versions."""
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

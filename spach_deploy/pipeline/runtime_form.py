"""A bundle's graph in ONNX Runtime's form, for packages that serve a bundle of TensorRT's by ONNX Runtime.

The form that TensorRT compiles best has twice the nodes in ONNX Runtime, and takes longer there. The other form is made
of the bundle's own graph, so a bundle is enough, without its checkpoint: types and Q/DQ pairs are taken off
(`graph.precision.untyped`, which is exact), the passes for TensorRT taken back (`FROM_TENSORRT_PASSES`), and types and
pairs put on again, as an export does, with ranges measured on the golden pack. It is proven twice: both graphs in FP32
may differ by rounding alone, and the typed graph is compared with the golden pack within the bundle's own tolerances.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import INPUT, model_outputs
from spach_deploy.bundle.schema import CertificateEntry, FileEntry, Form, MadeEntry, Manifest, PrecisionSection
from spach_deploy.bundle.store import GOLDEN, GRAPH, Bundle
from spach_deploy.common.errors import (
    BundleError,
    MismatchError,
    MissingPackageError,
    SpachError,
    UnavailableError,
    UsageError,
)
from spach_deploy.common.files import naming_tmpdir, sha256_of
from spach_deploy.graph.certificate import Certificate, certify
from spach_deploy.graph.editing import name_of, owner
from spach_deploy.graph.opset import check_operators, opset_of
from spach_deploy.graph.passes import FROM_TENSORRT_PASSES, apply_passes
from spach_deploy.graph.precision.decision import PrecisionPolicy, TypingOptions
from spach_deploy.graph.precision.formats import infer_all_types, weighted_layers
from spach_deploy.graph.precision.ranges import RangeMeter, Ranges
from spach_deploy.graph.precision.typed_graph import type_graph
from spach_deploy.graph.precision.untyped import untyped_graph
from spach_deploy.options.specs import Precision
from spach_deploy.pipeline.steps.graph import cpu_form
from spach_deploy.pipeline.steps.manifest import entry
from spach_deploy.quantization.formats import FP8, INT8
from spach_deploy.quantization.plan import QuantizationPlan, summary
from spach_deploy.quantization.qdq import quantized_from, remove_qdq, widen_biases
from spach_deploy.quantization.quantize import mark_sites, quantize_typed
from spach_deploy.quantization.spelt_quantize import join_quantizers
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner, save_model, saved_graph
from spach_deploy.validation.bundle_facts import BundleFacts, read_record
from spach_deploy.validation.result import golden_set
from spach_deploy.validation.runs import EXPORT_MACS, RunResult, examine_typed
from spach_deploy.validation.tolerance import Fp32Reference, rounding_limit

_PACKED = 18
"""Below this opset axes are attributes of ReduceMean, and Split has no number of outputs: the passes know neither."""

_BATCH = 2
"""Images at a time: enough to see two images mixed up, and little memory."""

NAMES = {Form.TENSORRT: "TensorRT", Form.CPU: "ONNX Runtime", Form.CPU_INT8: "eight bits in ONNX Runtime"}
"""What each form is for, in words."""

Outputs = Mapping[str, NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class GraphSize:
    """Nodes of a graph, and bytes of its file."""

    nodes: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.nodes:,} nodes, {self.bytes / 1e6:.1f} MB"


@dataclasses.dataclass(frozen=True)
class RuntimeGraph:
    """The graph to serve by ONNX Runtime.

    `path`: the bundle's own file, or a temporary one that is deleted with this object. `manifest`: describes that file,
    with its SHA-256. `is_made`: whether it was made here. `note`: a sentence on what was made, or on why not and what
    that costs; empty where the bundle's graph has the form already.
    """

    path: Path
    manifest: Manifest
    form: Form
    is_made: bool
    before: GraphSize
    after: GraphSize
    note: str = ""
    _folder: tempfile.TemporaryDirectory[str] | None = dataclasses.field(default=None, repr=False, compare=False)


def graph_for_runtime(bundle: Bundle, *, rest: Precision | None = None) -> RuntimeGraph:
    """The graph of `bundle` in the form that ONNX Runtime runs best, proven against the golden pack.

    `rest`: of INT8 and FP8, the precision of what is not quantized, FP32 (the form for CPUs) or the bundle's own; None
    for the bundle's own. Where the form cannot be made, the bundle's graph is returned, and `note` says why. Inputs and
    outputs are the bundle's in any case. Raises BundleError for a bundle that cannot be read, UsageError for another
    `rest`, MissingPackageError without ONNX Runtime, which compares the graphs, where one has to be made.
    """
    facts = BundleFacts.of(bundle)
    rest = rest or facts.rest
    if rest not in (facts.rest, Precision.FP32) or (rest is not facts.rest and facts.quantization is None):
        raise UsageError(f"A graph in {facts.precision.value} is not made anew with {rest.value}.", "Export it so.")
    size = _size_of(bundle)
    form = bundle.manifest.form
    own = RuntimeGraph(bundle.file(GRAPH), bundle.manifest, form, is_made=False, before=size, after=size)
    changed = _to_change(bundle.manifest.graph.passes)
    if rest is facts.rest and (form is not Form.TENSORRT or changed == 0):
        return own
    try:
        return _made(own, bundle, facts, rest)
    except (BundleError, MissingPackageError):  # the machine lacks something: nothing is known of the graph
        raise
    except SpachError as error:
        return dataclasses.replace(own, note=_not_made(size, error.message))


def _not_made(size: GraphSize, reason: str) -> str:
    return (
        f"The graph stays in the form for TensorRT: {size}. How many nodes fewer ONNX Runtime would need is not"
        f" known. {reason.rstrip('.')}."
    )


_OF_TENSORRT = ("spell_first_norm", "split_group_norm", "shift_depthwise", "axis_products", "tokens_first")


def _to_change(passes: Mapping[str, int]) -> int | None:
    """How many places of the graph the passes for TensorRT changed; None where the manifest does not say."""
    return sum(passes.get(name, 0) for name in _OF_TENSORRT) if passes else None


def _lacking(changed: Mapping[str, tuple[str, ...]], manifest: Manifest) -> str:
    """A sentence on places that the passes for TensorRT changed and that were not found again; empty without any."""
    found, made = sum(len(changed.get(name, ())) for name in _OF_TENSORRT), _to_change(manifest.graph.passes) or 0
    if found >= made:
        return ""
    return f"Of {made} places that the export changed for TensorRT, {found} are as it wrote them"


def _size_of(bundle: Bundle) -> GraphSize:
    file = bundle.file(GRAPH)
    try:
        nodes = len(onnx.load(file, load_external_data=False).graph.node)
    except Exception as error:  # protobuf's own
        raise BundleError(f"{file} is no ONNX graph ({error}).", "Export the bundle again.") from None
    return GraphSize(nodes, file.stat().st_size)


def _made(own: RuntimeGraph, bundle: Bundle, facts: BundleFacts, rest: Precision) -> RuntimeGraph:
    """The graph made anew. Raises SpachError where that cannot be done, or is not the same."""
    golden = Golden.load(bundle.file(GOLDEN))
    golden.check(bundle)
    form, plan = cpu_form(facts.precision, rest), read_record(facts)
    typed = ir.from_proto(onnx.load(own.path))
    join_quantizers(typed)
    if opset_of(typed) < _PACKED:
        raise UnavailableError(f"It has opset {opset_of(typed)}, and the passes need {_PACKED}.")
    modules = {owner(name_of(node)) for node in typed.graph}
    exact = _fp32_graph(typed, form, plan, golden, bundle.manifest, rest)
    lacking = _lacking({} if exact is None else exact.changed, bundle.manifest)
    if exact is None:
        return dataclasses.replace(own, note=_not_made(own.before, lacking) if lacking else "")
    model, policy = _typed(exact, plan, facts, rest)
    certificate = certify(model, modules, is_own=bundle.manifest.model.origin == "module")
    with naming_tmpdir():
        folder = tempfile.TemporaryDirectory(prefix="spach-", ignore_cleanup_errors=True)
    path = Path(folder.name) / GRAPH
    save_model(model, path)
    size = GraphSize(certificate.nodes, path.stat().st_size)
    runs = _proven(path, golden, bundle, facts, rest)
    measured = {output.name: output.rel_l2_worst for run in runs for output in run.comparison.outputs}
    made = MadeEntry(
        graph_sha256=sha256_of(own.path),
        nodes=own.before.nodes,
        bytes=own.before.bytes,
        runtime=_runtime(),
        rewritten={name: len(places) for name, places in exact.changed.items() if places},
        fp32_rel_l2=exact.errors,
        rel_l2=measured,
    )
    written = _Written(path, form, rest, made, certificate, model, policy)
    note = (
        f"Made anew in the form for {NAMES[form]}: {size}, instead of {own.before} in the form for {NAMES[own.form]};"
        f" {_evidence(runs)}.{f' {lacking}.' if lacking else ''}"
    )
    return RuntimeGraph(path, written.manifest(bundle.manifest), form, True, own.before, size, note, folder)


@dataclasses.dataclass(frozen=True)
class _Fp32Form:
    """The FP32 graph in the new form. `changed`: places by pass. `errors`: against the FP32 graph in the old form."""

    model: ir.Model
    ranges: Ranges
    changed: Mapping[str, tuple[str, ...]]
    errors: dict[str, float]


def _fp32_graph(
    typed: ir.Model, form: Form, plan: QuantizationPlan | None, golden: Golden, manifest: Manifest, rest: Precision
) -> _Fp32Form | None:
    """Take types and pairs off, and give the other form; None where that changes nothing. MismatchError where the forms
    differ by more than rounding.
    """
    model = untyped_graph(typed)
    if plan is not None:
        remove_qdq(model)
        mark_sites(model, plan)
        if not rest.is_half:
            widen_biases(model, plan)
    feeds = golden.input.astype(np.float32) if golden.input.dtype == np.float16 else golden.input
    with saved_graph(model) as path:
        changed = apply_passes(model, FROM_TENSORRT_PASSES[form])
        if not any(changed.values()):
            return None
        with OnnxRuntimeRunner(path, is_brief=True, max_batch=_BATCH) as runner:
            before = runner.run({INPUT: feeds})
    infer_all_types(model)
    meter = RangeMeter(model, tensors=None if rest.is_half else ())
    parts = [meter.run({INPUT: feeds[start : start + _BATCH]}) for start in range(0, len(feeds), _BATCH)]
    after = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    ranges = meter.ranges(f"the {len(golden.names)} images of the golden pack")
    return _Fp32Form(model, ranges, changed, _rounding(before, after, manifest))


def _rounding(before: Outputs, after: Outputs, manifest: Manifest) -> dict[str, float]:
    """Relative L2 of the model's outputs in both forms. MismatchError above what rounding explains.

    Each form may be the export's limit away from the reference, so twice that from the other.
    """
    names = [tensor.name for tensor in model_outputs(manifest.outputs)]
    reference = Fp32Reference({name: before[name] for name in names}, {})
    errors = {name: reference.error(name, after[name]) for name in names}
    limit = 2 * (manifest.graph.relative_l2_limit or rounding_limit(0.0))
    for name, error in errors.items():
        if not error <= limit:
            raise MismatchError(
                f"In FP32 the two forms differ in {name} by a relative L2 of {error:.1e}, and {limit:.1e} is rounding."
            )
    return errors


def _typed(
    exact: _Fp32Form, plan: QuantizationPlan | None, facts: BundleFacts, rest: Precision
) -> tuple[ir.Model, PrecisionPolicy]:
    """The FP32 graph with types and pairs, as an export sets them."""
    typed = type_graph(exact.model, rest, exact.ranges, TypingOptions(io_dtype=facts.io_dtype))
    model, policy = typed.model, typed.policy
    if plan is not None:
        model = quantize_typed(model, plan)
        policy = dataclasses.replace(policy, quantized=facts.precision, quantized_summary=summary(plan))
    infer_all_types(model)
    check_operators(model)
    return model, policy


def _proven(path: Path, golden: Golden, bundle: Bundle, facts: BundleFacts, rest: Precision) -> tuple[RunResult, ...]:
    """Compare the typed graph with the golden pack. MismatchError outside the bundle's tolerances."""
    images = golden_set(golden, bundle.manifest.validation.images, facts.outputs, facts.batch)
    runs = examine_typed(path, rest, images, facts.tolerances.graph, most_macs=EXPORT_MACS)
    for run in runs:
        if not run.passed:
            raise MismatchError(f"It is not what the reference computes: {run.verdict.findings[0]}")
    return runs


def _evidence(runs: tuple[RunResult, ...]) -> str:
    """The worst figure of each output, and what is allowed, in words."""
    worst: dict[str, tuple[float, float]] = {}
    for run in runs:
        for output in run.comparison.outputs:
            figures = output.rel_l2_worst, run.bounds.outputs[output.name].rel_l2
            worst[output.name] = max(worst.get(output.name, figures), figures)
    told = ", ".join(f"{name} {error:.1e} ({allowed:.1e} allowed)" for name, (error, allowed) in worst.items())
    return f"relative L2 on the golden images: {told}"


def _runtime() -> str:
    return f"ONNX Runtime {importlib.metadata.version('onnxruntime')}"


@dataclasses.dataclass(frozen=True)
class _Written:
    """The new graph in its file, and what a manifest says of it."""

    path: Path
    form: Form
    rest: Precision
    made: MadeEntry
    certificate: Certificate
    model: ir.Model
    policy: PrecisionPolicy

    def manifest(self, of: Manifest) -> Manifest:
        """The bundle's manifest `of`, with this graph in the place of the bundle's."""
        graph = msgspec.structs.replace(
            of.graph, form=self.form, made=self.made, certificate=entry(self.certificate, CertificateEntry)
        )
        policy = {**self.policy.to_dict(), "layers": weighted_layers(self.model)}
        quantization = of.quantization and msgspec.structs.replace(
            of.quantization,
            rest=self.rest,
            quantized_from=quantized_from(self.rest, _FORMATS[of.quantization.format]),
        )
        return msgspec.structs.replace(
            of,
            precision=entry(policy, PrecisionSection),
            quantization=quantization,
            graph=graph,
            files={**of.files, GRAPH: FileEntry(sha256=sha256_of(self.path), bytes=self.path.stat().st_size)},
        )


_FORMATS = {Precision.INT8: INT8, Precision.FP8: FP8}

"""Steps "rewrite the model", "export the graph", "prove the graph" and "give the graph its form", all in FP32."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from torch import nn

from spach_deploy import blocks
from spach_deploy.blocks import RewriteResult, rewrite
from spach_deploy.blocks.mixing_block import ABSORBING
from spach_deploy.bundle.inputs import feeds_of
from spach_deploy.bundle.outputs import graph_outputs
from spach_deploy.bundle.schema import Form, LevelEntry
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.interface import add_interface
from spach_deploy.graph.levels import levels
from spach_deploy.graph.opset import convert_opset
from spach_deploy.graph.passes import PASSES, TENSORRT_PASSES, Pass, apply_passes
from spach_deploy.graph.precision.formats import infer_all_types
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.models.own_module import OwnForward
from spach_deploy.options.specs import ExportOptions, Flavour, ImageSize, Precision
from spach_deploy.pipeline.steps.images import GoldenImages
from spach_deploy.pipeline.steps.reference import EXACT_BATCHES, ReferenceOutputs
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.quantization.quantize import equalize_graph, mark_sites
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner, saved_graph
from spach_deploy.validation.tolerance import prove_equal


@dataclasses.dataclass(frozen=True)
class Fp32Graph:
    """The FP32 graph.

    `errors`: relative L2 of the exported graph by batch size; empty where only its target's form is compared.
    `changed`: nodes that each pass changed. `levels`: how well the blocks of a user's own module are known.
    """

    model: ir.Model
    changed: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    errors: dict[int, float] = dataclasses.field(default_factory=dict)
    levels: dict[str, LevelEntry] = dataclasses.field(default_factory=dict)


def rewrite_model(loaded: LoadedModel, options: ExportOptions) -> RewriteResult:
    """The static model: the reference with fixed shapes and folded constants, proven equal in FP64."""
    quantized = options.quantization.quantize if options.precision.is_quantized else None
    return rewrite(loaded.model, _left_out(options), quantized)


def export_graph(static: nn.Module, image_size: ImageSize, channels: int = 3, known: tuple[str, ...] = ()) -> Fp32Graph:
    """The exported graph: input (batch, channels, H, W) float32, and the static model's outputs. `known`: paths of the
    modules that have a static form, of a user's own module.
    """
    graph = export_canonical(static, image_size, channels)
    return Fp32Graph(graph, levels=levels(graph, static, known) if isinstance(static, OwnForward) else {})


def prove_graph(graph: Fp32Graph, images: GoldenImages, reference: ReferenceOutputs) -> Fp32Graph:
    """Compare the exported graph with the reference in ONNX Runtime. MismatchError where they differ."""
    with saved_graph(graph.model) as path, OnnxRuntimeRunner(path) as runner:
        errors = prove_equal(
            "exported graph",
            lambda x: runner.run(feeds_of(x)),
            images.inputs,
            reference.reference,
            EXACT_BATCHES,
        )
    return dataclasses.replace(graph, errors=errors)


def give_form(
    graph: Fp32Graph, loaded: LoadedModel, images: GoldenImages, plan: QuantizationPlan | None, options: ExportOptions
) -> Fp32Graph:
    """Apply the passes of the graph's runtime, and add the requested inputs and outputs. With a plan, equalize first.

    The model is changed in place, so that its weights are in memory once.
    """
    model = graph.model
    if plan is not None:
        equalize_graph(model, plan)
        mark_sites(model, plan)
    changed = apply_passes(model, _passes(options), options.disabled_rewrites)
    outputs, io_dtype = graph_outputs(loaded.model.outputs, options.outputs), options.outputs.io_dtype
    add_interface(model, outputs, io_dtype, images.preprocessing, loaded.takes.images)
    infer_all_types(model)
    convert_opset(model, options.graph_opset)
    return dataclasses.replace(graph, changed=changed)


def form_of(options: ExportOptions) -> Form:
    """The form of the graph that an export makes: that of the runtime that is to run it."""
    if options.engine.flavour is not Flavour.NONE:
        return Form.TENSORRT
    return cpu_form(options.precision, options.rest)


def cpu_form(precision: Precision, rest: Precision) -> Form:
    """The form for ONNX Runtime on a CPU. It fuses eight bits with FP32 around them alone."""
    return Form.CPU_INT8 if precision.is_quantized and rest is Precision.FP32 else Form.CPU


def rewrite_in_float(
    static: RewriteResult, graph: Fp32Graph, plan: QuantizationPlan | None, options: ExportOptions
) -> RewriteResult:
    """Rewrites that only layers in floating point allow, as the plan leaves them: of the static model, and of the
    weights of `graph`, in place.

    Layers that share their weights with others stay as they are.
    """
    left_out = _left_out(options)
    if plan is None or "tokens_first" in left_out:
        return static
    constants = graph.model.graph.initializers
    own = {name for name, value in constants.items() if len(value.uses()) == 1}
    in_float = [kept.module for kept in plan.kept if f"{kept.module}.weight" in own]
    rewritten = blocks.rewrite_in_float(static, left_out, in_float)
    for change in rewritten.outcomes["absorb_qkv_bias"].changes:
        for name in (f"{change.module}.{part}" for part in ABSORBING):
            constants[name].const_value = ir.Tensor(rewritten.model.get_parameter(name).detach().numpy(), name=name)
    return rewritten


_COSTLY_ON_CPUS = "grid_stream"
"""OpenVINO gives a stream (B, H, W, C) the convolutions' layout, and reorders it before and after each product."""

_COSTLY_IN_BF16 = "fold_residual"
"""A centre tap of 1 + w has three digits in bfloat16, which the input of every block loses by it."""


def _passes(options: ExportOptions) -> tuple[Pass, ...]:
    return PASSES[form_of(options)]


def _left_out(options: ExportOptions) -> tuple[str, ...]:
    """Rewrites that this export skips: those turned off, those that only prepare passes which are not applied, and of
    a graph for CPUs those that cost there.
    """
    applied = {step.name for step in _passes(options)}
    costly: tuple[str, ...] = ()
    if form_of(options) is not Form.TENSORRT:
        costly = (_COSTLY_ON_CPUS, *((_COSTLY_IN_BF16,) if options.precision is Precision.BF16 else ()))
    unapplied = (step.name for step in TENSORRT_PASSES if step.name not in applied)
    return (*options.disabled_rewrites, *costly, *unapplied)

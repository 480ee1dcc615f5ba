"""Step "write the manifest": the sections of manifest.json, made from the results of the other steps."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import msgspec
import onnx_ir as ir

from spach_deploy.blocks import RewriteResult
from spach_deploy.blocks.base import Outcome
from spach_deploy.blocks.mixing_block import ABSORBED
from spach_deploy.bundle import store as bundles
from spach_deploy.bundle.outputs import INPUT, graph_outputs
from spach_deploy.bundle.schema import (
    CalibrationEntry,
    CertificateEntry,
    EngineSection,
    EqualizationEntry,
    GraphSection,
    KeptFloatEntry,
    KernelsEntry,
    Manifest,
    ModelSection,
    PhaseEntry,
    PrecisionSection,
    QuantizationSection,
    RewriteEntry,
    RewritesEntry,
    SensitivityEntry,
    StartEntry,
    TensorInfo,
    ValidationSection,
    WarningEntry,
)
from spach_deploy.common.progress import Phase
from spach_deploy.common.versions import tool_versions
from spach_deploy.engine.build import EngineResult
from spach_deploy.engine.cost_model import predicted_ms
from spach_deploy.engine.network_facts import AchievedPrecision
from spach_deploy.engine.plan_facts import PlanFacts
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.models.hyperparameters import settings_section
from spach_deploy.options.specs import (
    BatchProfile,
    ExportOptions,
    Flavour,
    IODtype,
    OutputSpec,
    Precision,
    Preprocessing,
    Role,
)
from spach_deploy.pipeline.steps.calibration import CalibrationResult
from spach_deploy.pipeline.steps.graph import form_of
from spach_deploy.pipeline.steps.precision import CertifiedGraph
from spach_deploy.pipeline.steps.reference import ReferenceOutputs
from spach_deploy.quantization.qdq import quantized_from
from spach_deploy.quantization.sensitivity import LayerSelection

_Entry = TypeVar("_Entry")


def entry(content: object, kind: type[_Entry]) -> _Entry:
    """Convert a step's result, an object or plain JSON, to a struct of the manifest."""
    return msgspec.convert(content, kind, from_attributes=True)


def model_section(loaded: LoadedModel, options: ExportOptions) -> ModelSection:
    """Which model, with which weights."""
    return ModelSection(
        name=loaded.name,
        architecture=loaded.architecture,
        image_size=loaded.image_size,
        num_classes=loaded.num_classes,
        origin=loaded.origin,
        checkpoint=None if loaded.checkpoint_path is None else loaded.checkpoint_path.name,
        checkpoint_sha256=loaded.checkpoint_sha256,
        weights=options.model.weights,
        ignored=options.model.ignore,
        weights_sha256=loaded.weights_sha256,
        hyperparameters=settings_section(loaded.settings),
        notes=tuple(loaded.notes),
    )


def preprocessing_section(preprocessing: Preprocessing) -> Preprocessing:
    """The evaluation transform."""
    return preprocessing


@dataclasses.dataclass(frozen=True)
class InterfaceSections:
    """Inputs, outputs, output options and batch profile."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    output_options: OutputSpec
    batch: BatchProfile


def interface_sections(
    graph: ir.Graph, model: Sequence[TensorInfo], options: ExportOptions, images: Sequence[str] = (INPUT,)
) -> InterfaceSections:
    """Sections on inputs, outputs and batch, from those of the typed graph. `model`: the outputs that the model
    computes; `images`: the inputs that are images.
    """
    layout = "NHWC" if options.outputs.io_dtype is IODtype.UINT8 else "NCHW"
    meant = {tensor.name: tensor for tensor in graph_outputs(model, options.outputs)}
    return InterfaceSections(
        tuple(_tensor(value, layout if value.name in images else "") for value in graph.inputs),
        tuple(_tensor(value, meant[value.name or ""].layout, meant[value.name or ""].role) for value in graph.outputs),
        options.outputs,
        options.engine.batch,
    )


def _tensor(value: ir.Value, layout: str, role: Role | None = None) -> TensorInfo:
    shape = tuple(dim if isinstance(dim, int) else None for dim in value.shape or ())
    dtype = "" if value.dtype is None else value.dtype.numpy().name
    return TensorInfo(name=value.name or "", dtype=dtype, shape=shape, layout=layout, role=role)


def precision_section(typed: CertifiedGraph) -> PrecisionSection:
    """The precision policy, and the precision of every weighted layer in the graph."""
    return entry({**typed.policy.to_dict(), "layers": typed.layers}, PrecisionSection)


def graph_section(
    static: RewriteResult, reference: ReferenceOutputs, typed: CertifiedGraph, options: ExportOptions
) -> GraphSection:
    """Rewrites and passes, their error in FP32, and the certificate."""
    errors = {"static model": reference.static_errors, **typed.errors}
    return GraphSection(
        form=form_of(options),
        certificate=entry(typed.certificate, CertificateEntry),
        rewrites={name: _outcome(outcome) for name, outcome in static.outcomes.items()},
        passes={name: len(changed) for name, changed in typed.passes.items()},
        relative_l2_limit=reference.reference.limit,
        relative_l2={step: _by_batch(by_batch) for step, by_batch in errors.items() if by_batch},
        levels=typed.levels,
    )


def _outcome(outcome: Outcome) -> RewriteEntry:
    return RewriteEntry(modules=len(outcome.changes), worst_fp64=outcome.worst, skipped=tuple(outcome.skipped))


def _by_batch(errors: dict[int, float]) -> dict[str, float]:
    return {f"batch {batch}": error for batch, error in errors.items()}


def quantization_sections(
    quantized: CalibrationResult | None, choice: LayerSelection | None, static: RewriteResult, options: ExportOptions
) -> QuantizationSection | None:
    """How the model was calibrated, and which layers stay in float and why; None for other precisions."""
    if quantized is None:
        return None
    plan = quantized.plan
    return QuantizationSection(
        format=Precision(plan.form.name),
        rest=options.rest,
        quantized_from=quantized_from(options.rest, plan.form),
        vnni=options.quantization.vnni,
        layers=len(plan.sites),
        macs_share=plan.macs_share,
        per_tensor_layers=sum(not site.per_channel for site in plan.sites if site.weight),
        calibration=entry(quantized.calibration.summary(), CalibrationEntry),
        equalization=tuple(entry(pair.to_dict(), EqualizationEntry) for pair in plan.equalized),
        scales=bundles.QUANTIZATION,
        kept_float=tuple(entry(kept.to_dict(), KeptFloatEntry) for kept in plan.kept),
        sensitivity=None if choice is None else entry(choice.to_dict(), SensitivityEntry),
        rewrites=RewritesEntry(
            disabled=options.disabled_rewrites,
            quantize=options.quantization.quantize,
            in_float=tuple(f"{change.module}.{ABSORBED}" for change in static.outcomes["absorb_qkv_bias"].changes),
        ),
    )


def no_engine_section(reason: str) -> EngineSection:
    """The section of a bundle without an engine."""
    return EngineSection(flavour=Flavour.NONE, reason=reason)


def engine_section(
    engine: EngineResult, achieved: AchievedPrecision, facts: PlanFacts | None, options: ExportOptions
) -> EngineSection:
    """The engine plan: its builder, its targets and its layers."""
    target = options.engine
    return EngineSection(
        flavour=engine.flavour,
        version=engine.flavour_version,
        gpus=tuple(str(gpu) for gpu in engine.gpus),
        batch=str(engine.batch),
        bytes=len(engine.plan),
        graph_sha256=engine.graph_sha256,
        tf32=target.tf32,
        opt_level=target.opt_level,
        workspace_bytes=target.workspace_bytes,
        version_compatible=target.version_compatible,
        hardware_compatible=target.hardware_compatible,
        layers_by_dtype=dict(achieved.layers_by_dtype),
        layers=dict(achieved.layers),
        kernels=kernels(facts, engine.batch.opt, tuple(map(str, engine.gpus))),
        warnings=tuple(WarningEntry(text=text, count=count) for text, count in engine.warnings),
        parse_seconds=round(engine.parse_seconds, 3),
        build_seconds=round(engine.build_seconds, 3),
        start=StartEntry() if engine.flavour is Flavour.TENSORRT_RTX else None,
    )


def kernels(facts: PlanFacts | None, batch: int, gpus: Collection[str] = ()) -> KernelsEntry | None:
    """Counts of the plan's kernels, and predictions for cards of these `gpus` (`sm89`); None where the text in the plan
    could not be read.
    """
    if facts is None:
        return None
    return KernelsEntry(
        total=len(facts.kernels),
        by_kind=facts.kernels_by_kind,
        fused_attentions=facts.fused_attentions,
        products_by_dtype=facts.products_by_dtype,
        batch=batch,
        bytes_moved=facts.bytes_moved(batch),
        predicted_ms=predicted_ms(facts, gpus, batch),
    )


@dataclasses.dataclass(frozen=True)
class ToolsSection:
    """When the bundle was made, and the versions of packages that made it."""

    created: str
    tools: dict[str, str]


def tools_section() -> ToolsSection:
    """The current time and the installed versions."""
    return ToolsSection(datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), tool_versions())


def seal(
    staging: Path,
    known: bundles.FileDigests = MappingProxyType({}),
    *,
    command: str,
    model: ModelSection,
    preprocessing: Preprocessing,
    interface: InterfaceSections,
    precision: PrecisionSection,
    quantization: QuantizationSection | None,
    graph: GraphSection,
    engine: EngineSection,
    validation: ValidationSection,
    phases: Iterable[Phase],
    notes: Iterable[str],
) -> Manifest:
    """Write the manifest into `staging`, with the hashes of all files there (`bundle.store.seal`).

    `known`: digests of files that have not changed since.
    """
    now = tools_section()
    manifest = Manifest(
        created=now.created,
        tools=now.tools,
        command=command,
        model=model,
        preprocessing=preprocessing,
        inputs=interface.inputs,
        outputs=interface.outputs,
        output_options=interface.output_options,
        batch=interface.batch,
        precision=precision,
        quantization=quantization,
        graph=graph,
        engine=engine,
        validation=validation,
        phases=tuple(entry(phase.to_dict(), PhaseEntry) for phase in phases),
        notes=tuple(notes),
    )
    return bundles.seal(staging, manifest, known)

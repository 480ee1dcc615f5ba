"""What manifest.json says of an export: sections of plain JSON, made from the stages' results."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import onnx_ir as ir

from spach_deploy.bundle import store as bundles
from spach_deploy.common.versions import tool_versions
from spach_deploy.engine.build import EngineResult
from spach_deploy.engine.network_facts import AchievedPrecision
from spach_deploy.engine.plan_facts import PlanFacts
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.models.hyperparameters import settings_section
from spach_deploy.options.specs import ExportOptions, IODtype, Preprocessing
from spach_deploy.pipeline.steps.precision import TypedGraph
from spach_deploy.pipeline.steps.quantization import CalibrationStep
from spach_deploy.pipeline.steps.reference import ReferenceOutputs
from spach_deploy.quantization.equalization import EqualizedPair
from spach_deploy.quantization.qdq import quantized_from
from spach_deploy.quantization.sensitivity import LayerSelection
from spach_deploy.rewrites import RewriteResult


def model_section(loaded: LoadedModel, options: ExportOptions) -> dict[str, Any]:
    """Which model, with which weights."""
    return {
        "name": loaded.name,
        "image_size": loaded.image_size,
        "num_classes": loaded.num_classes,
        "origin": loaded.origin,
        "checkpoint": None if loaded.checkpoint_path is None else loaded.checkpoint_path.name,
        "checkpoint_sha256": loaded.checkpoint_sha256,
        "weights": options.model.weights.value,
        "ignored": list(options.model.ignore),
        "weights_sha256": loaded.weights_sha256,
        "hyperparameters": settings_section(loaded.settings),
        "notes": list(loaded.notes),
    }


def preprocessing_section(preprocessing: Preprocessing) -> dict[str, Any]:
    """The evaluation transform."""
    return dataclasses.asdict(preprocessing)


def interface_sections(graph: ir.Graph, options: ExportOptions) -> dict[str, Any]:
    """Inputs, outputs, batch. Of `graph` only inputs and outputs are read."""
    layout = "NHWC" if options.outputs.io_dtype is IODtype.UINT8 else "NCHW"
    return {
        "inputs": [_tensor(value, layout) for value in graph.inputs],
        "outputs": [_tensor(value, "NC") for value in graph.outputs],
        "output_options": {
            "io_dtype": options.outputs.io_dtype.value,
            "top_k": options.outputs.top_k,
            "softmax": options.outputs.softmax,
        },
        "batch": dataclasses.asdict(options.engine.batch),
    }


def _tensor(value: ir.Value, layout: str) -> dict[str, Any]:
    shape = [dim if isinstance(dim, int) else None for dim in value.shape or ()]
    dtype = "" if value.dtype is None else value.dtype.numpy().name
    return {"name": value.name, "dtype": dtype, "shape": shape, "layout": layout}


def precision_section(typed: TypedGraph) -> dict[str, Any]:
    """The policy, and what the graph asks of every weighted layer."""
    return {**typed.policy.to_dict(), "layers": [layer.to_dict() for layer in typed.layers]}


def graph_section(static: RewriteResult, answers: ReferenceOutputs, typed: TypedGraph) -> dict[str, Any]:
    """What was rewritten, what it cost in FP32, and what the graph promises."""
    errors = {"static model": answers.static_errors, **typed.errors}
    return {
        "certificate": typed.certificate.to_dict(),
        "rewrites": {name: _outcome(outcome) for name, outcome in static.outcomes.items()},
        "passes": {name: len(changed) for name, changed in typed.passes.items()},
        "relative_l2_limit": answers.reference.limit,
        "relative_l2": {stage: _by_batch(by_batch) for stage, by_batch in errors.items() if by_batch},
    }


def _outcome(outcome: Any) -> dict[str, Any]:
    return {"modules": len(outcome.changes), "worst_fp64": outcome.worst, "skipped": list(outcome.skipped)}


def _by_batch(errors: dict[int, float]) -> dict[str, float]:
    return {f"batch {batch}": error for batch, error in errors.items()}


def quantization_sections(
    quantized: CalibrationStep | None, choice: LayerSelection | None, options: ExportOptions
) -> dict[str, Any]:
    """How it was calibrated, and which layers stayed in float and why; nothing for other precisions."""
    if quantized is None:
        return {}
    plan = quantized.plan
    return {
        "quantization": {
            "format": plan.form.name,
            "rest": options.rest.value,
            "quantized_from": quantized_from(options.rest, plan.form).value,
            "vnni": options.quantization.vnni,
            "layers": len(plan.sites),
            "macs_share": plan.macs_share,
            "per_tensor_layers": sum(not site.per_channel for site in plan.sites if site.weight),
            "calibration": quantized.calibration.summary(),
            "equalization": [_equalized(pair) for pair in plan.equalized],
            "scales": bundles.QUANTIZATION,
            "kept_float": [kept.to_dict() for kept in plan.kept],
            "sensitivity": None if choice is None else choice.to_dict(),
            "rewrites": {"disabled": list(options.disabled_rewrites), "quantize": list(options.quantization.quantize)},
        }
    }


def _equalized(pair: EqualizedPair) -> dict[str, Any]:
    return {name: value for name, value in pair.to_dict().items() if name not in ("factors", "divided", "weight")}


def no_engine_section(reason: str) -> dict[str, Any]:
    """Why there is no plan."""
    return {"flavour": "none", "reason": reason}


def engine_section(
    engine: EngineResult, achieved: AchievedPrecision, facts: PlanFacts | None, options: ExportOptions
) -> dict[str, Any]:
    """The plan: who built it, for what, and what it holds."""
    target = options.engine
    return {
        "flavour": engine.flavour.value,
        "version": engine.flavour_version,
        "gpus": [str(gpu) for gpu in engine.gpus],
        "batch": str(engine.batch),
        "bytes": len(engine.plan),
        "graph_sha256": engine.graph_sha256,
        "tf32": target.tf32,
        "opt_level": target.opt_level,
        "workspace_bytes": target.workspace_bytes,
        "version_compatible": target.version_compatible,
        "hardware_compatible": target.hardware_compatible,
        "layers_by_dtype": dict(achieved.layers_by_dtype),
        "layers": dict(achieved.layers),
        "kernels": kernels(facts, engine.batch.opt),
        "warnings": [{"text": text, "count": count} for text, count in engine.warnings],
        "parse_seconds": round(engine.parse_seconds, 3),
        "build_seconds": round(engine.build_seconds, 3),
    }


def kernels(facts: PlanFacts | None, batch: int) -> dict[str, Any] | None:
    """The schedule in numbers; None where the plan's text could not be read."""
    if facts is None:
        return None
    return {
        "total": len(facts.kernels),
        "by_kind": facts.kernels_by_kind,
        "fused_attentions": facts.fused_attentions,
        "products_by_dtype": facts.products_by_dtype,
        "batch": batch,
        "bytes_moved": facts.bytes_moved(batch),
    }


def tools_section() -> dict[str, Any]:
    """Versions of everything that had a hand in it, and when."""
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "tools": tool_versions(),
    }

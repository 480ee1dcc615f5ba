"""Which layers pay in eight bits on TensorRT for RTX, and what an export does with them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from spach_deploy.bundle.store import GRAPH, Bundle
from spach_deploy.cli.validate import main as validate
from spach_deploy.common.progress import ExportObserver, Phases
from spach_deploy.graph.export import export_canonical
from spach_deploy.models import published
from spach_deploy.options.specs import (
    BatchProfile,
    ComputeCapability,
    EngineTarget,
    ExportOptions,
    Flavour,
    ModelSpec,
    Precision,
    QuantizationSpec,
)
from spach_deploy.pipeline.export import export
from spach_deploy.pipeline.steps.graph import Fp32Graph
from spach_deploy.pipeline.steps.quantize import _paying
from spach_deploy.quantization.paying import REASON, paying
from spach_deploy.quantization.plan import read_plan, without
from spach_deploy.quantization.qdq import audit
from spach_deploy.quantization.sites import find_sites
from spach_deploy.quantization.spelt_quantize import join_quantizers
from tests import small_bundles, static_models
from tests.quantization import small_models, small_quantized
from tests.shared import once

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
ADA, TURING = ComputeCapability(8, 9), ComputeCapability(7, 5)


def found(kind: str, *gpus: ComputeCapability) -> set[str]:
    """The last part of the names of layers that pay."""
    graph = export_canonical(small_models.static(kind), small_bundles.SIZE)
    return {".".join(module.split(".")[-2:]) for module in paying(graph, find_sites(graph), gpus)}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("hybrid", {"spatial_func.proj", "channel_func.fc2"}),
        ("mlp", {"spatial_func.fc2", "channel_func.fc2"}),
        ("conv", {"channel_func.fc2"}),
    ],
)
def test_layers_pay_whose_input_is_written_in_eight_bits(kind: str, expected: set[str]) -> None:
    assert found(kind, ADA) == expected == found(kind)


def test_turing_has_no_epilogue_to_lose() -> None:
    assert found("hybrid", TURING) > found("hybrid", ADA)
    assert found("hybrid", TURING) == found("hybrid", ADA, TURING) >= {"spatial_func.qkv", "channel_func.fc1"}


def test_where_no_layer_pays_all_are_quantized_and_a_note_says_so() -> None:
    graph = Fp32Graph(export_canonical(small_models.static("hybrid"), small_bundles.SIZE))
    calibration = read_plan(small_quantized.bundle(Precision.FP8) / "quantization.json")
    of_norms = frozenset(site.module for site in calibration.sites if not site.module.endswith(("qkv", "fc1")))
    phases, given = Phases(ExportObserver()), without(calibration, of_norms, "asked")
    made: Any = SimpleNamespace(plan=given)
    assert _paying(made, graph, options(Path(), Precision.FP8), phases) is made
    assert phases.notes == ["No layer of this model pays in eight bits on TensorRT for RTX, so all are quantized."]


def test_without_ends_the_exchange_of_ranges_that_serves_nothing() -> None:
    plan = read_plan(small_quantized.bundle(Precision.FP8) / "quantization.json")
    qkv = frozenset(site.module for site in plan.sites if site.module.endswith("qkv"))
    assert any(pair.site in qkv for pair in plan.equalized)
    left = without(plan, qkv, "asked")
    assert not any(pair.site in qkv for pair in left.equalized)
    proj = frozenset(site.module for site in plan.sites if site.module.endswith("proj"))
    kept = without(plan, proj, "asked")
    assert [pair for pair in kept.equalized if pair.site in proj] == [
        pair for pair in plan.equalized if pair.site in proj
    ], "the scales of qkv were set after that exchange"


NAME = "wide_hybrid"
"""A small model with heads that TensorRT fuses without padding."""


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Let the registry know the model, for as long as the block lasts."""
    with pytest.MonkeyPatch.context() as patch:
        wide = static_models.architecture(32, 4, 3, "2 conv | 1 conv, 2 trans | 2 trans", heads=2)
        patch.setitem(published.ARCHITECTURES, NAME, wide)
        yield


def options(target: Path, precision: Precision, layers: str = "auto") -> ExportOptions:
    """Of an export with an engine."""
    model = ModelSpec(NAME, image_size=small_bundles.SIZE, num_classes=small_bundles.CLASSES)
    spec = QuantizationSpec()
    if precision.is_quantized:
        spec = QuantizationSpec(calibration=small_quantized.calibration_images(), layers=layers)
    engine = EngineTarget(Flavour.TENSORRT_RTX, (ADA,), BatchProfile(1, 2, 4))
    return ExportOptions(model, precision, engine=engine, output=target, quantization=spec)


def bundle(precision: Precision, layers: str = "auto") -> Bundle:
    """Exported once per run of the tests."""

    def make(target: Path) -> None:
        with registered():
            export(options(target, precision, layers))

    return Bundle.open(once(f"small-rtx/{precision.value}-{layers}", make))


@needs_rtx
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8], ids=["int8", "fp8"])
def test_eight_bits_take_no_kernel_more_and_move_fewer_bytes_than_half_precision(precision: Precision) -> None:
    half, eight, everything = bundle(Precision.FP16), bundle(precision), bundle(precision, "all")
    (half_kernels, half_bytes), (kernels, moved), (most, _) = map(schedule, (half, eight, everything))
    assert kernels <= half_kernels < most
    assert moved < half_bytes
    assert fused(eight) == fused(half) > 0


def schedule(made: Bundle) -> tuple[int, int]:
    """Kernels, and bytes moved."""
    entry = made.manifest.engine.kernels
    assert entry is not None
    assert entry.total is not None
    assert entry.bytes_moved is not None
    return entry.total, entry.bytes_moved


def fused(made: Bundle) -> int:
    """Fused attentions."""
    entry = made.manifest.engine.kernels
    assert entry is not None
    return entry.fused_attentions or 0


@needs_rtx
def test_the_record_says_which_layers_stay_in_half_and_why() -> None:
    section = bundle(Precision.INT8).manifest.quantization
    assert section is not None
    reasons = {kept.module: kept.reason for kept in section.kept_float}
    assert {module for module, reason in reasons.items() if reason == REASON} >= {
        "layer2.2.spatial_func.qkv",
        "layer2.2.channel_func.fc1",
    }
    assert section.rewrites.in_float
    assert all(module.endswith("qkv") and reasons[module] == REASON for module in section.rewrites.in_float)
    everything = bundle(Precision.INT8, "all").manifest.quantization
    assert everything is not None
    assert everything.rewrites.in_float == ()
    assert REASON not in {kept.reason for kept in everything.kept_float}


@needs_rtx
def test_the_graph_is_the_records_once_quantizers_are_joined() -> None:
    path = bundle(Precision.INT8).path
    model = ir.from_proto(onnx.load(path / GRAPH))
    plan = read_plan(path / "quantization.json")
    assert any("no pair before its input" in finding for finding in audit(model, plan))
    assert join_quantizers(model)
    assert audit(model, plan) == ()


@needs_rtx
def test_validation_and_bisection_know_the_form() -> None:
    path = bundle(Precision.INT8).path
    with registered():
        result = CliRunner().invoke(validate, [str(path / GRAPH), "--bisect", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bisect"]["suspects"] == []

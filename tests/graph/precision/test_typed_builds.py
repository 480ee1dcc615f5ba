"""Typed graphs become plans, by the real compiler (TensorRT for RTX, no GPU needed)."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from spach_deploy.engine.build import EngineResult, build_engine
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.engine.network_facts import check_achieved_precision
from spach_deploy.options.specs import BatchProfile, EngineTarget, Flavour, Precision
from spach_deploy.runtime.devices import is_installed
from tests.graph.precision.graphs import batches, target_graph
from tests.protos import TypedGraph, measure_ranges, type_graph

pytestmark = pytest.mark.skipif(not is_installed(Flavour.TENSORRT_RTX), reason="tensorrt-rtx is not installed")


def typed(precision: Precision, scale: float = 1.0) -> TypedGraph:
    model = target_graph("hybrid", scale)
    return type_graph(model, precision, measure_ranges(model, batches(4), threads=1))


def build(path: Path, graph: TypedGraph) -> EngineResult:
    onnx.save(graph.model, path)
    target = EngineTarget(batch=BatchProfile(1, 2, 4))
    return build_engine(path, target, TensorRTForRTX(), precision=graph.policy.precision)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_a_typed_graph_builds_in_its_precision(tmp_path: Path, precision: Precision) -> None:
    graph = typed(precision)
    achieved = check_achieved_precision(build(tmp_path / "model.onnx", graph).network, precision)
    assert set(achieved.layers_by_dtype) == {precision.value}


def test_a_graph_with_islands_builds_with_exactly_those_islands(tmp_path: Path) -> None:
    graph = typed(Precision.FP16, 1e6)
    kept = [kept.node for kept in graph.policy.kept]
    network = build(tmp_path / "model.onnx", graph).network
    achieved = check_achieved_precision(network, Precision.FP16, kept_float=kept)
    assert set(achieved.layers_by_dtype) == {"fp16", "fp32"}
    weighted = {k.node for k in graph.policy.kept if k.reason in ("range", "weight")} & set(achieved.kept)
    assert weighted == set(achieved.kept)

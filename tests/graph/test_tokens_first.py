"""Attention with tokens before images computes the same, and the compiler needs no moves for it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from spach_deploy.blocks import rewrite
from spach_deploy.bundle.outputs import INPUT, LOGITS
from spach_deploy.engine.build import build_engine
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.engine.plan_facts import PlanFacts, read_plan_facts
from spach_deploy.graph.editing import as_proto, mark_quantized, new_node, operand
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import TENSORRT_PASSES, apply_passes
from spach_deploy.graph.passes.tokens_first import PARTS, part_weights, tokens_first
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.spach import Spach
from spach_deploy.options.specs import BatchProfile, EngineTarget, Flavour, Precision
from spach_deploy.runtime.devices import is_installed
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from tests.protos import type_graph
from tests.static_models import IMAGE_SIZE, architecture, images, logits, relative_l2, small_model


def graph(kind: str, *without: str) -> ir.Model:
    return export_canonical(rewrite(small_model(kind), without).model, IMAGE_SIZE)


def check(model: ir.Model, kind: str) -> None:
    """It computes what PyTorch computes, at several batch sizes: 7 is no divisor of anything."""
    proto = as_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    with OnnxRuntimeRunner(proto.SerializeToString(), threads=1) as runner:
        for batch in (1, 2, 7):
            x = images(batch, seed=batch)
            assert relative_l2(runner.run({INPUT: x})[LOGITS], logits(small_model(kind), x)) < 2e-6


def products(model: ir.Model) -> Counter[str]:
    """What stands behind the qkv of all attentions: a Gemm for each part, or one."""
    names = [node.name or "" for node in model.graph if node.op_type == "Gemm"]
    return Counter(name.rpartition("/")[2] for name in names if ".spatial_func.qkv/" in name)


@pytest.mark.parametrize(("kind", "attentions"), [("trans", 3), ("hybrid", 5), ("hybrid_stem", 2)])
def test_query_key_and_value_are_products_of_their_own(kind: str, attentions: int) -> None:
    model = graph(kind)
    assert len(tokens_first(model)) == attentions
    assert products(model) == dict.fromkeys(PARTS, attentions)
    assert sum(name.endswith(".qkv.weight") for name in model.graph.initializers) == attentions
    check(model, kind)


@pytest.mark.parametrize(("kind", "attentions"), [("trans", 3), ("hybrid", 5)])
def test_a_written_graph_splits_no_weight(kind: str, attentions: int) -> None:
    model = graph(kind)
    tokens_first(model)
    assert len(part_weights(model)) == attentions
    assert not any(node.op_type == "Split" and operand(node, 0).is_initializer() for node in model.graph)
    own = [name for name in model.graph.initializers if ".qkv.weight" in name]
    assert Counter(name.rpartition("/")[2] for name in own) == dict.fromkeys(PARTS, attentions)
    check(model, kind)


@pytest.mark.parametrize("without", ["absorb_qkv_bias", "fold_attention_scale", "grid_stream", "shift_depthwise"])
def test_other_forms_may_be_left_out(without: str) -> None:
    model = graph("hybrid", without)
    changed = apply_passes(model, TENSORRT_PASSES, [without])
    assert len(changed["tokens_first"]) == 5
    assert products(model) == ({"Gemm": 5} if without == "absorb_qkv_bias" else dict.fromkeys(PARTS, 5))
    check(model, "hybrid")


def test_a_quantized_layer_stays_one() -> None:
    model = graph("trans")
    for node in model.graph:
        if node.name == "blocks.1.spatial_func.qkv/Gemm":
            mark_quantized(node)
    assert len(tokens_first(model)) == 3
    assert products(model) == {"Gemm": 1, **dict.fromkeys(PARTS, 2)}
    check(model, "trans")


def test_what_is_written_otherwise_is_left_alone() -> None:
    model = graph("trans")
    softmax = [node for node in model.graph if node.op_type == "Softmax"][1]
    model.graph.append(new_node("Identity", softmax.outputs, "blocks.1/seen"))
    assert len(tokens_first(model)) == 2


def facts(model: ir.Model, tmp_path: Path) -> PlanFacts:
    path = tmp_path / "model.onnx"
    onnx.save(type_graph(as_proto(model), Precision.FP16).model, path)
    target = EngineTarget(batch=BatchProfile(1, 8, 8))
    found = read_plan_facts(build_engine(path, target, TensorRTForRTX(), precision=Precision.FP16).plan)
    assert found is not None
    return found


@pytest.mark.skipif(not is_installed(Flavour.TENSORRT_RTX), reason="tensorrt-rtx is not installed")
def test_the_compiler_moves_nothing_between_products_and_attention(tmp_path: Path) -> None:
    model = Spach(architecture(128, 8, 2, "3 trans", heads=4, image_size=(64, 64))).eval()
    load_demo_weights(model)
    found = {}
    for without in ((), ("tokens_first",)):
        form = export_canonical(rewrite(model, without).model, 64)
        apply_passes(form, TENSORRT_PASSES, without)
        found[without] = facts(form, tmp_path)
    ours, theirs = found.values()
    assert ours.fused_attentions == theirs.fused_attentions == 3
    assert theirs.kernels_by_kind["move"] - ours.kernels_by_kind.get("move", 0) == 3
    assert len(ours.kernels) < len(theirs.kernels)
    moved, others = ours.bytes_moved(8), theirs.bytes_moved(8)
    assert moved is not None
    assert others is not None
    assert moved < 0.95 * others

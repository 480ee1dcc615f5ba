from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from spach_deploy.blocks import REWRITES, rewrite
from spach_deploy.blocks.attention import StaticAttention
from spach_deploy.blocks.base import prove
from spach_deploy.blocks.token_mlp import StaticSpatialMLP
from spach_deploy.common.errors import RewriteError
from spach_deploy.engine.build import build_engine
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.engine.plan_facts import read_plan_facts
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import TENSORRT_PASSES, apply_passes
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.spach import Spach
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import EngineTarget, Precision
from tests.protos import type_graph
from tests.static_models import ARCHITECTURES, IMAGE_SIZE, architecture, images, logits, relative_l2, small_model

NAMES = [step.name for step in REWRITES]


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_static_model_equals_the_reference_in_fp32(kind: str, batch: int) -> None:
    static = rewrite(small_model(kind)).model
    x = images(batch)
    assert relative_l2(logits(static, x), logits(small_model(kind), x)) < 2e-6


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("only", NAMES)
def test_each_rewrite_alone_is_exact_algebra(kind: str, only: str) -> None:
    disabled = [name for name in NAMES if name != only]
    result = rewrite(small_model(kind), disabled)
    assert result.outcomes[only].worst <= 1e-12
    x = images(3)
    # Folded weights are rounded to FP32 once, so the whole is held to FP32 rounding.
    assert relative_l2(logits(result.model, x), logits(small_model(kind), x)) < 2e-6


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_reference_is_left_as_it_was(kind: str) -> None:
    model = copy.deepcopy(small_model(kind))
    before = copy.deepcopy(model.state_dict())
    rewrite(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_no_rewrite_touches_are_not_copied() -> None:
    model = small_model("hybrid")
    static = rewrite(model).model
    ours, theirs = dict(static.named_parameters()), dict(model.named_parameters())
    name = "layer1.0.channel_func.fc1.weight"
    assert ours[name].data_ptr() == theirs[name].data_ptr()


def test_state_dict_keys_stay_the_published_ones() -> None:
    published = set(small_model("hybrid").state_dict())
    assert set(rewrite(small_model("hybrid")).model.state_dict()) <= published  # LayerScale is folded away


def test_a_shared_spatial_function_stays_shared() -> None:
    static = rewrite(small_model("mlp_shared")).model
    functions = [module for module in static.modules() if isinstance(module, StaticSpatialMLP)]
    assert len(functions) == 3
    assert len({function.fc1.weight.data_ptr() for function in functions}) == 1


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("trans", "fold_batchnorm", "without BatchNorm"),
        ("conv", "fold_attention_scale", "no attention"),
        ("mlp", "fold_layer_scale", "mixes tokens"),
        ("conv", "fold_qkv_bias", "no attention"),
    ],
)
def test_a_rewrite_that_does_not_apply_says_why(kind: str, name: str, reason: str) -> None:
    outcome = rewrite(small_model(kind)).outcomes[name]
    assert not outcome.changes
    assert reason in outcome.skipped[0]


@pytest.mark.parametrize(("size", "padded"), [(4, 16), (8, 16), (12, 16), (16, 16), (20, 24), (32, 32)])
def test_heads_are_padded_to_sizes_that_fuse(size: int, padded: int) -> None:
    model = Spach(architecture(2 * size, 8, 2, "1 trans", heads=2)).eval()
    load_demo_weights(model)
    result = rewrite(model)
    (attention,) = (module for module in result.model.modules() if isinstance(module, StaticAttention))
    assert attention.head_size == padded
    assert (attention.qkv.out_features, attention.proj.in_features) == (6 * padded, 2 * padded)
    assert len(result.outcomes["pad_heads"].changes) == (padded > size)
    assert relative_l2(logits(result.model, images(2)), logits(model, images(2))) < 2e-6
    for_a_cpu = rewrite(model, ["tokens_first"]).model  # as where no TensorRT runs it
    assert for_a_cpu.get_submodule("blocks.0.spatial_func.qkv").out_features == 6 * size
    in_eight_bits = rewrite(model, quantized=()).model  # a calibration fits every target
    assert in_eight_bits.get_submodule("blocks.0.spatial_func.qkv").out_features == 6 * size


def test_an_attention_of_small_heads_is_fused(tmp_path: Path) -> None:
    """The plain model's is not."""
    pytest.importorskip("tensorrt_rtx")
    fused, target = {}, EngineTarget(gpus=parse_gpus("sm89"))
    for padded, disabled in ((True, []), (False, ["pad_heads"])):
        graph = export_canonical(rewrite(small_model("trans"), disabled).model, IMAGE_SIZE)
        apply_passes(graph, TENSORRT_PASSES)
        onnx.save(type_graph(as_proto(graph), Precision.FP16).model, tmp_path / "model.onnx")
        plan = build_engine(tmp_path / "model.onnx", target, TensorRTForRTX(), precision=Precision.FP16).plan
        facts = read_plan_facts(plan)
        assert facts is not None
        fused[padded] = facts.fused_attentions
    assert fused == {True: 3, False: 0}


def test_a_disabled_rewrite_is_not_applied() -> None:
    result = rewrite(small_model("trans"), ["fold_attention_scale"])
    scales = {m.scale for m in result.model.modules() if isinstance(m, StaticAttention)}
    assert scales == {8**-0.5}
    (reason,) = result.outcomes["fold_attention_scale"].skipped
    assert reason.startswith("turned off: by --no-rewrite")


def test_a_rewrite_that_changes_the_function_is_refused() -> None:
    old, new = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
    new.load_state_dict(old.state_dict())
    new.weight.data[3, 4] += 1e-6
    with pytest.raises(RewriteError, match=r"Rewrite halving changes what layer1\.0 computes"):
        prove("halving", "layer1.0", old, new, torch.randn(4, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "disabled", "is_grid"),
    [
        ("hybrid", (), False),
        ("conv", (), False),
        ("mlp", (), True),
        ("ms_mlp", (), True),
        ("trans", ("shift_depthwise",), True),
        ("mlp", ("grid_stream",), False),
    ],
)
def test_tokens_are_a_grid_where_it_saves_kernels(kind: str, disabled: tuple[str, ...], is_grid: bool) -> None:
    result = rewrite(small_model(kind), disabled)
    assert bool(result.model.grid_stream) is is_grid
    assert bool(result.outcomes["grid_stream"].skipped) is not is_grid

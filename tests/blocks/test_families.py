"""sMLPNet and ShiftViT: static forms, graphs for both runtimes, kernels, what is quantized, and a planted fault."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spach_deploy.blocks import STATIC, rewrite
from spach_deploy.blocks.replace import replace_known
from spach_deploy.blocks.shift import StaticShiftBlock
from spach_deploy.common.errors import CheckpointError
from spach_deploy.engine.build import build_engine
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.engine.plan_facts import read_plan_facts
from spach_deploy.graph.certificate import certify
from spach_deploy.graph.editing import as_proto, tensor_of
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import CPU_PASSES, TENSORRT_PASSES, Pass, apply_passes
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.matching import infer_model
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.models.registry import create_model
from spach_deploy.models.shiftvit import ShiftBlock
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import EngineTarget, Precision
from spach_deploy.quantization.formats import INT8
from spach_deploy.quantization.sites import UNCERTAIN, LayerKind, Selection, find_sites
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from spach_deploy.validation.bisect import ProbedReference
from tests.protos import bisect_graph, in_place, type_graph
from tests.shared import once
from tests.static_models import relative_l2
from tests.validation import faults

SIZE = (64, 96)
FAMILIES = {
    "smlpnet": Architecture(
        family="smlpnet",
        patch_size=4,
        width=16,
        stages=((("smlp", 1),), (("smlp", 2),)),
        channel_ratio=3,
        norm_eps=1e-5,
        image_size=SIZE,
        classes=5,
    ),
    "shiftvit": Architecture(
        family="shiftvit",
        patch_size=4,
        width=32,
        stages=((("shift", 1),), (("shift", 2),)),
        channel_ratio=2,
        norm_eps=1e-5,
        divisions=8,
        image_size=SIZE,
        classes=5,
    ),
}

each = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def model_of(family: str) -> SelectableOutputs:
    """With demo weights; do not change it, tests share it."""
    model = create_model(FAMILIES[family])
    load_demo_weights(model)
    return model


def canonical(family: str) -> ir.Model:
    def make(target: Path) -> None:
        graph = export_canonical(rewrite(model_of(family)).model, SIZE)
        target.write_bytes(as_proto(graph).SerializeToString())

    return ir.from_proto(onnx.load(once(f"canonical/{family}.onnx", make)))


def images(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 3, *SIZE)).astype(np.float32)


def logits(model: nn.Module, batch: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        result: NDArray[np.float32] = model(torch.from_numpy(batch)).numpy()
    return result


def run(graph: ir.Model, batch: NDArray[np.float32]) -> NDArray[np.float32]:
    with OnnxRuntimeRunner(as_proto(graph).SerializeToString(), threads=1) as runner:
        result: NDArray[np.float32] = runner.run({"input": batch})["logits"]
    return result


@each
@pytest.mark.parametrize("depths", [(1, 1), (1,), (2, 1)])
def test_a_stage_of_one_block_is_exported(family: str, depths: tuple[int, ...]) -> None:
    mixer = FAMILIES[family].stages[0][0][0]
    model = create_model(FAMILIES[family].replace(stages=tuple(((mixer, depth),) for depth in depths)))
    load_demo_weights(model)
    result = rewrite(model)
    assert len(result.known) >= sum(depths)
    assert relative_l2(run(export_canonical(result.model, SIZE), images(2)), logits(model, images(2))) < 2e-6


@each
def test_blocks_have_static_forms_that_are_proven_in_fp64(family: str) -> None:
    result = rewrite(model_of(family))
    assert result.outcomes[STATIC].changes
    assert max(outcome.worst for outcome in result.outcomes.values()) < 1e-12
    assert relative_l2(logits(result.model, images(2)), logits(model_of(family), images(2))) < 2e-6


@each
@pytest.mark.parametrize("passes", [TENSORRT_PASSES, CPU_PASSES], ids=["tensorrt", "cpu"])
def test_both_forms_compute_what_pytorch_computes_and_are_certified(family: str, passes: tuple[Pass, ...]) -> None:
    graph, model = canonical(family), model_of(family)
    apply_passes(graph, passes)
    certify(graph, [name for name, _ in model.named_modules(remove_duplicate=False)])
    for batch in (1, 3):
        assert relative_l2(run(graph, images(batch)), logits(model, images(batch))) < 2e-6


def test_axis_products_need_neither_transposes_nor_a_concatenation() -> None:
    graph = canonical("smlpnet")
    changed = apply_passes(graph, TENSORRT_PASSES)
    assert [len(changed[name]) for name in ("shift_depthwise", "axis_products", "channels_last")] == [3, 3, 6]
    operators = Counter(node.op_type for node in graph.graph)
    assert not operators["Concat"] + operators["BatchNormalization"]
    assert operators["MatMul"] == 2 + 1 + 1  # the first grid is large: one product along each axis


def test_shifts_are_slices_and_statistics_take_two_levels() -> None:
    graph = canonical("shiftvit")
    assert len(apply_passes(graph, TENSORRT_PASSES)["split_group_norm"]) == 6
    operators = Counter(node.op_type for node in graph.graph)
    assert not operators["InstanceNormalization"] + operators["ScatterND"]
    assert operators["Pad"] == 3 * 4


@pytest.mark.parametrize(("family", "kernels"), [("smlpnet", 27), ("shiftvit", 29)])
def test_kernels(family: str, kernels: int, tmp_path: Path) -> None:
    """Blocks of an sMLPNet take 6 or 7 kernels, those of a ShiftViT 5."""
    pytest.importorskip("tensorrt_rtx")
    graph = canonical(family)
    apply_passes(graph, TENSORRT_PASSES)
    onnx.save(type_graph(as_proto(graph), Precision.FP16).model, tmp_path / "model.onnx")
    target = EngineTarget(gpus=parse_gpus("sm89"))
    plan = build_engine(tmp_path / "model.onnx", target, TensorRTForRTX(), precision=Precision.FP16).plan
    facts = read_plan_facts(plan)
    assert facts is not None
    assert len(facts.kernels) == kernels


class OwnBlock(nn.Module):
    """As other people write it: without a module for the shift, and with another MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.normalize = nn.GroupNorm(1, dim)
        self.channels = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.SiLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, down, rest = x[:, :2], x[:, 2:5], x[:, 5:]
        left = nn.functional.pad(left[..., 1:], (0, 1))
        down = nn.functional.pad(down[:, :, :-1], (0, 0, 1, 0))
        x = torch.cat([left, down, rest], dim=1)
        y: Tensor = x + self.channels(self.normalize(x))
        return y


def test_a_shift_block_is_known_by_what_it_does() -> None:
    model = nn.Sequential(OwnBlock(8), nn.Conv2d(8, 4, 1)).eval()
    static, outcome = replace_known(model, [torch.zeros(1, 8, 5, 6)])
    assert [change.module for change in outcome.changes] == ["0"]
    block = static.get_submodule("0")
    assert isinstance(block, StaticShiftBlock)
    assert block.shift.moves == ((2, 0, 1), (3, -1, 0), (3, 0, 0))


def test_a_block_that_moves_nothing_is_no_shift_block() -> None:
    block = ShiftBlock(FAMILIES["shiftvit"], 32)
    block.shift = nn.Identity()  # type: ignore[assignment]
    static, outcome = replace_known(nn.Sequential(block).eval(), [torch.zeros(1, 32, 5, 6)])
    assert not any(isinstance(module, StaticShiftBlock) for module in static.modules())
    assert [change.module for change in outcome.changes] == []


# Quantization


@each
def test_layers_along_channels_and_along_axes_take_eight_bits(family: str) -> None:
    sites = find_sites(canonical(family))
    reasons = Selection().chosen(sites, INT8)
    kept = {site.kind for site in sites if reasons[site.node]}
    assert kept - {LayerKind.LINEAR} == {LayerKind.CONVOLUTION} | (
        {LayerKind.DEPTHWISE} if family == "smlpnet" else set()
    )
    linear = [site.module for site in sites if site.kind is LayerKind.LINEAR and reasons[site.node]]
    assert linear == ["mlp_head.0" if family == "smlpnet" else "head"]
    along = [site.module for site in sites if site.kind is LayerKind.TOKEN_LINEAR]
    assert along == [f"token_mix.{i}.1.{name}" for i in range(3) for name in ("proj_h", "proh_w")] * (
        family == "smlpnet"
    )


def test_a_weight_whose_axis_is_not_certain_stays_in_float_and_that_is_said() -> None:
    graph = canonical("smlpnet")
    for node in graph.graph:
        if node.op_type == "Gemm" and "fuse" in (node.name or ""):
            node.attributes["transB"] = ir.AttrInt64("transB", 0)
            weight = node.inputs[1]
            assert weight is not None
            weight.const_value = ir.Tensor(np.ascontiguousarray(tensor_of(weight).numpy().T), name=weight.name)
            weight.shape = ir.Shape(weight.const_value.shape)
    sites = find_sites(graph)
    for selection in (Selection(), Selection(quantize=("*.fuse",))):
        reasons = selection.chosen(sites, INT8)
        assert {reasons[site.node] for site in sites if site.module.endswith("fuse")} == {UNCERTAIN}


# Bisection


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("smlpnet", "token_mix.1.1.fuse"),
        ("smlpnet", "token_mix.1.1.proj_h"),
        ("smlpnet", "token_mix.1.1.proh_w"),
        ("smlpnet", "channel_mix.0.2.net.3"),
        ("shiftvit", "layers.1.blocks.0.mlp.fc1"),
    ],
)
def test_bisection_names_the_module_of_a_wrong_weight(family: str, module: str) -> None:
    reference = ProbedReference.of(model_of(family), images(2))
    graph = as_proto(canonical(family))
    assert bisect_graph(graph, reference).passed
    faults.perturb(graph, f"{module}.weight")
    (suspect,) = bisect_graph(graph, reference).suspects
    assert (suspect.module, suspect.kind) == (module, "wrong weight")


@pytest.mark.parametrize("layer", ["proj_h", "proh_w", "fuse"])
def test_bisection_tells_layers_apart_that_are_one_product(layer: str) -> None:
    reference = ProbedReference.of(model_of("smlpnet"), images(2))
    graph = as_proto(canonical("smlpnet"))
    faults.perturb(graph, f"token_mix.1.1.{layer}.weight")
    in_place(apply_passes, graph, TENSORRT_PASSES)
    assert not [tensor for tensor in graph.graph.initializer if tensor.name.endswith("proj_h.weight")]
    (suspect,) = bisect_graph(graph, reference).suspects
    assert suspect.module == f"token_mix.1.1.{layer}"


# Checkpoints


@pytest.mark.parametrize("name", ["smlpnet_tiny", "shiftvit_r2_small", "shiftvit_light_base"])
def test_the_published_model_is_read_from_tensors(name: str) -> None:
    with torch.device("meta"):
        state = create_model(name).state_dict()
    match, _ = infer_model(state, {}, None)
    assert (match.name, match.architecture) == (name, ARCHITECTURES[name])


@each
def test_an_architecture_outside_the_table_is_read_from_tensors(family: str) -> None:
    asked = SIZE if family == "shiftvit" else None  # layers along axes fix the grid
    match, _ = infer_model(model_of(family).state_dict(), {}, asked)
    assert match.architecture == FAMILIES[family].replace(divisions=match.architecture.divisions)


def test_a_size_that_layers_along_axes_do_not_allow_is_refused() -> None:
    with pytest.raises(CheckpointError, match="64x96 pixels, as its layers along rows and columns fix the grid"):
        infer_model(model_of("smlpnet").state_dict(), {}, (64, 64))

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spach_deploy.blocks import REWRITES, rewrite
from spach_deploy.bundle.outputs import INPUT, LOGITS
from spach_deploy.common.errors import CertificateError
from spach_deploy.graph import export
from spach_deploy.graph.certificate import certify
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical, simplify
from spach_deploy.graph.interface import add_interface
from spach_deploy.graph.passes import CPU_PASSES, TENSORRT_PASSES, apply_passes
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.spach import Spach
from spach_deploy.options.specs import IODtype, OutputSpec, Preprocessing
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from tests.outputs import classifier
from tests.static_models import (
    ARCHITECTURES,
    CLASSES,
    IMAGE_SIZE,
    architecture,
    canonical_bytes,
    images,
    logits,
    plain_export,
    relative_l2,
    small_model,
)


def canonical(kind: str) -> ir.Model:
    return ir.from_proto(onnx.load_model_from_string(canonical_bytes(kind)))


def run(model: ir.Model, batch: np.ndarray) -> dict[str, np.ndarray]:
    with OnnxRuntimeRunner(as_proto(model).SerializeToString(), threads=1) as runner:
        return runner.run({INPUT: batch})


def convolutions(model: ir.Model) -> list[str | None]:
    return [node.name for node in model.graph if node.op_type == "Conv" and ".cpe_net." in (node.name or "")]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_stamped_graph_computes_what_pytorch_computes(kind: str) -> None:
    model = canonical(kind)
    for batch in (1, 3):
        x = images(batch, seed=batch)
        assert relative_l2(run(model, x)[LOGITS], logits(small_model(kind), x)) < 2e-6


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_target_passes_change_nothing_but_the_form(kind: str) -> None:
    before, after = canonical(kind), canonical(kind)
    changed = apply_passes(after, TENSORRT_PASSES)
    blocks = sum(len(stage) for stage in ARCHITECTURES[kind].mixers)
    assert len(changed["shift_depthwise"]) == (blocks if ARCHITECTURES[kind].position_encoding else 0)
    assert len(changed["split_group_norm"]) == len(ARCHITECTURES[kind].stages) - 1
    assert not convolutions(after)
    x = images(2)
    assert relative_l2(run(after, x)[LOGITS], run(before, x)[LOGITS]) < 2e-6


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_both_forms_are_certified(kind: str) -> None:
    modules = [name for name, _ in small_model(kind).named_modules(remove_duplicate=False)]
    model = canonical(kind)
    assert certify(model, modules).symbolic == "batch"
    apply_passes(model, TENSORRT_PASSES)
    outputs = classifier(CLASSES, OutputSpec(IODtype.UINT8, top_k=3, softmax=True))
    add_interface(model, outputs, IODtype.UINT8, Preprocessing.for_size(IMAGE_SIZE))
    assert certify(model, modules).opset >= 20


def test_a_pass_that_is_turned_off_leaves_the_convolution() -> None:
    model = canonical("hybrid")
    changed = apply_passes(model, TENSORRT_PASSES, disabled=["shift_depthwise"])
    assert "shift_depthwise" not in changed
    assert convolutions(model)


LAYOUT = ("fold_residual", "grid_stream", "shift_depthwise")
"""What changes where blocks begin and end; the others change what is inside."""

LEFT_OUT = [
    pytest.param((step,), id=step, marks=() if step in LAYOUT else pytest.mark.slow)
    for step in [*(step.name for step in REWRITES), *(step.name for step in TENSORRT_PASSES)]
]


@pytest.mark.parametrize("left_out", [*LEFT_OUT, pytest.param(("fold_residual", "grid_stream"), id="both")])
def test_any_form_can_be_left_out_where_blocks_of_one_kind_follow_a_downsampling(left_out: tuple[str, ...]) -> None:
    model = Spach(architecture(16, 4, 2, "1 conv | 2 conv | 2 trans", heads=2)).eval()
    load_demo_weights(model)
    graph = export_canonical(rewrite(model, left_out).model, IMAGE_SIZE)
    apply_passes(graph, TENSORRT_PASSES, left_out)
    onnx.checker.check_model(as_proto(graph), full_check=True)
    x = images(2)
    assert relative_l2(run(graph, x)[LOGITS], logits(model, x)) < 2e-6


def test_a_batchnorm_that_the_simplifier_folds_stays_folded() -> None:
    left_out = ("fold_batchnorm",)
    graph = export_canonical(rewrite(small_model("hybrid_stem"), left_out).model, IMAGE_SIZE)
    x = images(2)
    assert relative_l2(run(graph, x)[LOGITS], logits(small_model("hybrid_stem"), x)) < 2e-6


def test_stamping_gives_the_graph_that_a_whole_export_gives() -> None:
    static = rewrite(small_model("hybrid")).model
    whole = ir.from_proto(simplify(plain_export(static, IMAGE_SIZE)))
    x = images(2)
    assert relative_l2(run(canonical("hybrid"), x)[LOGITS], run(whole, x)[LOGITS]) < 2e-6


def test_node_names_are_module_paths() -> None:
    names = {node.name for node in canonical("hybrid").graph}
    assert {"layer2.2.spatial_func.qkv/Gemm", "layer3.3.channel_func.fc1/Gemm", "stem.proj/Conv", "head/Gemm"} <= names


def test_pixels_in_give_the_logits_of_normalized_images() -> None:
    preprocessing = Preprocessing.for_size(IMAGE_SIZE)
    pixels = np.random.default_rng(0).integers(0, 256, (2, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    model, plain = canonical("conv"), canonical("conv")
    add_interface(
        model, classifier(CLASSES, OutputSpec(IODtype.UINT8, top_k=3, softmax=True)), IODtype.UINT8, preprocessing
    )
    outputs = run(model, pixels)
    normalized = ((pixels / 255.0 - preprocessing.mean) / preprocessing.std).astype(np.float32).transpose(0, 3, 1, 2)
    expected = run(plain, np.ascontiguousarray(normalized))[LOGITS]
    assert relative_l2(outputs[LOGITS], expected) < 2e-6
    assert np.allclose(outputs["probabilities"].sum(axis=1), 1.0)
    assert np.array_equal(outputs["top_indices"], np.argsort(-expected, axis=1)[:, :3])
    assert np.array_equal(outputs["top_values"], np.take_along_axis(outputs[LOGITS], outputs["top_indices"], axis=1))


def test_special_weights_do_not_change_the_graph() -> None:
    fresh = Spach(ARCHITECTURES["hybrid"]).eval()  # zeros, ones, equal tensors
    torch.nn.init.normal_(fresh.head.weight, generator=torch.Generator().manual_seed(0))
    model = export_canonical(rewrite(fresh).model, IMAGE_SIZE)
    before = len(model.graph)
    assert apply_passes(model, TENSORRT_PASSES)["split_group_norm"] == ("layer2.0.net.1.1", "layer3.0.net.1.1")
    x = images(2)
    assert relative_l2(run(model, x)[LOGITS], logits(fresh, x)) < 2e-6
    assert abs(before - len(canonical("hybrid").graph)) <= 4  # Mul and Add of the two GroupNorms


@pytest.mark.parametrize("kind", ["ms_mlp", "hybrid"])
def test_moves_that_a_simplifier_left_without_effect_are_taken_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxsim before 0.8 joins two moves that cancel each other to one that moves nothing, where a stage begins."""

    def simplified(model: ModelProto) -> ModelProto:
        result = simplify(model)
        for index, node in reversed(list(enumerate(result.graph.node))):
            if node.name.endswith(".cpe_net.net.1/Conv"):
                name = node.name.replace(".net.1/Conv", "/idle")
                idle = helper.make_node("Transpose", [node.input[0]], [name], name=name, perm=[0, 1, 2, 3])
                node.input[0] = name
                result.graph.node.insert(index, idle)
        return result

    plain = canonical(kind)
    monkeypatch.setattr(export, "simplify", simplified)
    model = export_canonical(rewrite(small_model(kind)).model, IMAGE_SIZE)
    assert [node.name for node in model.graph] == [node.name for node in plain.graph]
    x = images(2)
    assert relative_l2(run(model, x)[LOGITS], logits(small_model(kind), x)) < 2e-6


def group_norm(size: int, channels: int) -> ir.Model:
    """GroupNorm of one group as the exporter writes it, (B, C, S, S) -> (B, S, S, C)."""
    shape = (channels, size, size)
    nodes = [
        helper.make_node("Reshape", [INPUT, "flat"], ["norm/flat"], name="norm/Reshape"),
        helper.make_node("InstanceNormalization", ["norm/flat", "one", "zero"], ["norm/normal"], name="norm/Norm"),
        helper.make_node("Reshape", ["norm/normal", "map"], ["norm/map"], name="norm/Reshape_2"),
        helper.make_node("Transpose", ["norm/map"], ["out"], name="norm/Transpose", perm=[0, 2, 3, 1]),
    ]
    constants = {
        "flat": [0, 1, -1],
        "map": [-1, *shape],
        "one": np.ones(1, np.float32),
        "zero": np.zeros(1, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "norm",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", size, size, channels])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def test_on_a_cpu_group_norm_keeps_its_digits_on_large_images() -> None:
    """ONNX Runtime's own statistics of so many numbers are off by more than FP32's noise."""
    x = np.random.default_rng(0).standard_normal((1, 32, 192, 192)).astype(np.float32) + np.float32(0.5)
    exact = ((x - x.mean(dtype=np.float64)) / np.sqrt(x.var(dtype=np.float64) + 1e-5)).transpose(0, 2, 3, 1)
    plain, form = group_norm(192, 32), group_norm(192, 32)
    assert apply_passes(form, CPU_PASSES)["split_group_norm"] == ("norm",)
    assert relative_l2(run(form, x)["out"], exact) < 5e-7 < relative_l2(run(plain, x)["out"], exact)


def test_a_pass_that_fails_is_named_with_the_next_step() -> None:
    model = canonical("hybrid")
    for node in model.graph:
        if node.op_type == "InstanceNormalization":
            node.replace_input_with(0, model.graph.inputs[0])
    with pytest.raises(CertificateError, match=r"The pass split_group_norm .* --no-rewrite split_group_norm") as caught:
        apply_passes(model, TENSORRT_PASSES)
    assert caught.value.__cause__ is not None


def test_a_pass_says_whether_it_changed_the_model() -> None:
    passes, model = {step.name: step for step in TENSORRT_PASSES}, canonical("hybrid")
    first = passes["shift_depthwise"](model)
    assert first.model is model
    assert first.modified
    assert not passes["shift_depthwise"](first).modified

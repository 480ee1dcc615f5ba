"""Bisection: every place found in every form of a graph, and every kind of fault named with its module."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

from spach_deploy.blocks import rewrite
from spach_deploy.common.errors import UsageError
from spach_deploy.graph.editing import as_proto, owner
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import TENSORRT_PASSES, apply_passes
from spach_deploy.graph.precision.decision import TypingOptions
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.spach import Spach
from spach_deploy.options.specs import Precision
from spach_deploy.validation.bisect import Bisection, ProbedReference
from spach_deploy.validation.bisect.export_steps import first_wrong_part
from tests import static_models
from tests.protos import bisect_graph, in_place, locate, measure_ranges, type_graph
from tests.static_models import ARCHITECTURES, IMAGE_SIZE, canonical_bytes, plain_export, small_model
from tests.validation import faults

FORMS = ("canonical", "target", "fp16", "bf16", "plain")


@functools.cache
def reference(kind: str) -> ProbedReference:
    return ProbedReference.of(small_model(kind), static_models.images(2))


@functools.cache
def graph_bytes(kind: str, form: str) -> bytes:
    if form == "plain":
        return bytes(plain_export(small_model(kind), IMAGE_SIZE).SerializeToString())
    graph = onnx.load_from_string(canonical_bytes(kind))
    if form != "canonical":
        in_place(apply_passes, graph, TENSORRT_PASSES)
    if form in ("fp16", "bf16"):
        ranges = measure_ranges(graph, [{"input": static_models.images(2)}])
        graph = type_graph(graph, Precision(form), ranges, TypingOptions()).model
    return bytes(graph.SerializeToString())


def graph(kind: str, form: str = "canonical") -> ModelProto:
    return onnx.load_from_string(graph_bytes(kind, form))


def bisect(model: ModelProto, kind: str) -> Bisection:
    return bisect_graph(model, reference(kind))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["hybrid_stem", "mlp_shared"])
def test_a_right_graph_is_right_in_every_module(kind: str, form: str) -> None:
    result = bisect(graph(kind, form), kind)
    assert result.passed, result.suspects
    weighted = {
        name for name, module in small_model(kind).named_modules() if getattr(module, "weight", None) is not None
    }
    folded = {place.module for place in result.unmapped}
    assert weighted - {owner(module.module) for module in result.modules} <= folded
    assert len(result.modules) > 10 * len(folded) or form != "plain"


@pytest.mark.parametrize("kind", ["bare", "mixed"])
def test_blocks_of_any_parts_have_probe_points(kind: str) -> None:
    result = bisect(graph(kind, "fp16"), kind)
    assert result.passed, result.suspects
    blocks = {owner(module.module).rpartition(".spatial_func")[0] for module in result.modules} - {""}
    assert blocks == {
        name for name, module in small_model(kind).named_modules() if getattr(module, "has_spatial", False)
    }


def halved(name: str) -> Callable[[ModelProto], None]:
    return lambda model: faults.set_value(model, name, faults.value(model, name) * 0)


FC1, GELU, NORM = "layer2.2.channel_func.fc1", "layer2.1.channel_func.act", "layer2.3.norm2"

FAULTS: dict[str, tuple[str, str, Callable[[ModelProto], None]]] = {
    "noise": (
        "layer2.2.channel_func.fc1",
        "wrong weight",
        lambda m: faults.perturb(m, "layer2.2.channel_func.fc1.weight"),
    ),
    "bias": ("layer3.1.channel_func.fc2", "missing bias", halved("layer3.1.channel_func.fc2.bias")),
    "heads": (
        "layer3.1.spatial_func",
        "order of heads",
        lambda m: faults.transpose_heads(m, "layer3.1.spatial_func/Transpose_3"),
    ),
    "gelu": (
        "layer2.1.channel_func.act",
        "wrong function",
        lambda m: faults.drop_gelu(m, "layer2.1.channel_func.act/Gelu"),
    ),
    "kernel": ("layer1.0.cpe_net.net.1", "wrong layout", lambda m: _turn_kernel(m, "layer1.0.cpe_net.net.1.weight")),
    "clip": ("layer3.2.channel_func.fc1", "overflow", lambda m: _clip(m, "layer3.2.channel_func.fc1/Gemm", 0.5)),
    "epsilon": (
        "layer2.3.norm2",
        "wrong epsilon",
        lambda m: _set_epsilon(m, "layer2.3.norm2/LayerNormalization", 1e-2),
    ),
    "int8": ("head", "precision", lambda m: _round_weight(m, "head.weight")),
}


def _turn_kernel(model: ModelProto, name: str) -> None:
    faults.set_value(model, name, faults.value(model, name)[..., ::-1, ::-1])


def _clip(model: ModelProto, name: str, limit: float) -> None:
    """Saturate what a node makes."""
    made = faults.node(model, name)
    output = made.output[0]
    made.output[0] = f"{output}/whole"
    for suffix, value in (("low", -limit), ("high", limit)):
        constant = onnx.numpy_helper.from_array(np.array(value, np.float32), f"clip/{suffix}")
        model.graph.initializer.append(constant)
    index = list(model.graph.node).index(made)
    clip = helper.make_node("Clip", [f"{output}/whole", "clip/low", "clip/high"], [output], name="clip")
    model.graph.node.insert(index + 1, clip)


def _set_epsilon(model: ModelProto, name: str, epsilon: float) -> None:
    next(a for a in faults.node(model, name).attribute if a.name == "epsilon").f = epsilon


def _round_weight(model: ModelProto, name: str) -> None:
    weight = faults.value(model, name).astype(np.float32)
    scale = np.abs(weight).max() / 127
    faults.set_value(model, name, np.round(weight / scale) * scale)


@pytest.mark.parametrize("name", FAULTS)
def test_the_module_and_the_kind_of_a_fault_are_named(name: str) -> None:
    module, kind, plant = FAULTS[name]
    model = graph("hybrid")
    plant(model)
    result = bisect(model, "hybrid")
    assert not result.passed
    assert [(suspect.module, suspect.kind) for suspect in result.suspects] == [(module, kind)]
    assert len(result.lines()) <= 5


@pytest.mark.parametrize("name", ["noise", "heads"])
def test_names_in_the_graph_are_not_needed(name: str) -> None:
    module, kind, plant = FAULTS[name]
    model = graph("hybrid")
    plant(model)
    _forget_names(model)
    (suspect,) = bisect(model, "hybrid").suspects
    assert (suspect.module, suspect.kind) == (module, kind)


def _forget_names(model: ModelProto) -> None:
    kept = {value.name for value in (*model.graph.input, *model.graph.output)}
    made = [name for node in model.graph.node for name in node.output]
    names = {name: f"n{index}" for index, name in enumerate(made) if name not in kept}
    for index, node in enumerate(model.graph.node):
        node.name = f"node{index}"
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


# Rectangles

DEPTHWISE = "blocks.0.cpe_net.net.1"
TURNED = {
    "swapped": "Its grid has height and width swapped.",
    "mirrored": "Its grid is mirrored.",
    "upside down": "Its grid is upside down.",
    "read as its transpose": "It reads its 12 by 16 grid as 16 by 12.",
}


@functools.cache
def rectangle() -> tuple[bytes, ProbedReference]:
    """A graph of 192 by 256 pixels, 12 by 16 tokens, and its reference."""
    model = Spach(static_models.architecture(16, 16, 2, "2 conv", image_size=(192, 256))).eval()
    load_demo_weights(model)
    graph = as_proto(export_canonical(rewrite(model).model, (192, 256)))
    images = np.random.default_rng(0).standard_normal((2, 3, 192, 256)).astype(np.float32)
    return graph.SerializeToString(), ProbedReference.of(model, images)


def _turn_grid(model: ModelProto, turn: str) -> None:
    """Let the depthwise convolution compute another grid from right numbers; all other tensors keep their shapes."""
    graph = model.graph
    index, conv = next((i, n) for i, n in enumerate(graph.node) if n.op_type == "Conv" and n.name.startswith(DEPTHWISE))
    given, kernel, made = conv.input[0], conv.input[1], conv.output[0]
    constants = {"grid": [-1, 16, 12, 16], "read": [-1, 16, 16, 12], "last": [-1], "first": [-(2**62)]}
    constants["axis"] = [2 if turn == "upside down" else 3]
    graph.initializer.extend(onnx.numpy_helper.from_array(np.array(value), name) for name, value in constants.items())
    weight = faults.value(model, kernel)
    if turn == "read as its transpose":
        before = helper.make_node("Reshape", [given, "read"], ["turned"])
    elif turn == "swapped":
        before = helper.make_node("Transpose", [given], ["turned"], perm=[0, 1, 3, 2])
        faults.set_value(model, kernel, weight.swapaxes(2, 3))
    else:
        before = helper.make_node("Slice", [given, "last", "first", "axis", "last"], ["turned"])
        faults.set_value(model, kernel, np.flip(weight, constants["axis"][0]))
    conv.input[0], conv.output[0] = "turned", "mixed"
    nodes = [*graph.node[:index], before, conv, helper.make_node("Reshape", ["mixed", "grid"], [made])]
    nodes += graph.node[index + 1 :]
    del graph.node[:]
    graph.node.extend(nodes)


@pytest.mark.parametrize("turn", TURNED)
def test_a_turned_grid_is_named_on_rectangles(turn: str) -> None:
    content, rectangles = rectangle()
    model = onnx.load_from_string(content)
    _turn_grid(model, turn)
    (suspect,) = bisect_graph(model, rectangles).suspects
    assert (suspect.module, suspect.kind, suspect.why) == (DEPTHWISE, "wrong layout", TURNED[turn])


def test_two_faults_are_two_suspects_and_what_they_pass_on_is_none() -> None:
    model = graph("hybrid")
    for name in ("bias", "noise"):
        FAULTS[name][2](model)
    result = bisect(model, "hybrid")
    assert [suspect.module for suspect in result.suspects] == ["layer2.2.channel_func.fc1", "layer3.1.channel_func.fc2"]
    assert "Wrong too: layer3.1.channel_func.fc2 (missing bias)." in result.lines()
    after = {module.module: module for module in result.modules}["layer3.2.norm1"]
    assert after.inherited > 100 * after.allowed > 100 * after.local


def test_overflow_in_half_precision_shows_on_a_cpu() -> None:
    model = graph("hybrid", "fp16")
    name = "layer2.2.channel_func.fc1.weight"
    faults.set_value(model, name, faults.value(model, name).astype(np.float32) * 3e5)
    suspect = bisect(model, "hybrid").suspects[0]
    assert (suspect.module, suspect.kind) == ("layer2.2.channel_func.fc1", "overflow")


def test_a_fixed_batch_is_looked_at_as_it_is() -> None:
    model = graph("conv")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    assert locate(model, reference("conv")).view.images.shape[0] == 3


def test_two_inputs_are_refused() -> None:
    model = graph("conv")
    model.graph.input.append(helper.make_tensor_value_info("mask", 1, [1]))
    with pytest.raises(UsageError, match="2 inputs"):
        bisect(model, "conv")


def test_a_graph_that_does_not_run_is_said_so() -> None:
    model = graph("conv")
    model.graph.node[-1].op_type = "Nonsense"
    with pytest.raises(UsageError, match="cannot be taken apart"):
        bisect(model, "conv")


def test_a_wrong_rewrite_is_found_in_the_static_model() -> None:
    model: Spach = small_model("hybrid")
    static = copy.deepcopy(rewrite(model).model)
    assert first_wrong_part(model, static, static_models.images(1), 1e-6) == ("", 0.0)
    static.get_submodule("layer2.2.norm2").eps = 0.1  # type: ignore[assignment]
    path, error = first_wrong_part(model, static, static_models.images(1), 1e-6)
    assert path == "layer2.2"
    assert error > 1e-3


def test_every_kind_has_a_model_in_these_tests() -> None:
    assert {"hybrid_stem", "mlp_shared", "hybrid", "conv"} <= set(ARCHITECTURES)

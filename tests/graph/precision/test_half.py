"""What a typed graph is made of: islands as small as they can be, one cast a border, and reasons for all of it."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from spach_deploy.common.errors import PrecisionError, UsageError
from spach_deploy.graph.editing import owner
from spach_deploy.graph.interface import add_interface
from spach_deploy.graph.precision.decision import STATISTICS, TypingOptions
from spach_deploy.graph.precision.ranges import Ranges
from spach_deploy.options.specs import IODtype, OutputSpec, Precision, Preprocessing
from tests.graph.precision.graphs import (
    KINDS,
    array,
    batches,
    feed,
    graph,
    kept_for,
    measured,
    node,
    target_graph,
    types_of,
)
from tests.outputs import classifier
from tests.protos import (
    attributes,
    consumers,
    in_place,
    initializers,
    is_marked_float32,
    mark_float32,
    measure_ranges,
    type_graph,
)
from tests.static_models import CLASSES, IMAGE_SIZE, small_model

COMPUTING = ("Gemm", "Conv", "MatMul", "LayerNormalization", "Gelu")
HALVES = [Precision.FP16, Precision.BF16]


def ranges_of(model: ModelProto) -> Ranges:
    return measure_ranges(model, batches(4), source="noise", threads=1)


def test_fp32_gives_the_graph_itself() -> None:
    model = target_graph("hybrid")
    typed = type_graph(model, Precision.FP32, ranges_of(model))
    assert typed.model is model
    assert typed.policy.summary == "fp32"


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_has_a_reason_is_fp32(kind: str, precision: Precision) -> None:
    """Full inference would fail where types mix. In an ordinary model only marked nodes and statistics are FP32."""
    model = target_graph(kind)
    typed = type_graph(model, precision, ranges_of(model))
    types = types_of(typed.model)
    kept = {kept.node for kept in typed.policy.kept}
    assert {k.reason for k in typed.policy.kept} <= {"marked", "statistics"}
    assert kept == {n.name for n in model.graph.node if is_marked_float32(n) or n.op_type in STATISTICS}
    for made in typed.model.graph.node:
        if made.op_type in COMPUTING:
            assert types[made.output[0]] == precision.value, made.name


@pytest.mark.parametrize("precision", HALVES)
def test_casts_stand_on_borders_once_and_carry_module_names(precision: Precision) -> None:
    model = target_graph("hybrid")
    typed = type_graph(model, precision, ranges_of(model))
    types = types_of(typed.model)
    types["input"] = "fp32"
    modules = {path for path, _ in small_model("hybrid").named_modules()} | {"io", "model"}
    casts = [n for n in typed.model.graph.node if n.op_type == "Cast"]
    assert len(casts) == typed.policy.casts
    assert len({(n.input[0], attributes(n)["to"]) for n in casts}) == len(casts)
    for cast in casts:
        assert types[cast.input[0]] != types[cast.output[0]]
        assert cast.name.endswith(("/to_fp32", f"/to_{precision.value}"))
        assert owner(cast.name) in modules
    made_by_cast = {n.output[0] for n in casts}
    assert not made_by_cast & {n.input[0] for n in casts}, "a cast of a cast"


def test_weights_are_stored_in_the_type_in_which_they_are_read() -> None:
    model = graph(
        [
            node("Mul", ["input", "w"], "a/Mul"),
            mark_float32(node("Mul", ["a/Mul", "w"], "b/Mul")),
            mark_float32(node("Mul", ["b/Mul", "v"], "c/Mul")),
        ],
        ["c/Mul"],
        w=array(1, 2, 3, 4),
        v=array(1, 2, 3, 4),
    )
    typed = type_graph(model, Precision.FP16, measured(model, [1, 1, 1, 1]))
    stored = {name: t.data_type for name, t in initializers(typed.model.graph).items()}
    assert stored == {"w": TensorProto.FLOAT16, "w/fp32": TensorProto.FLOAT, "v": TensorProto.FLOAT}
    assert types_of(typed.model)["b/Mul"] == "fp32"


def outlier_graph() -> ModelProto:
    """Three layers; what the middle one adds up is large."""
    weight = np.eye(4, dtype=np.float32)
    return graph(
        [
            node("Gemm", ["input", "eye"], "first/Gemm"),
            node("Mul", ["first/Gemm", "large"], "block/Mul"),
            node("Reshape", ["block/Mul", "shape"], "block/Reshape"),
            node("Add", ["block/Reshape", "block/Reshape"], "block/Add"),
            node("LayerNormalization", ["block/Add", "scale", "bias"], "norm/LayerNormalization"),
            node("Gemm", ["norm/LayerNormalization", "eye"], "last/Gemm"),
        ],
        ["last/Gemm"],
        eye=weight,
        large=array(1, 1, 1, 2e4),
        shape=np.array([0, 4]),
        scale=array(1, 1, 1, 1),
        bias=array(0, 0, 0, 0),
    )


def test_an_island_is_as_small_as_its_outlier() -> None:
    model = outlier_graph()
    typed = type_graph(model, Precision.FP16, measured(model, [1, 2, 3, 4]))
    reasons = {kept.node: (kept.reason, kept.tensor, kept.max_abs) for kept in typed.policy.kept}
    assert reasons == {
        "block/Mul": ("range", "block/Mul", 8e4),
        "block/Reshape": ("range", "block/Mul", 8e4),
        "block/Add": ("range", "block/Reshape", 8e4),
        "norm/LayerNormalization": ("range", "block/Add", 1.6e5),
    }
    casts = [n.name for n in typed.model.graph.node if n.op_type == "Cast"]
    assert casts == [
        "io/input/to_fp16",
        "first/Gemm/to_fp32",
        "norm/LayerNormalization/to_fp16",
        "last/Gemm/to_fp32",
    ]
    types = types_of(typed.model)
    assert types["first/Gemm"] == "fp16"
    assert {initializers(typed.model.graph)[name].data_type for name in ("scale", "bias", "large")} == {
        TensorProto.FLOAT
    }


def test_bf16_has_the_range_for_it() -> None:
    model = outlier_graph()
    assert not type_graph(model, Precision.BF16, measured(model, [1, 2, 3, 4])).policy.kept


@pytest.mark.parametrize(("value", "kept"), [(8187.0, 0), (8189.0, 1)])
def test_the_margin_is_kept(value: float, kept: int) -> None:
    model = graph([node("Abs", ["input"], "a/Abs")], ["a/Abs"])
    assert len(type_graph(model, Precision.FP16, measured(model, [value] * 4)).policy.kept) == kept
    options = TypingOptions(margin=1.0)
    assert not type_graph(model, Precision.FP16, measured(model, [value] * 4), options).policy.kept


def test_a_sum_that_overflows_before_its_bias_is_seen() -> None:
    """100 is all that the tensor shows; a compiler holds 100 + 60000 in half before it adds the bias."""
    model = graph(
        [node("Gemm", ["input", "w", "b"], "fc/Gemm")],
        ["fc/Gemm"],
        w=np.full((4, 1), 15025, np.float32),
        b=array(-60000),
    )
    (kept,) = type_graph(model, Precision.FP16, measured(model, [1, 1, 1, 1])).policy.kept
    assert (kept.tensor, kept.max_abs) == ("fc/Gemm", 100.0)


def test_gelu_is_given_room_for_twice_its_input() -> None:
    model = graph([node("Gelu", ["input"], "act/Gelu")], ["act/Gelu"])
    (kept,) = type_graph(model, Precision.FP16, measured(model, [-5000, 1, 1, 1])).policy.kept
    assert (kept.node, kept.tensor, kept.max_abs) == ("act/Gelu", "input", 5000.0)


def test_a_view_between_two_fp32_nodes_stays_there_and_one_at_the_border_is_half() -> None:
    model = graph(
        [
            mark_float32(node("Mul", ["input", "input"], "a/Mul")),
            node("Reshape", ["a/Mul", "shape"], "a/Reshape"),
            node("Transpose", ["a/Reshape"], "a/Transpose", perm=[1, 0]),
            mark_float32(node("Add", ["a/Transpose", "a/Transpose"], "a/Add")),
            node("Transpose", ["a/Add"], "b/Transpose", perm=[1, 0]),
            node("Gemm", ["b/Transpose", "w"], "b/Gemm"),
        ],
        ["b/Gemm"],
        shape=np.array([0, 4]),
        w=np.eye(4, dtype=np.float32),
    )
    typed = type_graph(model, Precision.FP16, measured(model, [1, 2, 3, 4]))
    types = types_of(typed.model)
    assert {types[f"a/{op}"] for op in ("Mul", "Reshape", "Transpose", "Add")} == {"fp32"}
    assert types["b/Transpose"] == types["b/Gemm/fp16"] == "fp16"


@pytest.mark.parametrize("operator", ["ReduceMean", "Softmax", "InstanceNormalization", "TopK"])
def test_statistics_are_fp32(operator: str) -> None:
    assert operator in STATISTICS
    assert "LayerNormalization" not in STATISTICS


def test_a_module_can_be_kept_by_name() -> None:
    model = target_graph("hybrid")
    typed = type_graph(model, Precision.FP16, ranges_of(model), TypingOptions(keep=("layer3.*", "head")))
    types = types_of(typed.model)
    kept = {n.output[0] for n in model.graph.node if owner(n.name).startswith("layer3.") and n.op_type in COMPUTING}
    assert kept
    assert {types[name] for name in kept} == {types["logits"]} == {"fp32"}
    assert {k.module for k in kept_for(typed, "asked")} >= {"head", "layer3.1.channel_func.fc1"}
    assert types["layer2.1.channel_func.fc1/Gemm"] == "fp16"


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    model = outlier_graph()
    with pytest.raises(UsageError, match=r"'layer9\.\*'"):
        type_graph(model, Precision.FP16, measured(model, [1, 2, 3, 4]), TypingOptions(keep=("layer9.*",)))


def test_fp16_at_the_boundary() -> None:
    model = target_graph("hybrid")
    outputs = classifier(CLASSES, OutputSpec(top_k=3, softmax=True))
    in_place(add_interface, model, outputs, IODtype.FP32, Preprocessing.for_size(IMAGE_SIZE))
    typed = type_graph(model, Precision.FP16, ranges_of(model), TypingOptions(io_dtype=IODtype.FP16))
    types_of(typed.model)
    elements = {v.name: v.type.tensor_type.elem_type for v in (*typed.model.graph.input, *typed.model.graph.output)}
    assert elements.pop("top_indices") == TensorProto.INT64
    assert set(elements.values()) == {TensorProto.FLOAT16}
    assert not any(n.name.startswith("io/input/") for n in typed.model.graph.node)


def test_fp32_graph_with_fp16_at_the_boundary() -> None:
    model = target_graph("hybrid")
    typed = type_graph(model, Precision.FP32, ranges_of(model), TypingOptions(io_dtype=IODtype.FP16))
    assert Counter(n.op_type for n in typed.model.graph.node)["Cast"] == 2
    assert set(types_of(typed.model).values()) == {"fp32", "fp16"}
    assert {t.data_type for t in typed.model.graph.initializer} == {TensorProto.FLOAT, TensorProto.INT64}


@pytest.mark.parametrize("precision", HALVES)
def test_pixels_are_normalized_in_fp32(precision: Precision) -> None:
    model = target_graph("hybrid")
    in_place(add_interface, model, classifier(CLASSES), IODtype.UINT8, Preprocessing.for_size(IMAGE_SIZE))
    pixels = np.random.default_rng(0).integers(0, 256, (2, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    ranges = measure_ranges(model, [{"input": pixels}])
    typed = type_graph(model, precision, ranges, TypingOptions(io_dtype=IODtype.UINT8))
    types = types_of(typed.model)
    assert types["io/scaled"] == "fp32"
    assert types["stem.proj/Conv"] == precision.value
    assert typed.model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8


@pytest.mark.parametrize("precision", [precision for precision in Precision if not precision.is_quantized])
def test_outputs_that_fp16_cannot_hold_are_refused_by_name(precision: Precision) -> None:
    model = graph([node("Mul", ["input", "w"], "head/Mul", ["logits"])], ["logits"], w=array(1e4, 1, 1, 1))
    ranges = measured(model, [5, 1, 1, 1])
    with pytest.raises(PrecisionError, match="logits reaches 5e\\+04") as caught:
        type_graph(model, precision, ranges, TypingOptions(io_dtype=IODtype.FP16))
    assert "--io-dtype fp32" in caught.value.hint
    type_graph(model, precision, ranges)


def test_inputs_that_fp16_cannot_hold_are_refused_by_name() -> None:
    model = graph([node("LayerNormalization", ["input", "w"], "norm/LN")], ["norm/LN"], w=array(1, 1, 1, 1))
    with pytest.raises(PrecisionError, match="input reaches"):
        type_graph(model, Precision.FP16, measured(model, [1e5, 1, 1, 1]), TypingOptions(io_dtype=IODtype.FP16))


@pytest.mark.parametrize("precision", HALVES)
def test_what_is_not_finite_in_fp32_is_refused_by_name(precision: Precision) -> None:
    model = graph(
        [node("Mul", ["input", "w"], "a/Mul"), node("Abs", ["a/Mul"], "b/Abs")], ["b/Abs"], w=array(1, 1, 1, 1e38)
    )
    with pytest.raises(PrecisionError, match="a/Mul is not finite"):
        type_graph(model, precision, measured(model, [1, 1, 1, 100]))


def test_ranges_of_another_graph_are_refused() -> None:
    model = outlier_graph()
    with pytest.raises(PrecisionError, match="No range was measured for"):
        type_graph(model, Precision.FP16, Ranges({"input": 1.0}, 1))


def test_the_policy_tells_the_whole_story_as_json() -> None:
    model = outlier_graph()
    ranges = measure_ranges(model, [feed([1, 2, 3, 4])], source="one row")
    policy = type_graph(model, Precision.FP16, ranges).policy
    told = json.loads(json.dumps(policy.to_dict()))
    assert told["asked"] == "fp16"
    assert told["summary"] == "fp16, 4 of 6 nodes in fp32 (4 for their range)"
    assert told["ranges"] == {"source": "one row", "images": 1}
    assert (told["margin"], told["limit"]) == (8.0, 65504.0)
    assert told["kept"][0] == {"module": "block", "reason": "range", "tensor": "block/Mul", "max_abs": 8e4, "nodes": 2}
    assert told["weights"]["count"] > 0
    assert told["closest"][0]["tensor"] == "first/Gemm"


def test_the_policy_of_an_overflowing_graph_is_strict_json() -> None:
    model = target_graph("hybrid", 1e6)
    told = type_graph(model, Precision.FP16, ranges_of(model)).policy.to_dict()
    assert told["weights"]["overflow"] > 0
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_a_bfloat16_graph_is_valid_onnx() -> None:
    model = target_graph("hybrid")
    typed = type_graph(model, Precision.BF16, ranges_of(model)).model
    assert typed.opset_import[0].version >= 22
    onnx.checker.check_model(typed, full_check=True)


def test_the_source_graph_is_not_changed() -> None:
    model = target_graph("hybrid", 1e6)
    before = model.SerializeToString()
    type_graph(model, Precision.FP16, ranges_of(model))
    assert model.SerializeToString() == before


def test_every_tensor_is_read() -> None:
    model = target_graph("hybrid", 1e6)
    typed = type_graph(model, Precision.FP16, ranges_of(model)).model
    read = consumers(typed.graph)
    outputs = {value.name for value in typed.graph.output}
    assert all(read.get(name) or name in outputs for n in typed.graph.node for name in n.output)
    assert all(tensor.name in read for tensor in typed.graph.initializer)

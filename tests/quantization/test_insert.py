"""Pairs in the typed graph: where they stand, what they hold, and who runs and builds the result."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import ModelProto, NodeProto, TensorProto

from spach_deploy.common.errors import PrecisionError
from spach_deploy.engine.build import build_engine
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.engine.network_facts import check_achieved_precision
from spach_deploy.graph.certificate import certify
from spach_deploy.graph.opset import opset_of
from spach_deploy.options.specs import BatchProfile, EngineTarget, Flavour, Precision
from spach_deploy.quantization.formats import FP8, INT8, EightBitFormat
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.quantization.sites import LayerKind
from spach_deploy.runtime.devices import is_installed
from tests import static_models
from tests.protos import (
    attributes,
    audit,
    consumers,
    decode,
    element_types,
    initializers,
    insert_qdq,
    producers,
    rounded_graph,
)
from tests.quantization.faults import source_of
from tests.quantization.small_models import KINDS, inputs, plan, quantized, run, static, typed
from tests.static_models import relative_l2

needs_rtx = pytest.mark.skipif(not is_installed(Flavour.TENSORRT_RTX), reason="tensorrt-rtx is not installed")
both = pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])
ATTENTION = "blocks.1.spatial_func"
TYPES = {
    Precision.FP32: TensorProto.FLOAT,
    Precision.FP16: TensorProto.FLOAT16,
    Precision.BF16: TensorProto.BFLOAT16,
}


def of_type(model: ModelProto, op_type: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]


def stem_of(node: NodeProto) -> str:
    """What the names of a pair begin with."""
    return node.name.rsplit("/", 1)[0]


def modules(kind: str) -> list[str]:
    return [path for path, _ in static_models.small_model(kind).named_modules(remove_duplicate=False)]


# Where they stand


@pytest.mark.parametrize("kind", KINDS)
@both
def test_only_weighted_layers_read_eight_bits(kind: str, form: EightBitFormat) -> None:
    model = quantized(kind, form)
    read, planned = consumers(model.graph), set(plan(kind, form, half=False).product_nodes)
    for node in of_type(model, "DequantizeLinear"):
        readers = read[node.output[0]]
        assert readers
        assert {reader.op_type for reader in readers} <= {"Gemm", "MatMul", "Conv"}
        assert {reader.name for reader in readers} <= planned
    for node in of_type(model, "QuantizeLinear"):
        assert [reader.op_type for reader in read[node.output[0]]] == ["DequantizeLinear"]


@pytest.mark.parametrize("kind", KINDS)
@both
def test_every_planned_layer_reads_its_input_and_its_weight_through_a_pair(kind: str, form: EightBitFormat) -> None:
    model, made = quantized(kind, form), plan(kind, form, half=False)
    nodes, made_by = {node.name: node for node in model.graph.node}, producers(model.graph)
    constants = initializers(model.graph)
    for site in made.sites:
        slot = 1 if site.kind is LayerKind.TOKEN_LINEAR else 0
        for index, source in ((slot, site.tensors[0].tensor), (1 - slot, site.weight)):
            back = made_by[nodes[site.node].input[index]]
            forth = made_by[back.input[0]]
            assert (forth.op_type, back.op_type) == ("QuantizeLinear", "DequantizeLinear")
            assert forth.input[0] == source
            assert forth.input[1:] == back.input[1:]
        assert constants[site.weight].data_type == TensorProto.FLOAT


def test_residual_sums_and_normalizations_read_what_they_read_before() -> None:
    before = {
        node.name: list(node.input) for node in typed("hybrid", plan("hybrid", INT8), (), Precision.FP16).graph.node
    }
    after = quantized("hybrid", INT8, rest=Precision.FP16)
    planned = set(plan("hybrid", INT8).product_nodes)
    for node in after.graph.node:
        if node.name in before and node.name not in planned:
            assert list(node.input) == before[node.name]
    assert {"Add", "LayerNormalization"} <= {node.op_type for node in after.graph.node}


def test_a_weight_that_two_layers_read_has_one_pair() -> None:
    model = quantized("mlp_shared", INT8)
    read = consumers(model.graph)
    weight = "blocks.0.spatial_func.fc1.weight"
    (forth,) = (node for node in of_type(model, "QuantizeLinear") if node.input[0] == weight)
    (back,) = read[forth.output[0]]
    assert [node.name.split("/")[0] for node in read[back.output[0]]] == [
        f"blocks.{i}.spatial_func.fc1" for i in range(3)
    ]


def test_layers_of_one_weight_with_different_scales_have_pairs_of_their_own() -> None:
    per_tensor = frozenset({"blocks.1.spatial_func.fc1"})
    model = quantized("mlp_shared", INT8, per_tensor=per_tensor)
    assert audit(model, plan("mlp_shared", INT8, half=False, per_tensor=per_tensor)) == ()
    onnx.checker.check_model(model, full_check=True)
    forth = [node for node in of_type(model, "QuantizeLinear") if node.input[0] == "blocks.0.spatial_func.fc1.weight"]
    assert sorted(len(initializers(model.graph)[node.input[1]].dims) for node in forth) == [0, 1]


# What they hold


@pytest.mark.parametrize("rest", TYPES)
@both
def test_scales_are_planned_ones_of_the_rests_type_and_zero_points_are_zero(
    rest: Precision, form: EightBitFormat
) -> None:
    model, made = quantized("trans", form, rest=rest), plan("trans", form, half=rest.is_half)
    constants = initializers(model.graph)
    planned = {site.tensors[0].scale for site in made.sites}
    for node in of_type(model, "QuantizeLinear") + of_type(model, "DequantizeLinear"):
        scale, zero = constants[f"{stem_of(node)}/scale"], constants[f"{stem_of(node)}/zero"]
        assert scale.data_type == TYPES[rest]
        assert zero.data_type == form.dtype
        assert list(zero.dims) == list(scale.dims)
        assert not any(zero.raw_data)
        if scale.dims:
            assert attributes(node)["axis"] == 0
        else:
            assert "axis" not in attributes(node)
            value = float(decode(scale))
            assert any(
                value == pytest.approx(number, rel=2**-8 if rest is Precision.BF16 else 1e-7) for number in planned
            )


@both
def test_weight_scales_are_the_plans_channel_by_channel(form: EightBitFormat) -> None:
    model, made = quantized("trans", form, rest=Precision.FP16), plan("trans", form)
    constants = initializers(model.graph)
    for site in made.sites:
        forth = producers(model.graph)[f"{site.module}/weight/quantize"]
        assert source_of(model, f"{site.module}/weight") == site.weight
        assert tuple(float(value) for value in decode(constants[forth.input[1]])) == site.weight_scales


@both
@pytest.mark.parametrize("rest", TYPES)
def test_int8_is_made_of_fp32_where_the_rest_is_fp16_with_the_very_scale_that_takes_it_back(
    form: EightBitFormat, rest: Precision
) -> None:
    model = quantized("trans", form, (ATTENTION,), rest)
    types, constants, made = element_types(model), initializers(model.graph), producers(model.graph)
    for forth in of_type(model, "QuantizeLinear"):
        back = made[f"{stem_of(forth)}/dequantize"]
        scales = [decode(constants[node.input[1]]) for node in (forth, back)]
        assert types[back.output[0]] == TYPES[rest]
        assert (scales[0] == scales[1]).all()
        if form is INT8 and rest is Precision.FP16:
            assert types[forth.input[0]] == TensorProto.FLOAT
            assert len(back.input) == 2
        else:
            assert types[forth.input[0]] == TYPES[rest]
            assert forth.input[1:] == back.input[1:]


def test_what_is_fp32_already_is_quantized_as_it_is() -> None:
    """TensorRT does not fuse an attention whose softmax is cast to FP16 and back before it is quantized."""
    model = quantized("trans", INT8, (ATTENTION,), Precision.FP16)
    made, read = producers(model.graph), consumers(model.graph)
    (forth,) = read[f"{ATTENTION}/Softmax"]
    assert forth.op_type == "QuantizeLinear"
    for cast in of_type(model, "Cast"):
        assert read[cast.output[0]] or cast.output[0] == "logits"
        source = made.get(cast.input[0])
        assert source is None or source.op_type != "Cast"


def test_eight_bit_integers_are_zero_points_alone() -> None:
    model = quantized("hybrid", INT8, rest=Precision.FP16)
    stored = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8]
    assert stored
    assert all(tensor.name.endswith("/zero") for tensor in stored)


# Attention: all four, or none


def attention_pairs(model: ModelProto, module: str) -> set[str]:
    return {node.name for node in of_type(model, "QuantizeLinear") if node.name.startswith(f"{module}/")}


@pytest.mark.parametrize("rest", [Precision.FP32, Precision.FP16])
@both
def test_an_attention_is_quantized_whole_or_not_at_all(form: EightBitFormat, rest: Precision) -> None:
    model = quantized("trans", form, (ATTENTION,), rest)
    layers = {f"{ATTENTION}/Reshape/quantize", f"{ATTENTION}/Reshape_3/quantize"}
    extra = attention_pairs(model, ATTENTION) - layers
    assert len(extra) == 4
    made_by = producers(model.graph)
    products = [node for node in of_type(model, "MatMul") if node.name.startswith(f"{ATTENTION}/")]
    assert len(products) == 2
    for product in products:
        assert [made_by[name].op_type for name in product.input] == ["DequantizeLinear"] * 2
    other = "blocks.0.spatial_func"
    assert attention_pairs(model, other) == {f"{other}/Reshape/quantize", f"{other}/Reshape_3/quantize"}


# Valid, certified, run


@pytest.mark.parametrize("rest", TYPES)
@pytest.mark.parametrize("kind", ["hybrid", "mlp_shared"])
@both
def test_the_graph_is_valid_and_keeps_the_certificates_promises(
    kind: str, form: EightBitFormat, rest: Precision
) -> None:
    model = quantized(kind, form, ("*.spatial_func*",), rest)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert len(inferred.graph.node) == len(model.graph.node)
    certificate = certify(ir.from_proto(model), modules(kind))
    assert certificate.operators["QuantizeLinear"] == certificate.operators["DequantizeLinear"]
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)


@pytest.mark.parametrize("rest", TYPES)
@both
def test_onnxruntime_runs_it(form: EightBitFormat, rest: Precision) -> None:
    model = quantized("trans", form, rest=rest)
    model = rounded_graph(model) if rest is Precision.BF16 else model
    reference = static_models.logits(static("trans"), inputs())
    error = relative_l2(run(model, inputs()), reference)
    assert 1e-4 < error < (0.02 if form is INT8 else 0.08)


def test_what_was_given_is_not_changed() -> None:
    made = plan("trans", INT8)
    before = typed("trans", made, (), Precision.FP16)
    content = before.SerializeToString()
    insert_qdq(before, made)
    assert before.SerializeToString() == content


# What it refuses


def renamed(made: QuantizationPlan, kind: LayerKind) -> QuantizationPlan:
    sites = tuple(dataclasses.replace(s, node="nowhere/Gemm") if s.kind is kind else s for s in made.sites)
    return dataclasses.replace(made, sites=sites)


@pytest.mark.parametrize("kind", [LayerKind.LINEAR, LayerKind.ATTENTION])
def test_a_planned_node_that_is_not_there_is_refused(kind: LayerKind) -> None:
    made = plan("trans", INT8, (ATTENTION,))
    with pytest.raises(PrecisionError, match="has no node nowhere/Gemm, which was to be quantized"):
        insert_qdq(typed("trans", made, (ATTENTION,), Precision.FP16), renamed(made, kind))


def test_an_attention_that_is_none_any_more_is_refused() -> None:
    made = plan("trans", INT8, (ATTENTION,), half=False)
    model = typed("trans", made, (ATTENTION,), Precision.FP32)
    index, softmax = next((i, n) for i, n in enumerate(model.graph.node) if n.name == f"{ATTENTION}/Softmax")
    softmax.output[0] += "/sharpened"
    between = onnx.helper.make_node("Identity", [softmax.output[0]], [f"{ATTENTION}/Softmax"], name="between")
    model.graph.node.insert(index + 1, between)
    with pytest.raises(PrecisionError, match=f"{ATTENTION} is no attention any more"):
        insert_qdq(model, made)


@pytest.mark.parametrize(("form", "opset"), [(INT8, 20), (FP8, 21)], ids=["int8", "fp8"])
def test_fp8_has_the_opset_in_which_older_runtimes_read_it(form: EightBitFormat, opset: int) -> None:
    model = quantized("conv", form, (), Precision.FP16)
    assert opset_of(ir.from_proto(model)) == opset


# The compiler


def built(path: Path, form: EightBitFormat, quantize: tuple[str, ...]) -> tuple[dict[str, int], QuantizationPlan]:
    """Weighted layers of the parsed network by the type they multiply in."""
    made = plan("hybrid", form, quantize)
    onnx.save(quantized("hybrid", form, quantize, Precision.FP16), path)
    precision = Precision(form.name)
    result = build_engine(path, EngineTarget(batch=BatchProfile(1, 2, 4)), TensorRTForRTX(), precision=precision)
    achieved = check_achieved_precision(result.network, Precision.FP16, quantized=made.product_nodes)
    return achieved.layers_by_dtype, made


@needs_rtx
@pytest.mark.parametrize(
    ("form", "quantize", "products"),
    [(INT8, ("layer3.3.spatial_func",), 28), (FP8, (), 26)],
    ids=["int8 with an attention", "fp8"],
)
def test_tensorrt_builds_it_and_multiplies_in_eight_bits_where_it_was_planned(
    form: EightBitFormat, quantize: tuple[str, ...], products: int, tmp_path: Path
) -> None:
    counts, made = built(tmp_path / "model.onnx", form, quantize)
    assert counts[form.name] == len(made.product_nodes) == products
    assert set(counts) == {form.name, "fp16"}

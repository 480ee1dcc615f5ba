from __future__ import annotations

import enum
import types
from typing import Any

import pytest

from spach_deploy.common.errors import PrecisionError
from spach_deploy.engine.network_facts import LayerFact, NetworkFacts, check_achieved_precision, read_network_facts
from spach_deploy.options.specs import Precision


class DataType(enum.Enum):
    HALF = 1
    INT8 = 2


class LayerType(enum.Enum):
    MATRIX_MULTIPLY = 1
    DEQUANTIZE = 2
    SHUFFLE = 3


def layer(node: str, dtype: str, kind: str = "MATRIX_MULTIPLY") -> LayerFact:
    return LayerFact(node, kind, node, (dtype, dtype), (dtype,))


def network(*layers: LayerFact) -> NetworkFacts:
    return NetworkFacts((), (), layers)


def test_counts_weighted_layers_only() -> None:
    facts = network(layer("a", "fp16"), layer("conv", "fp16", "CONVOLUTION"), layer("sum", "fp32", "ELEMENTWISE"))
    assert check_achieved_precision(facts, Precision.FP16).layers_by_dtype == {"fp16": 2}


@pytest.mark.parametrize("kind", ["MATRIX_MULTIPLY", "CONVOLUTION", "EINSUM", "ATTENTION_INPUT"])
def test_names_every_layer_that_fell_back(kind: str) -> None:
    facts = network(layer("good", "bf16"), layer("stem.proj", "fp32", kind), layer("head", "fp16"))
    with pytest.raises(PrecisionError, match=r"not achieved in 2 layers: stem\.proj \(fp32\), head \(fp16\)"):
        check_achieved_precision(facts, Precision.BF16)


def test_a_layer_whose_inputs_differ_is_not_achieved() -> None:
    mixed = LayerFact("odd", "MATRIX_MULTIPLY", "odd", ("fp16", "fp16"), ("fp32",))
    with pytest.raises(PrecisionError, match="fp16/fp32"):
        check_achieved_precision(network(mixed), Precision.FP16)


def test_kept_layers_are_named_by_node_or_pattern_and_must_be_fp32() -> None:
    facts = network(layer("layer1.0.fc1", "fp32"), layer("layer1.0.fc2", "fp32"), layer("head", "fp16"))
    for kept in (["layer1.0.fc1", "layer1.0.fc2"], ["layer1.0.*"]):
        assert check_achieved_precision(facts, Precision.FP16, kept).kept == ("layer1.0.fc1", "layer1.0.fc2")
    with pytest.raises(PrecisionError, match="head"):
        check_achieved_precision(facts, Precision.FP16, ["*"])


def test_a_long_list_is_cut() -> None:
    facts = network(*(layer(f"fc{index}", "fp32") for index in range(20)))
    with pytest.raises(PrecisionError, match=r"in 20 layers: fc0 .* and 12 more"):
        check_achieved_precision(facts, Precision.FP16)


def test_a_network_without_weighted_layers_cannot_be_said_to_have_achieved_anything() -> None:
    with pytest.raises(PrecisionError, match="no matrix product or convolution"):
        check_achieved_precision(network(layer("sum", "fp16", "ELEMENTWISE")), Precision.FP16)


def test_reads_names_types_and_the_onnx_node_of_each_layer() -> None:
    half = types.SimpleNamespace(name="x", shape=(-1, 4), dtype=DataType.HALF)
    inputs: list[Any] = [half, None]  # an optional input that is absent
    product = types.SimpleNamespace(
        name="fc1 (1)",
        type=LayerType.MATRIX_MULTIPLY,
        metadata="[ONNX Layer: layer1.0.fc1]",
        num_inputs=2,
        num_outputs=1,
        get_input=lambda index: inputs[index],
        get_output=lambda index: half,
    )
    fake = types.SimpleNamespace(
        num_inputs=1, num_outputs=1, num_layers=1,
        get_input=lambda index: half, get_output=lambda index: half, get_layer=lambda index: product,
    )  # fmt: skip
    facts = read_network_facts(fake)
    assert facts.inputs[0].shape == (-1, 4)
    assert facts.layers == (LayerFact("fc1 (1)", "MATRIX_MULTIPLY", "layer1.0.fc1", ("fp16",), ("fp16",)),)


def test_a_weight_that_the_parser_gives_the_axis_of_the_batch_is_in_eight_bits_still() -> None:
    """Weights of products over tokens, (N, N) before (B, N, C), go through a SHUFFLE."""

    def made(kind: LayerType, output: str, *inputs: tuple[str, DataType]) -> Any:
        given = [types.SimpleNamespace(name=name, shape=(4, 4), dtype=dtype) for name, dtype in inputs]
        result = types.SimpleNamespace(name=output, shape=(4, 4), dtype=DataType.HALF)
        return types.SimpleNamespace(
            name=output, type=kind, metadata="", num_inputs=len(given), num_outputs=1,
            get_input=lambda index: given[index], get_output=lambda index: result,
        )  # fmt: skip

    layers = [
        made(LayerType.DEQUANTIZE, "w", ("w8", DataType.INT8)),
        made(LayerType.SHUFFLE, "w3", ("w", DataType.HALF)),
        made(LayerType.DEQUANTIZE, "x", ("x8", DataType.INT8)),
        made(LayerType.MATRIX_MULTIPLY, "product", ("w3", DataType.HALF), ("x", DataType.HALF)),
    ]
    fake = types.SimpleNamespace(num_inputs=0, num_outputs=0, num_layers=4, get_layer=lambda index: layers[index])
    achieved = check_achieved_precision(read_network_facts(fake), Precision.FP16, quantized=["product"])
    assert achieved.layers_by_dtype == {"int8": 1}

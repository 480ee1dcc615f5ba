"""Which layers can be quantized, which are by rule, and what a user may ask instead."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from spach_deploy.common.errors import UsageError
from spach_deploy.quantization.formats import FP8, INT8, EightBitFormat
from spach_deploy.quantization.sites import LayerKind, Selection, Site
from tests import static_models
from tests.protos import find_sites, initializers
from tests.quantization.small_models import KINDS, canonical

both = pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])


def sites(kind: str) -> tuple[Site, ...]:
    return find_sites(canonical(kind))


def reasons(kind: str, form: EightBitFormat, **asked: tuple[str, ...]) -> dict[str, str]:
    """By module."""
    chosen = Selection(**asked).chosen(sites(kind), form)
    return {site.module: chosen[site.node] for site in sites(kind)}


# Finding them


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("conv", {LayerKind.CONVOLUTION: 1, LayerKind.DEPTHWISE: 3, LayerKind.LINEAR: 7}),
        ("trans", {LayerKind.CONVOLUTION: 1, LayerKind.DEPTHWISE: 3, LayerKind.LINEAR: 13, LayerKind.ATTENTION: 3}),
        ("mlp", {LayerKind.CONVOLUTION: 1, LayerKind.DEPTHWISE: 3, LayerKind.LINEAR: 7, LayerKind.TOKEN_LINEAR: 6}),
        (
            "mlp_shared",
            {LayerKind.CONVOLUTION: 1, LayerKind.DEPTHWISE: 3, LayerKind.LINEAR: 7, LayerKind.TOKEN_LINEAR: 6},
        ),
        ("hybrid", {LayerKind.CONVOLUTION: 3, LayerKind.DEPTHWISE: 8, LayerKind.LINEAR: 27, LayerKind.ATTENTION: 5}),
        (
            "hybrid_stem",
            {LayerKind.CONVOLUTION: 5, LayerKind.DEPTHWISE: 4, LayerKind.LINEAR: 13, LayerKind.ATTENTION: 2},
        ),
        ("ms_mlp", {LayerKind.CONVOLUTION: 2, LayerKind.DEPTHWISE: 4, LayerKind.LINEAR: 9, LayerKind.TOKEN_LINEAR: 4}),
    ],
)
def test_every_product_is_a_site_of_its_kind(kind: str, expected: dict[LayerKind, int]) -> None:
    found = sites(kind)
    assert Counter(site.kind for site in found) == expected
    products = [node for node in canonical(kind).graph.node if node.op_type in ("Gemm", "MatMul", "Conv")]
    attentions = expected.get(LayerKind.ATTENTION, 0)
    assert len(found) == len(products) - attentions  # an attention is one site and two products
    assert len({site.node for site in found}) == len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_sites_are_named_after_the_models_modules(kind: str) -> None:
    modules = dict(static_models.small_model(kind).named_modules(remove_duplicate=False))
    assert {site.module for site in sites(kind)} <= set(modules)


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_says_which_tensors_its_node_reads(kind: str) -> None:
    model = canonical(kind)
    nodes, weights = {node.name: node for node in model.graph.node}, initializers(model.graph)
    for site in sites(kind):
        node = nodes[site.node]
        if site.kind is LayerKind.ATTENTION:
            assert node.op_type == "Softmax"
            assert len(site.measured) == 4
            assert site.measured[2] == node.output[0]
            continue
        slot = 1 - site.slot
        assert (node.input[site.slot], node.input[slot]) == (site.activation, site.weight)
        assert site.weight in weights
        assert site.measured == (site.activation,)
        assert site.slot == (1 if site.kind is LayerKind.TOKEN_LINEAR else 0)


def test_multiplications_are_counted() -> None:
    architecture, tokens = static_models.ARCHITECTURES["trans"], 4
    by_module = {site.module: site.macs for site in sites("trans")}
    dim, side = architecture.width, static_models.IMAGE_SIZE
    assert by_module["stem.proj"] == side * side * 3 * dim
    assert by_module["blocks.0.cpe_net.net.1"] == 9 * dim * tokens * 4
    assert by_module["blocks.0.spatial_func.qkv"] == 3 * dim * dim * tokens * 4
    assert by_module["blocks.0.spatial_func"] == 2 * (tokens * 4) ** 2 * dim
    assert by_module["head"] == dim * static_models.CLASSES
    assert math.prod(by_module.values()) > 0


# The rules


@pytest.mark.parametrize("kind", KINDS)
@both
def test_linear_layers_are_quantized_by_rule_and_nothing_else(kind: str, form: EightBitFormat) -> None:
    found = reasons(kind, form)
    for site in sites(kind):
        by_rule = site.kind in (LayerKind.LINEAR, LayerKind.TOKEN_LINEAR) and site.module != "head"
        assert (found[site.module] == "") == by_rule
        assert by_rule or found[site.module].startswith("rule: ")


# What a user asks


def test_patterns_choose_layers_either_way() -> None:
    found = reasons("hybrid", INT8, keep_float=("layer1.*",), quantize=("head", "layer3.*.cpe_net.net.1"))
    assert found["layer1.0.channel_func.fc1"] == "asked: --keep-float"
    assert found["layer2.1.channel_func.fc1"] == ""
    assert found["head"] == ""
    assert found["layer3.1.cpe_net.net.1"] == ""
    assert found["layer2.1.cpe_net.net.1"].startswith("rule: ")


def test_keeping_wins_over_quantizing() -> None:
    found = reasons("trans", INT8, keep_float=("blocks.1.*",), quantize=("*",))
    assert {found[site.module] for site in sites("trans") if site.module.startswith("blocks.1.")} == {
        "asked: --keep-float"
    }
    assert found["blocks.0.spatial_func"] == found["stem.proj"] == ""


@pytest.mark.parametrize(
    ("option", "asked"), [("--keep-float", {"keep_float": ("layre1.*",)}), ("--quantize", {"quantize": ("Head",)})]
)
@both
def test_a_pattern_that_matches_nothing_is_refused_with_examples(
    option: str, asked: dict[str, tuple[str, ...]], form: EightBitFormat
) -> None:
    with pytest.raises(UsageError) as caught:
        reasons("hybrid", form, **asked)
    pattern = next(iter(asked.values()))[0]
    assert f"{option} '{pattern}' matches no layer" in caught.value.message
    assert "Layers are named like head, layer1.0.channel_func.fc1" in caught.value.hint


@pytest.mark.parametrize("module", ["stem.proj", "layer2.0.net.1.0", "layer3.1.cpe_net.net.1"])
def test_fp8_convolutions_are_refused_and_int8_ones_are_not(module: str) -> None:
    with pytest.raises(UsageError, match="TensorRT runs FP8 convolutions in half") as caught:
        reasons("hybrid", FP8, quantize=(module,))
    assert module in caught.value.message
    assert reasons("hybrid", INT8, quantize=(module,))[module] == ""


def test_fp8_takes_the_attention_and_the_head() -> None:
    found = reasons("hybrid", FP8, quantize=("layer3.3.spatial_func", "head"))
    assert found["layer3.3.spatial_func"] == found["head"] == ""
    assert found["layer3.2.spatial_func"].startswith("rule: ")

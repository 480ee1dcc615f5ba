"""Equalization changes ranges and nothing else, and it does so where eight bits gain by it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from spach_deploy.blocks import rewrite
from spach_deploy.bundle.outputs import chosen_outputs
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.spach import Spach
from spach_deploy.options.specs import OutputSpec, Role
from spach_deploy.quantization import equalization, sites
from spach_deploy.quantization.equalization import (
    ALPHAS,
    EqualizablePair,
    EqualizedPair,
    OutputChannels,
    apply_to_arrays,
    search,
    smoothing_factors,
)
from spach_deploy.quantization.fake_quantization import equalized_model
from spach_deploy.quantization.formats import FP8, INT8, EightBitFormat
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.quantization.scales import Method, store, weight_scales
from spach_deploy.quantization.sites import LayerKind, Site
from spach_deploy.quantization.statistics import TensorStatistics
from tests import static_models
from tests.protos import apply_to_graph, find_pairs, find_sites, initializers
from tests.quantization.small_models import KINDS, canonical, inputs, plan, run, static
from tests.static_models import relative_l2

Float32 = NDArray[np.float32]

EXACT = 1e-6
both = pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])


def pairs_of(model: ModelProto) -> tuple[EqualizablePair, ...]:
    sites = [site for site in find_sites(model) if site.kind is not LayerKind.ATTENTION]
    return find_pairs(model, sites)


def with_random_factors(model: ModelProto) -> list[EqualizedPair]:
    """Every pair equalized by factors over eight octaves, whether it gains or not."""
    generator, weights = np.random.default_rng(0), initializers(model.graph)
    changed = []
    for pair in pairs_of(model):
        channels = weights[pair.site.weight].dims[1]
        factors = tuple(float(f"{factor:.6g}") for factor in np.exp2(generator.uniform(-4, 4, channels)))
        site = pair.site
        changed.append(EqualizedPair(pair.name, site.module, pair.divided, site.weight, 0.5, factors, 0, 0, 0, 0))
    return changed


# Which pairs


def names(kind: str) -> list[str]:
    return [pair.name for pair in pairs_of(canonical(kind))]


def test_pairs_of_a_convolutional_model() -> None:
    blocks = [f"blocks.{i}.norm2 -> blocks.{i}.channel_func.fc1" for i in range(3)]
    assert names("conv") == [*blocks, "norm2 -> head"]


def test_pairs_of_a_transformer() -> None:
    expected = []
    for i in range(3):
        expected += [
            f"blocks.{i}.norm1 -> blocks.{i}.spatial_func.qkv",
            f"blocks.{i}.spatial_func.qkv -> blocks.{i}.spatial_func.proj",
            f"blocks.{i}.norm2 -> blocks.{i}.channel_func.fc1",
        ]
    assert names("trans") == [*expected, "norm2 -> head"]


@pytest.mark.parametrize("kind", ["mlp", "mlp_shared"])
def test_a_spatial_mlp_is_in_no_pair(kind: str) -> None:
    assert names(kind) == names("conv")


def test_pairs_of_a_hybrid_with_a_convolutional_stem() -> None:
    attention = [
        pair
        for i in (1, 2)
        for pair in (
            f"layer2.{i}.norm1 -> layer2.{i}.spatial_func.qkv",
            f"layer2.{i}.spatial_func.qkv -> layer2.{i}.spatial_func.proj",
            f"layer2.{i}.norm2 -> layer2.{i}.channel_func.fc1",
        )
    ]
    stem = [f"stem.proj.{i} -> stem.proj.{i + 3}" for i in (0, 3, 6)]
    convolution = [f"layer1.{i}.norm2 -> layer1.{i}.channel_func.fc1" for i in (0, 1)]
    assert names("hybrid_stem") == [*stem, *convolution, *attention, "norm2 -> head"]


OTHER_NAMES = {"norm1": "a", "norm2": "b", "qkv": "c", "proj": "d", "fc1": "e", "head": "f", "stem": "g"}


def renamed(text: str) -> str:
    for ours, other in OTHER_NAMES.items():
        text = text.replace(ours, other)
    return text


def test_pairs_and_the_head_are_found_whatever_modules_are_called() -> None:
    model = canonical("hybrid_stem")
    for node in model.graph.node:
        node.name = renamed(node.name)
        node.input[:], node.output[:] = map(renamed, node.input), map(renamed, node.output)
    for tensor in model.graph.initializer:
        tensor.name = renamed(tensor.name)
    assert [pair.name for pair in pairs_of(model)] == [*map(renamed, names("hybrid_stem"))]
    assert [site.module for site in find_sites(model) if site.is_head] == ["f"]


def test_what_something_else_reads_too_is_not_exchanged() -> None:
    model = canonical("trans")
    norm = next(node for node in model.graph.node if node.name.startswith("blocks.1.norm2/"))
    model.graph.node.append(onnx.helper.make_node("Identity", [norm.output[0]], ["seen"], "seen"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("seen", onnx.TensorProto.FLOAT, None))
    assert {*names("trans")} - {pair.name for pair in pairs_of(model)} == {
        "blocks.1.norm2 -> blocks.1.channel_func.fc1"
    }


def test_only_quantized_layers_are_equalized_for() -> None:
    modules = {pair.site for pair in plan("hybrid_stem", INT8).equalized}
    quantized = {site.module for site in plan("hybrid_stem", INT8).sites}
    assert modules <= quantized
    assert "head" not in modules
    assert not any(module.startswith("stem") for module in modules)


def test_values_keep_their_range_where_they_are_quantized_themselves() -> None:
    found = [pair.name for pair in plan("trans", INT8, ("blocks.1.spatial_func",)).equalized]
    assert "blocks.0.spatial_func.qkv -> blocks.0.spatial_func.proj" in found
    assert "blocks.1.spatial_func.qkv -> blocks.1.spatial_func.proj" not in found


# Exactness


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_exact_in_the_graph_and_in_the_twin(kind: str) -> None:
    model = canonical(kind)
    before = run(model, inputs())
    equalized = with_random_factors(model)
    assert apply_to_graph(model, equalized) == len(
        {rows.parameter for pair in equalized for rows in pair.divided} | {pair.weight for pair in equalized}
    )
    assert relative_l2(run(model, inputs()), before) <= EXACT
    twin = equalized_model(static(kind), QuantizationPlan(INT8, Method.MAX, (), (), tuple(equalized)))
    assert relative_l2(static_models.logits(twin, inputs()), before) <= EXACT
    for name, tensor in initializers(model.graph).items():
        if name in twin.state_dict() and tensor.data_type == onnx.TensorProto.FLOAT:
            expected = onnx.numpy_helper.to_array(tensor)
            assert np.array_equal(twin.state_dict()[name].numpy().reshape(expected.shape), expected), name


@pytest.mark.parametrize("kind", KINDS)
@both
def test_what_is_searched_is_exact(kind: str, form: EightBitFormat) -> None:
    model = canonical(kind)
    equalized = plan(kind, form, ("head",)).equalized
    apply_to_graph(model, equalized)
    assert relative_l2(run(model, inputs()), run(canonical(kind), inputs())) <= EXACT


def test_parameters_that_are_equal_are_not_taken_for_one() -> None:
    """Freshly made LayerNorms are alike, and exporters store what is alike once."""
    model = Spach(static_models.ARCHITECTURES["trans"].replace(classes=5)).eval()
    load_demo_weights(model)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    graph = as_proto(export_canonical(rewrite(model, (), ()).model, static_models.IMAGE_SIZE))
    before = run(graph, inputs())
    equalized = with_random_factors(graph)
    apply_to_graph(graph, equalized)
    assert relative_l2(run(graph, inputs()), before) <= EXACT
    twin = equalized_model(rewrite(model, (), ()).model, QuantizationPlan(INT8, Method.MAX, (), (), tuple(equalized)))
    assert relative_l2(static_models.logits(twin, inputs()), before) <= EXACT


def test_a_wrong_factor_would_be_seen() -> None:
    model = canonical("trans")
    equalized = with_random_factors(model)
    apply_to_graph(model, equalized)
    wrong = initializers(model.graph)[equalized[0].divided[0].parameter]
    values = onnx.numpy_helper.to_array(wrong).copy()
    values[3] *= 1.01
    wrong.CopyFrom(onnx.numpy_helper.from_array(values, wrong.name))
    assert relative_l2(run(model, inputs()), run(canonical("trans"), inputs())) > 10 * EXACT


def test_the_twins_original_is_left_alone() -> None:
    before = {name: tensor.clone() for name, tensor in static("trans").state_dict().items()}
    equalized_model(static("trans"), plan("trans", INT8))
    after = static("trans").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# The search


def layer(outliers: float, *, channels: int = 32, seed: int = 3) -> tuple[Site, TensorStatistics, Float32, Float32]:
    """A linear layer whose input channel 5 is `outliers` times as large as the others, and its column as much smaller.

    Site, statistics, weight, rows.
    """
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((4000, channels)).astype(np.float32)
    rows[:, 5] *= np.float32(outliers)
    weight = generator.standard_normal((24, channels)).astype(np.float32)
    weight[:, 5] /= np.float32(outliers)
    seen = TensorStatistics.empty(channels, histogram=True)
    for start in range(0, len(rows), 500):
        seen.see(rows[start : start + 500])
    site = Site("block.channel_func.fc1", "fc1/Gemm", LayerKind.LINEAR, "x", 0, "block.channel_func.fc1.weight", -1, 1)
    return site, seen, weight, rows


def searched(outliers: float, form: EightBitFormat) -> EqualizedPair:
    site, seen, weight, _ = layer(outliers)
    pair = EqualizablePair("p", (OutputChannels("block.norm2.weight"),), site)
    return search([pair], {"x": seen}, {site.weight: weight}, form)[0]


def output_error(factors: Sequence[float], outliers: float, form: EightBitFormat) -> float:
    """Relative squared error of the layer really computed in eight bits."""
    _, _, weight, rows = layer(outliers)
    divisors = np.array(factors, np.float32)
    x, w = rows / divisors, weight * divisors
    stored_x = store(x, form.scale_of(float(np.abs(x).max())), form).astype(np.float64)
    stored_w = store(w, weight_scales(w, form)[:, None].astype(np.float32), form).astype(np.float64)
    exact = rows.astype(np.float64) @ weight.T.astype(np.float64)
    return float(np.sum((stored_x @ stored_w.T - exact) ** 2) / np.sum(exact**2))


def test_a_planted_outlier_is_smoothed() -> None:
    found = searched(300, INT8)
    assert found.alpha is not None
    assert found.factors[5] > 8 * np.median(found.factors)
    assert found.range_after < found.range_before / 3
    assert found.error_after < found.error_before / 10


@pytest.mark.parametrize("outliers", [30.0, 300.0, 3000.0])
def test_what_is_found_lowers_the_error_of_the_layer_really_computed(outliers: float) -> None:
    found = searched(outliers, INT8)
    assert found.alpha is not None
    before, after = (output_error(factors, outliers, INT8) for factors in ((1.0,) * 32, found.factors))
    assert after < before / 3


@both
def test_an_even_layer_is_made_no_worse(form: EightBitFormat) -> None:
    found = searched(1.0, form)
    before = output_error((1.0,) * 32, 1.0, form)
    after = before if found.alpha is None else output_error(found.factors, 1.0, form)
    assert after <= 1.05 * before
    assert found.error_after <= found.error_before


def test_what_gains_nothing_is_left_alone() -> None:
    site, _, _, _ = layer(1.0)
    rows = np.ones((100, 32), np.float32)
    seen = TensorStatistics.empty(32, histogram=True)
    seen.see(rows)
    weight = np.ones((24, 32), np.float32)
    found = search([EqualizablePair("p", (OutputChannels("n"),), site)], {"x": seen}, {site.weight: weight}, INT8)[0]
    assert found.alpha is None
    assert found.factors == ()
    assert found.error_after == found.error_before
    assert apply_to_arrays({}, [found]) == {}


@pytest.mark.parametrize("kind", KINDS)
@both
def test_no_pair_of_a_real_model_is_expected_to_lose(kind: str, form: EightBitFormat) -> None:
    found = plan(kind, form).equalized
    assert found
    assert all(entry.error_after <= entry.error_before for entry in found)
    assert {entry.alpha for entry in found} <= {None, *ALPHAS}


# Factors


def test_factors_are_those_of_smoothquant() -> None:
    activation, weight = np.array([1.0, 4.0, 16.0]), np.array([2.0, 2.0, 0.5], np.float32)
    factors = smoothing_factors(activation, weight, 0.5)
    expected = np.sqrt(activation / weight)
    assert np.allclose(factors, expected / np.exp(np.log(expected).mean()))


def test_factors_are_bounded_whatever_the_ranges() -> None:
    activation = np.array([1e-30, 1.0, 1e30, 0.0, 3.0])
    weight = np.array([1e30, 1.0, 1e-30, 1.0, 0.0], np.float32)
    for alpha in ALPHAS:
        factors = smoothing_factors(activation, weight, alpha)
        assert factors.min() >= 2.0**-12
        assert factors.max() <= 2.0**12
        assert factors[3] == factors[4] == 1.0  # channels that are never used, or never read


def test_nothing_alive_gives_ones() -> None:
    assert smoothing_factors(np.zeros(3), np.ones(3, np.float32), 0.5).tolist() == [1, 1, 1]


def test_a_layer_that_sees_only_zeros_is_left_alone() -> None:
    site, _, weight, _ = layer(1.0)
    seen = TensorStatistics.empty(32, histogram=True)
    seen.see(np.zeros((10, 32), np.float32))
    found = search([EqualizablePair("p", (OutputChannels("n"),), site)], {"x": seen}, {site.weight: weight}, INT8)[0]
    assert found.alpha is None
    assert (found.range_before, found.range_after) == (0.0, 0.0)


def test_a_record_survives_json() -> None:
    for entry in plan("trans", INT8).equalized:
        assert EqualizedPair.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry


def test_scales_are_of_the_equalized_numbers() -> None:
    """The plan's scales, from statistics taken before equalization, hold what the equalized graph really computes."""
    made = plan("trans", INT8)
    twin = equalized_model(static("trans"), made)
    largest: dict[str, float] = {}

    def watch(name: str) -> None:
        def see(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            largest[name] = float(arguments[0].abs().max())

        modules[name].register_forward_pre_hook(see)

    modules = dict(twin.named_modules(remove_duplicate=False))
    for site in made.sites:
        watch(site.module)
    static_models.logits(twin, inputs())
    for site in made.sites:
        assert site.tensors[0].largest == pytest.approx(largest[site.module], rel=1e-4)
        assert site.tensors[0].clip == pytest.approx(largest[site.module], rel=2e-3)


@pytest.mark.parametrize(("roles", "is_exchanged"), [((Role.LOGITS,), True), ((Role.LOGITS, Role.EMBEDDING), False)])
def test_what_the_head_reads_is_not_exchanged_where_the_graph_gives_it(
    roles: tuple[Role, ...], is_exchanged: bool
) -> None:
    model = copy.copy(static_models.small_model("hybrid"))
    model.outputs = chosen_outputs(OutputSpec(outputs=roles), static_models.CLASSES, model.stage_shapes)
    graph = export_canonical(rewrite(model, (), ("head",)).model, static_models.IMAGE_SIZE)
    pairs = equalization.find_pairs(graph, sites.find_sites(graph))
    assert ("norm2 -> head" in [pair.name for pair in pairs]) is is_exchanged

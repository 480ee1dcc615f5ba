"""Corrected biases: in eight bits, a layer's mean output is what it was in FP32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from spach_deploy.common.errors import PrecisionError
from spach_deploy.graph.passes.linear_as_matmul import linear_as_matmul
from spach_deploy.quantization.fake_quantization import (
    corrected_bias,
    equalized_model,
    fake_quantized,
    quantized_module,
)
from spach_deploy.quantization.formats import FP8, INT8, EightBitFormat
from spach_deploy.quantization.plan import QuantizationPlan, QuantizedSite, Scaling
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import LayerKind, Selection
from spach_deploy.quantization.statistics import TensorStatistics
from tests import static_models
from tests.protos import (
    Collector,
    candidates,
    consumers,
    correct_biases,
    in_place,
    initializers,
    mark_sites,
    plan_from_statistics,
)
from tests.quantization import faults
from tests.quantization.small_models import canonical, inputs, plan, run, static
from tests.static_models import relative_l2

Float64 = NDArray[np.float64]
both = pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])


def uncorrected(made: QuantizationPlan) -> QuantizationPlan:
    return dataclasses.replace(made, sites=tuple(dataclasses.replace(site, correction=()) for site in made.sites))


def mean_outputs(kind: str, made: QuantizationPlan) -> list[tuple[QuantizedSite, Float64]]:
    """Of every layer, alone in eight bits on its exact inputs: by how much its channels' mean outputs move."""
    model = equalized_model(static(kind), made)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[tuple[QuantizedSite, Float64]] = []

    def watch(site: QuantizedSite) -> None:
        quantized = quantized_module(modules[site.module], site, made.form)

        def see(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            axis = 1 if site.kind is LayerKind.TOKEN_LINEAR else -1
            exact, moved = (
                torch.movedim(value, axis, -1).reshape(-1, value.shape[axis]).double().mean(dim=0).numpy()
                for value in (output, quantized(arguments[0]))
            )
            found.append((site, moved - exact))

        modules[site.module].register_forward_hook(see)

    for site in made.sites:
        watch(site)
    static_models.logits(model, inputs())
    return found


def plan_from_all_rows(kind: str, form: EightBitFormat, monkeypatch: pytest.MonkeyPatch) -> QuantizationPlan:
    """A plan whose sample of rows is all there are, so that nothing is left to chance."""

    def keep(statistics: TensorStatistics, rows: NDArray[np.float32]) -> None:
        statistics.sample = np.concatenate([statistics.rows, rows])
        statistics.stamps = np.ones(len(statistics.sample), np.int64)

    monkeypatch.setattr(TensorStatistics, "_sample", keep)
    model, scaling = canonical(kind), Scaling(form, Method.MAX, half=False)
    chosen = candidates(model, Selection(), scaling)
    collector = Collector(model, chosen.wanted, histograms=False, threads=1)
    collector.run({"input": inputs()})
    return plan_from_statistics(model, chosen, collector.statistics, scaling)


@pytest.mark.parametrize("kind", ["conv", "trans", "mlp_shared", "hybrid"])
@both
def test_mean_outputs_are_those_of_fp32_to_a_few_percent_of_the_shift(
    kind: str, form: EightBitFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_from_all_rows(kind, form, monkeypatch)
    shifts = zip(mean_outputs(kind, uncorrected(made)), mean_outputs(kind, made), strict=True)
    for (site, before), (same, after) in shifts:
        assert same.module == site.module
        assert np.linalg.norm(after) < 0.03 * np.linalg.norm(before), site.module


@pytest.mark.parametrize("kind", ["conv", "hybrid_stem"])
@both
def test_logits_of_other_images_gain_by_it(kind: str, form: EightBitFormat) -> None:
    made, others = plan(kind, form, half=False), inputs(32, 20)
    reference = static_models.logits(static(kind), others)
    with_it, without = (
        relative_l2(static_models.logits(fake_quantized(static(kind), entry), others), reference)
        for entry in (made, uncorrected(made))
    )
    assert with_it < 0.95 * without


# In the graph


def test_every_corrected_layer_gets_a_bias_of_its_own() -> None:
    model, made = canonical("mlp_shared"), plan("mlp_shared", INT8)
    before = {name: faults.values(model, name) for name in initializers(model.graph) if name.endswith(".bias")}
    assert correct_biases(model, made)
    constants, read = initializers(model.graph), consumers(model.graph)
    for site in made.sites:
        (reader,) = read[corrected_bias(site)]
        module = site.module.replace("blocks.1.spatial_func", "blocks.0.spatial_func")
        module = module.replace("blocks.2.spatial_func", "blocks.0.spatial_func")
        added = faults.values(model, corrected_bias(site)) - before[f"{module}.bias"]
        assert np.allclose(added.reshape(-1), site.correction, atol=1e-6)
        assert reader.op_type == ("Add" if site.kind is LayerKind.TOKEN_LINEAR else "Gemm")
    assert not any(name.endswith("channel_func.fc1.bias") for name in constants)  # nobody reads it any more


def test_a_corrected_graph_computes_what_it_did_but_for_the_shift() -> None:
    model, made = canonical("trans"), plan("trans", INT8, equalize=False)
    before = run(model, inputs())
    correct_biases(model, made)
    assert 0 < relative_l2(run(model, inputs()), before) < 0.05


def test_a_layer_without_a_bias_gets_one() -> None:
    model, made = canonical("trans"), plan("trans", INT8)
    del next(node for node in model.graph.node if node.name == made.sites[0].node).input[2]
    correct_biases(model, made)
    gemm = next(node for node in model.graph.node if node.name == made.sites[0].node)
    assert gemm.input[2] == corrected_bias(made.sites[0])
    assert np.allclose(faults.values(model, gemm.input[2]), made.sites[0].correction)


def test_a_planned_node_that_is_not_there_is_refused() -> None:
    made = plan("trans", INT8)
    sites = (dataclasses.replace(made.sites[0], node="nowhere/Gemm"), *made.sites[1:])
    with pytest.raises(PrecisionError, match="has no node nowhere/Gemm"):
        correct_biases(canonical("trans"), dataclasses.replace(made, sites=sites))


def test_a_product_over_tokens_without_a_bias_is_refused() -> None:
    model, made = canonical("mlp"), plan("mlp", INT8)
    token = next(site for site in made.sites if site.kind is LayerKind.TOKEN_LINEAR)
    product = next(node for node in model.graph.node if node.name == token.node)
    next(node for node in model.graph.node if product.output[0] in node.input).op_type = "Mul"
    with pytest.raises(PrecisionError, match=f"{token.module} has no bias to correct"):
        correct_biases(model, made)


def test_a_layer_without_a_bias_gets_one_in_the_form_for_cpus_too() -> None:
    model, made = canonical("trans"), plan("trans", INT8)
    site = next(site for site in made.sites if site.module.endswith("fc2"))
    del next(node for node in model.graph.node if node.name == site.node).input[2]
    before = run(model, inputs())
    mark_sites(model, made)
    in_place(linear_as_matmul, model)
    assert relative_l2(run(model, inputs()), before) < 2e-6
    correct_biases(model, made)
    (add,) = consumers(model.graph)[f"{site.node}/product"]
    assert add.op_type == "Add"
    assert np.allclose(faults.values(model, add.input[1]), site.correction)

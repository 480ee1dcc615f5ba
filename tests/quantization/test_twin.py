"""The same plan in PyTorch and in ONNX Runtime: one computation, whatever is quantized."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spach_deploy.blocks import rewrite
from spach_deploy.common.errors import BundleError
from spach_deploy.graph.editing import QUANTIZED_KEY
from spach_deploy.graph.passes.shift_depthwise import shift_depthwise
from spach_deploy.options.specs import Precision
from spach_deploy.quantization.fake_quantization import fake_quantized, rounding
from spach_deploy.quantization.formats import FP8, INT8, EightBitFormat
from spach_deploy.quantization.scales import store
from tests import static_models
from tests.protos import in_place
from tests.quantization.small_models import KINDS, canonical, inputs, plan, quantized, run, static
from tests.static_models import relative_l2

Float32 = NDArray[np.float32]

ROUNDOFF = 1e-5
"""Relative L2 of one image without a flip: that of FP32 sums in another order."""

IMAGES, FIRST = 16, 3
EVERYTHING = ("*",)

both = pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])


def compared(
    kind: str, form: EightBitFormat, quantize: tuple[str, ...] = (), **options: Any
) -> tuple[Float32, float, float]:
    """Of each image, and of all, how far the twin is from the graph; and how far the graph is from FP32."""
    images = inputs(IMAGES, FIRST)
    graph = run(quantized(kind, form, quantize, **options), images)
    made = plan(kind, form, quantize, half=False, **options)
    twin = static_models.logits(fake_quantized(static(kind, quantize), made), images)
    reference = static_models.logits(static(kind, quantize), images)
    apart = np.array([relative_l2(*pair) for pair in zip(twin, graph, strict=True)])
    return apart, relative_l2(twin, graph), relative_l2(graph, reference)


def check_same(apart: Float32, whole: float, loss: float) -> None:
    """Most images agree to FP32's rounding.

    In some a number stands so close to a tie that it falls to the other side; all that follows then rounds on its own,
    and such an image is as far off as eight bits are.
    """
    assert loss > 1e-3
    assert np.median(apart) <= ROUNDOFF
    assert whole < loss / 2


@pytest.mark.parametrize("kind", KINDS)
@both
def test_the_twin_computes_what_the_graph_computes(kind: str, form: EightBitFormat) -> None:
    check_same(*compared(kind, form))


@pytest.mark.parametrize("kind", ["trans", "hybrid"])
@both
def test_with_attention_and_head_in_eight_bits(kind: str, form: EightBitFormat) -> None:
    check_same(*compared(kind, form, ("head", "*.spatial_func")))


@pytest.mark.parametrize("kind", ["trans", "ms_mlp"])
def test_with_every_site_in_int8_depthwise_among_them(kind: str) -> None:
    check_same(*compared(kind, INT8, EVERYTHING))


def test_with_a_convolutional_stem_in_int8() -> None:
    """It rounds 200,000 numbers an image, so some fall to the other side in every image."""
    _, whole, loss = compared("hybrid_stem", INT8, ("stem.proj.*",))
    assert whole < loss / 2


@both
def test_with_one_weight_scale_a_layer_and_without_equalization(form: EightBitFormat) -> None:
    modules = frozenset({"blocks.0.channel_func.fc1", "blocks.1.spatial_func.qkv"})
    check_same(*compared("trans", form, per_tensor=modules, equalize=False))


def test_the_bug_that_an_attention_hides_its_projection_would_be_seen() -> None:
    made = plan("trans", INT8, ("*.spatial_func",), half=False)
    forgotten = tuple(site for site in made.sites if not site.module.endswith(".proj"))
    twin = fake_quantized(static("trans"), dataclasses.replace(made, sites=forgotten))
    graph = run(quantized("trans", INT8, ("*.spatial_func",)), inputs(IMAGES, FIRST))
    assert relative_l2(static_models.logits(twin, inputs(IMAGES, FIRST)), graph) > 100 * ROUNDOFF


@pytest.mark.parametrize("rest", [Precision.FP16, Precision.BF16])
def test_a_twin_of_a_half_graph_is_as_near_as_half_is(rest: Precision) -> None:
    from tests.protos import rounded_graph

    images = inputs(IMAGES, FIRST)
    graph = run(rounded_graph(quantized("trans", INT8, rest=rest)), images)
    twin = static_models.logits(fake_quantized(static("trans"), plan("trans", INT8)), images)
    reference = static_models.logits(static("trans"), images)
    assert relative_l2(twin, graph) < (0.75 if rest is Precision.FP16 else 1.5) * relative_l2(graph, reference)


# Quantized depthwise convolutions


def test_the_residual_is_not_folded_into_a_kernel_that_is_quantized() -> None:
    result = rewrite(static_models.small_model("trans"), (), ("blocks.1.cpe_net.net.1",))
    outcome = result.outcomes["fold_residual"]
    assert [change.module for change in outcome.changes] == ["blocks.0.cpe_net", "blocks.2.cpe_net"]
    assert outcome.skipped == ("blocks.1.cpe_net: its kernel is quantized, and the identity would be rounded with it",)
    assert (
        relative_l2(static_models.logits(result.model, inputs()), static_models.logits(static("trans"), inputs()))
        < 1e-6
    )


def test_a_quantized_depthwise_convolution_is_not_shifted() -> None:
    model = canonical("trans", EVERYTHING)
    marked = next(node for node in model.graph.node if node.name.startswith("blocks.1.cpe_net.net.1"))
    marked.metadata_props.add(key=QUANTIZED_KEY, value="yes")
    changed = in_place(shift_depthwise, model)
    assert any(name.startswith("blocks.0.cpe_net.net.1") for name in changed)
    assert not any(name.startswith("blocks.1.cpe_net.net.1") for name in changed)
    assert marked.name in {node.name for node in model.graph.node if node.op_type == "Conv"}


def test_folding_the_residual_first_would_cost_more() -> None:
    """Why the rewrite is held back: the identity beside small weights leaves them a few of the 255 steps."""
    folded, kept = (
        dict(model.named_modules())["blocks.0.cpe_net.net.1"].weight
        for model in (static("trans"), static("trans", EVERYTHING))
    )
    steps = [float((weight.detach().abs().amax(dim=(1, 2, 3)) / 127).mean()) for weight in (folded, kept)]
    assert steps[0] > 1.5 * steps[1]


# Its own rounding


@both
@pytest.mark.parametrize("scale", [1.0, 0.0123, 3.7e-4])
def test_rounding_is_storing(form: EightBitFormat, scale: float) -> None:
    values = np.random.default_rng(0).standard_normal(20_000).astype(np.float32) * np.float32(form.limit * scale / 2)
    found = rounding(scale, form)(torch.from_numpy(values)).numpy()
    different = found != store(values, scale, form)
    assert different.mean() < 1e-3  # ties, which a product with 1 / scale does not find
    assert np.abs(found - values).max() <= np.abs(store(values, scale, form) - values).max() * (1 + 1e-5)


def test_the_original_is_left_alone() -> None:
    before = static_models.logits(static("mlp_shared"), inputs())
    fake_quantized(static("mlp_shared"), plan("mlp_shared", INT8))
    assert np.array_equal(static_models.logits(static("mlp_shared"), inputs()), before)


# Records of other models


def test_a_record_of_another_model_is_refused() -> None:
    with pytest.raises(BundleError, match=r"which this model does not have|does not fit this model"):
        fake_quantized(static("hybrid"), plan("trans", INT8))


@pytest.mark.parametrize(
    "change",
    [
        {"weight_scales": (0.1, 0.2)},
        {"weight_scales": (0.1, 0.2), "correction": (0.0, 0.0)},
        {"correction": (0.0,) * 5},
        {"module": "blocks.0.norm1"},
        {"module": "blocks.0.spatial_func"},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_record_whose_numbers_do_not_fit_is_refused(change: dict[str, Any]) -> None:
    made = plan("trans", INT8)
    sites = (dataclasses.replace(made.sites[0], **change), *made.sites[1:])
    with pytest.raises(BundleError, match="does not fit this model"):
        fake_quantized(static("trans"), dataclasses.replace(made, sites=sites))


def test_an_attention_that_is_none_is_refused() -> None:
    made = plan("trans", INT8, ("*.spatial_func",))
    sites = tuple(
        dataclasses.replace(site, module="blocks.0.channel_func") if site.module == "blocks.0.spatial_func" else site
        for site in made.sites
    )
    with pytest.raises(BundleError, match="does not fit this model"):
        fake_quantized(static("trans"), dataclasses.replace(made, sites=sites))


def test_factors_of_another_width_are_refused() -> None:
    made = plan("trans", INT8)
    pairs = tuple(dataclasses.replace(pair, alpha=0.5, factors=(1.0, 2.0)) for pair in made.equalized)
    with pytest.raises(BundleError, match="does not fit this model"):
        fake_quantized(static("trans"), dataclasses.replace(made, equalized=pairs))

"""The record of a quantization: scales, reasons, and a file that is read back or refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spach_deploy.common.errors import BundleError
from spach_deploy.quantization.formats import FP8, INT8, EightBitFormat
from spach_deploy.quantization.plan import QuantizationPlan, Scaling, make_plan, read_plan, write_plan
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import LayerKind, Site
from spach_deploy.quantization.statistics import TensorStatistics
from tests.protos import find_sites
from tests.quantization.small_models import KINDS, canonical, plan, statistics

both = pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])
ATTENTION = "blocks.1.spatial_func"


def everything(form: EightBitFormat) -> QuantizationPlan:
    return plan("trans", form, ("*",) if form is INT8 else ("head", "*spatial_func"))


# Scales


@pytest.mark.parametrize("kind", KINDS)
@both
def test_every_site_is_in_the_plan_once_quantized_or_with_a_reason(kind: str, form: EightBitFormat) -> None:
    made = plan(kind, form)
    found = [*(site.node for site in made.sites), *(kept.node for kept in made.kept)]
    assert sorted(found) == sorted(site.node for site in find_sites(canonical(kind)))
    assert all(kept.reason for kept in made.kept)
    assert 0.01 < made.macs_share < 1
    assert set(made.product_nodes) == {site.node for site in made.sites}


@both
@pytest.mark.parametrize("half", [True, False])
def test_scales_hold_what_was_seen_and_are_numbers_of_their_type(form: EightBitFormat, half: bool) -> None:
    made = plan("hybrid", form, half=half)
    number = np.float16 if half else np.float32
    for site in made.sites:
        (tensor,) = site.tensors
        seen = statistics("hybrid")[tensor.tensor]
        assert float(number(tensor.scale)) == tensor.scale
        assert tensor.clip == tensor.scale * form.limit
        assert tensor.clip == pytest.approx(tensor.largest, rel=1e-3)
        assert tensor.largest > 0
        if all(pair.site != site.module for pair in made.equalized if pair.alpha is not None):
            assert tensor.largest == pytest.approx(seen.max_abs.max())
        assert len(site.weight_scales) == len(site.correction)
        assert site.per_channel


def test_per_tensor_layers_have_one_weight_scale_the_largest() -> None:
    module = "blocks.0.channel_func.fc2"
    by_channel = {site.module: site for site in plan("trans", INT8, equalize=False).sites}
    made = {site.module: site for site in plan("trans", INT8, equalize=False, per_tensor=frozenset({module})).sites}
    assert made[module].weight_scales == (max(by_channel[module].weight_scales),)
    assert not made[module].per_channel
    assert len(made[module].correction) == len(by_channel[module].correction)
    others = [name for name in made if name != module]
    assert all(made[name] == by_channel[name] for name in others)


def test_an_attention_has_four_scales_and_no_weights() -> None:
    site = next(site for site in everything(INT8).sites if site.module == ATTENTION)
    assert site.kind is LayerKind.ATTENTION
    assert len(site.tensors) == 4
    assert (site.weight, site.weight_scales, site.correction) == ("", (), ())
    assert site.tensors[2].largest <= 1  # a softmax's result
    assert site.node not in everything(INT8).product_nodes
    assert {f"{ATTENTION}/MatMul", f"{ATTENTION}/MatMul_2"} <= set(everything(INT8).product_nodes)


def test_depthwise_convolutions_are_not_corrected() -> None:
    for site in everything(INT8).sites:
        if site.kind is LayerKind.DEPTHWISE:
            assert site.correction == ()
            assert len(site.weight_scales) == 16


@pytest.mark.parametrize("method", [Method.PERCENTILE, Method.ENTROPY, Method.MSE])
def test_other_methods_clip_and_never_beyond_what_was_seen(method: Method) -> None:
    made = plan("trans", INT8, method=method)
    assert made.method is method
    assert all(0 < site.tensors[0].clip <= site.tensors[0].largest * (1 + 2**-10) for site in made.sites)
    clips = [site.tensors[0].clip < 0.99 * site.tensors[0].largest for site in made.sites]
    assert any(clips) == (method is Method.ENTROPY)  # there is nothing to clip here but for entropy


# Numbers too small, or none


def one_layer(rows: float, weights: float, *, half: bool) -> QuantizationPlan:
    """A plan for one layer whose inputs reach `rows` and weights `weights`."""
    generator = np.random.default_rng(0)
    seen = TensorStatistics.empty(8, histogram=False)
    seen.see(generator.uniform(-rows, rows, (64, 8)).astype(np.float32))
    weight = generator.uniform(-weights, weights, (4, 8)).astype(np.float32)
    site = Site("fc1", "fc1/Gemm", LayerKind.LINEAR, "x", 0, "w", -1, 64)
    return make_plan([site], {site.node: ""}, {"x": seen}, {"w": weight}, [], Scaling(INT8, Method.MAX, half=half))


@pytest.mark.parametrize(("rows", "weights"), [(1e-5, 1.0), (1.0, 1e-5)])
def test_scales_too_small_for_fp16_keep_a_layer_in_float_and_say_so(rows: float, weights: float) -> None:
    made = one_layer(rows, weights, half=True)
    assert made.sites == ()
    assert [kept.reason for kept in made.kept] == ["scale: too small for FP16"]
    assert len(one_layer(rows, weights, half=False).sites) == 1


def test_a_layer_that_sees_only_zeros_has_scales_all_the_same() -> None:
    made = one_layer(0.0, 1.0, half=True)
    assert made.sites[0].tensors[0].scale == 1.0
    assert made.sites[0].tensors[0].largest == 0.0
    assert set(made.sites[0].correction) == {0.0}


def test_an_output_channel_of_zeros_has_scale_one() -> None:
    assert set(one_layer(1.0, 0.0, half=True).sites[0].weight_scales) == {1.0}


# The file


RECORDS = {
    "int8": lambda: everything(INT8),
    "fp8": lambda: everything(FP8),
    "token linear": lambda: plan("mlp_shared", INT8),
    "per tensor": lambda: plan("trans", INT8, per_tensor=frozenset({"blocks.0.channel_func.fc2"})),
}


@pytest.mark.parametrize("made", RECORDS.values(), ids=RECORDS)
def test_a_record_is_read_as_it_was_written(made: Callable[[], QuantizationPlan], tmp_path: Path) -> None:
    path, record = tmp_path / "quantization.json", made()
    write_plan(record, path)
    assert read_plan(path) == record
    assert len(path.read_text().splitlines()) > len(record.sites)  # a layer a line


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path: Path) -> None:
    for content in (None, "", "{", "\x00", "[" * 100_000):
        path = tmp_path / "quantization.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(BundleError, match=r"quantization\.json cannot be read"):
            read_plan(path)


def _site(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["sites"][0]
    return found


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        _site(content)[key] = value

    return change


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another schema": lambda content: content.update(schema=2),
    "no schema": lambda content: content.pop("schema"),
    "another format": lambda content: content.update(format="int4"),
    "another method": lambda content: content.update(method="guess"),
    "sites that are none": lambda content: content.update(sites=[1, 2]),
    "a site without scales": lambda content: _site(content).pop("weight_scales"),
    "a site with too much": _set("colour", "blue"),
    "a kind that is none": _set("kind", "pooling"),
    "a weight scale that is no number": _set("weight_scales", ["wide"]),
    "a linear layer without weight scales": _set("weight_scales", []),
    "a correction that is no number": _set("correction", [None]),
    "corrections for other channels": _set("correction", [0.1, 0.2]),
    "no tensors": _set("tensors", []),
    "an activation's scale that is no number": lambda content: _site(content)["tensors"][0].update(scale="wide"),
    "an activation's scale that is null": lambda content: _site(content)["tensors"][0].update(scale=None),
    "an activation without a clip": lambda content: _site(content)["tensors"][0].pop("clip"),
    "an attention of three tensors": _set("kind", "attention"),
    "products of a linear layer": _set("products", ["blocks.0/MatMul"]),
    "a module that is no name": _set("module", 7),
    "multiplications that are no number": _set("macs", "many"),
    "a kept layer without a reason": lambda content: content["kept_float"][0].pop("reason"),
    "an equalized pair without factors": lambda content: content["equalization"][0].pop("factors"),
    "factors that are no numbers": lambda content: content["equalization"][0].update(factors=["x"]),
    "an alpha that is no number": lambda content: content["equalization"][0].update(alpha="high"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_records_are_refused(damage: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    content = copy.deepcopy(plan("trans", INT8).to_dict())
    damage(content)
    path = tmp_path / "quantization.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError) as caught:
        read_plan(path)
    assert f"{path} is no record of a quantization" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("content", [None, [], "text", 3, {}])
def test_json_of_another_kind_is_refused(content: Any) -> None:
    with pytest.raises(BundleError, match="here is no record of a quantization"):
        QuantizationPlan.from_dict(content, "here")

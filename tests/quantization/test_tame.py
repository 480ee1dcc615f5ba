"""Outliers that FP16 cannot hold are exchanged away, exactly, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from spach_deploy.blocks import rewrite
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import TENSORRT_PASSES, apply_passes
from spach_deploy.graph.precision.decision import TypingOptions
from spach_deploy.graph.precision.formats import BF16, FP16
from spach_deploy.graph.precision.ranges import Ranges
from spach_deploy.options.specs import Precision
from tests import static_models
from tests.graph.precision.graphs import kept_for
from tests.protos import in_place, initializers, measure_ranges, migrate_outliers, open_session, type_graph
from tests.quantization import small_models

MARGIN = TypingOptions().margin


def ranges_of(model: ModelProto) -> Ranges:
    return measure_ranges(model, [{"input": small_models.inputs()}], threads=1)


def scale(model: ModelProto, name: str, factor: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    tensor = initializers(model.graph)[name]
    value = (numpy_helper.to_array(tensor) * factor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value, name))


def loud() -> ModelProto:
    """A LayerNorm with three channels 2^16 times as large, which fc1 undoes: the same function."""
    model = small_models.canonical("hybrid")
    known = initializers(model.graph)
    name = next(name for name in known if name.endswith("norm2.weight") and name != "norm2.weight")
    block = name.removesuffix(".norm2.weight")
    factors = np.ones(known[name].dims[0])
    factors[[1, 5, 7]] = 2.0**16
    scale(model, name, factors)
    scale(model, f"{block}.norm2.bias", factors)
    scale(model, f"{block}.channel_func.fc1.weight", 1 / factors)
    return model


def logits(model: ModelProto) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    result: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = open_session(model).run(
        None, {"input": small_models.inputs()}
    )[0]
    return result


def test_the_outliers_go_and_the_function_stays() -> None:
    model = loud()
    before = logits(model)
    assert len(migrate_outliers(model, ranges_of(model), FP16, MARGIN)) == 1
    assert np.linalg.norm(logits(model) - before) <= 1e-6 * np.linalg.norm(before)


def test_no_layer_has_to_stay_in_fp32_then() -> None:
    model = loud()
    kept = kept_for(type_graph(model, Precision.FP16, ranges_of(model)), "range")
    assert kept
    migrate_outliers(model, ranges_of(model), FP16, MARGIN)
    assert kept_for(type_graph(model, Precision.FP16, ranges_of(model)), "range") == ()


@pytest.mark.parametrize("pair", ["norm1 -> qkv", "qkv -> proj"])
def test_an_attention_in_its_targets_form_is_tamed_too(pair: str) -> None:
    model = loud_attention(pair)
    in_place(apply_passes, model, TENSORRT_PASSES)
    assert any(node.name.endswith("qkv/query") for node in model.graph.node)
    before = logits(model)
    kept = kept_for(type_graph(model, Precision.FP16, ranges_of(model)), "range")
    assert kept
    (tamed,) = migrate_outliers(model, ranges_of(model), FP16, MARGIN)
    assert [name.rpartition(".")[2] for name in tamed.split(" -> ")] == pair.split(" -> ")
    assert np.linalg.norm(logits(model) - before) <= 1e-5 * np.linalg.norm(before)
    assert kept_for(type_graph(model, Precision.FP16, ranges_of(model)), "range") == ()


def loud_attention(pair: str) -> ModelProto:
    """Three channels of an attention's input, or of its values, 2^20 times as large, which the next weights undo."""
    result = rewrite(static_models.small_model("hybrid"))
    model, path = as_proto(export_canonical(result.model, static_models.IMAGE_SIZE)), "layer3.2"
    channels = initializers(model.graph)[f"{path}.norm1.weight"].dims[0]
    factors = np.ones(channels)
    factors[[1, 5, 7]] = 2.0**20
    if pair == "norm1 -> qkv":
        scale(model, f"{path}.norm1.weight", factors)
        scale(model, f"{path}.norm1.bias", factors)
        scale(model, f"{path}.spatial_func.qkv.weight", 1 / factors)
    else:
        rows = np.concatenate([np.ones(2 * channels), factors])
        scale(model, f"{path}.spatial_func.qkv.weight", rows[:, None])
        scale(model, f"{path}.spatial_func.proj.weight", 1 / factors)
    return model


@pytest.mark.parametrize("kind", ["conv", "trans", "hybrid"])
def test_ordinary_models_are_left_alone(kind: str) -> None:
    model = small_models.canonical(kind)
    assert migrate_outliers(model, ranges_of(model), FP16, MARGIN) == ()
    assert model == small_models.canonical(kind)


def test_what_bfloat16_holds_is_left_alone() -> None:
    model = loud()
    assert migrate_outliers(model, ranges_of(model), BF16, MARGIN) == ()

"""The part of a model that is traced: had before the model is rewritten, and taken only where it is the same one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from spach_deploy.graph import export
from spach_deploy.graph.block_prototype import make_prototype, prototype_of, structure, without_weights
from spach_deploy.graph.editing import as_proto, data_of
from spach_deploy.graph.export import export_canonical, trace
from spach_deploy.rewrites import REWRITES, rewrite
from tests.static_models import CONFIGS, IMAGE_SIZE, small_model

DISABLED = ((), *((step.name,) for step in REWRITES), ("shift_depthwise",), ("tokens_first",))
ONE_OF_A_KIND = ("layer3.2.cpe_net.net.1",)
"""A pattern that tells the second of three equal blocks apart."""


def test_one_block_of_each_kind_is_traced() -> None:
    prototype = make_prototype(rewrite(small_model("hybrid")).model)
    assert prototype.repeats["layer3.1"] == ("layer3.1", "layer3.2", "layer3.3")
    assert prototype.repeats["layer2.1"] == ("layer2.1",)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("quantized", [None, (), ("*.cpe_net.net.1",)])
def test_it_follows_from_the_reference_alone(kind: str, quantized: tuple[str, ...] | None) -> None:
    model = small_model(kind)
    for disabled in DISABLED:
        rewritten = make_prototype(rewrite(model, disabled, quantized).model)
        assert structure(prototype_of(model, disabled, quantized)) == structure(rewritten), disabled


@pytest.mark.parametrize("kind", ["hybrid_stem", "ms_mlp", "trans"])
def test_what_is_traced_ahead_gives_the_very_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(kind)
    static = rewrite(model).model
    traced = trace(without_weights(prototype_of(model)), IMAGE_SIZE)
    whole = export_canonical(static, IMAGE_SIZE)
    monkeypatch.setattr(export, "trace", None)  # nothing is traced any more
    assert as_proto(export_canonical(static, IMAGE_SIZE, traced)) == as_proto(whole)


def test_what_is_sent_holds_no_weights_of_blocks() -> None:
    sent = without_weights(prototype_of(small_model("hybrid"))).model
    assert sent.head.weight.device.type == "cpu"
    assert {tensor.device.type for tensor in sent.get_submodule("layer3.1").parameters()} == {"meta"}
    assert small_model("hybrid").get_parameter("layer3.1.norm2.weight").device.type == "cpu"


def test_weights_of_blocks_do_not_travel() -> None:
    static = rewrite(small_model("hybrid")).model
    traced = ModelProto.FromString(trace(prototype_of(small_model("hybrid")), IMAGE_SIZE).graph)
    kept = {tensor.name for tensor in traced.graph.initializer if tensor.raw_data}
    assert "head.weight" in kept
    assert not any(".channel_func." in name for name in kept)
    named = export_canonical(static, IMAGE_SIZE).graph.initializers
    fc1 = static.get_parameter("layer3.2.channel_func.fc1.weight").detach().numpy()
    assert np.array_equal(data_of(named["layer3.2.channel_func.fc1.weight"]), fc1)


@pytest.mark.parametrize("quantized", [None, ONE_OF_A_KIND])
def test_another_structure_is_traced_anew(quantized: tuple[str, ...] | None) -> None:
    model = small_model("hybrid")
    static = rewrite(model, (), ONE_OF_A_KIND).model
    traced = trace(prototype_of(model, (), quantized), IMAGE_SIZE)
    assert traced.structure != structure(make_prototype(static))
    expected = export_canonical(static, IMAGE_SIZE)
    assert as_proto(export_canonical(static, IMAGE_SIZE, traced)) == as_proto(expected)


CHANGES: dict[str, Callable[[Any], None]] = {
    "shape": lambda block: setattr(block.channel_func.fc1, "bias", None),
    "setting": lambda block: setattr(block.spatial_func, "num_heads", 2),
    "flag": lambda block: setattr(block.cpe_net, "grid_stream", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_structure_tells_blocks_apart(change: str) -> None:
    before, after = (make_prototype(rewrite(small_model("hybrid")).model) for _ in range(2))
    assert structure(before) == structure(after)
    CHANGES[change](after.model.get_submodule("layer3.1"))
    assert structure(before) != structure(after)

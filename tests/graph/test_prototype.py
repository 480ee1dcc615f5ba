"""The part of a model that is traced: one block of each kind."""

from __future__ import annotations

from spach_deploy.blocks import rewrite
from spach_deploy.graph.block_prototype import make_prototype
from tests.static_models import small_model

ONE_OF_A_KIND = ("layer3.2.cpe_net.net.1",)
"""A pattern that tells the second of three equal blocks apart."""


def test_one_block_of_each_kind_is_traced() -> None:
    prototype = make_prototype(rewrite(small_model("hybrid")).model)
    assert prototype.repeats["layer3.1"] == ("layer3.1", "layer3.2", "layer3.3")
    assert prototype.repeats["layer2.1"] == ("layer2.1",)


def test_a_block_that_is_quantized_against_the_rules_is_of_another_kind() -> None:
    prototype = make_prototype(rewrite(small_model("hybrid"), (), ONE_OF_A_KIND).model)
    repeats = {first: blocks for first, blocks in prototype.repeats.items() if first.startswith("layer3.")}
    assert repeats == {name: (name,) for name in ("layer3.1", "layer3.2", "layer3.3")}

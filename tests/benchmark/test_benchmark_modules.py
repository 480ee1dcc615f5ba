from __future__ import annotations

import pytest

from spach_deploy.benchmark.layers import ADDED, by_module, module_of, owners_of
from spach_deploy.bundle.store import GRAPH
from tests import small_bundles

OWNERS = frozenset({"model", "stem.proj", "layer1.1", "layer1.1.fc1", "layer1.10.fc1", "layer1.1.norm", "head", "fc1"})


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        ("layer1.1.fc1/Gemm", "layer1.1.fc1"),
        ("layer1.10.fc1/Gemm_2", "layer1.10.fc1"),
        ("InsertedPrecisionFreeCast_stem.proj/Conv_nchwc", "stem.proj"),
        ("layer1.1.norm/Mul + PWN(layer1.1.fc1/Gelu)", "layer1.1"),
        ("[ONNX Layer: layer1.1.norm/Add][ONNX Layer: head/Gemm]", "model"),
        ("model/ReduceMean", "model"),
        ("fc1/Gemm", "fc1"),
        ("layer9.fc1/Gemm", None),
        ("__myl_FcAdd_myl0_12", None),
        ("Reorder_token_3", None),
    ],
)
def test_a_layer_is_told_by_its_module(layer: str, module: str | None) -> None:
    assert module_of(layer, OWNERS) == module


def test_times_are_summed_and_nothing_is_lost() -> None:
    found = by_module({"head/Gemm": 1.0, "head/Cast": 2.0, "Reorder": 0.5, "stem.proj/Conv": 5.0}, OWNERS)
    assert list(found.items()) == [("stem.proj", 5.0), ("head", 3.0), (ADDED, 0.5)]


def test_owners_are_the_models_modules() -> None:
    assert {"stem.proj", "head"} <= owners_of(small_bundles.bundle() / GRAPH)

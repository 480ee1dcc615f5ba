"""Arithmetic on configurations agrees with the published tensors and with the modules themselves."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spach_deploy.common.errors import ModelError
from spach_deploy.models import Spach, create_model
from spach_deploy.models.published import CONFIGS
from spach_deploy.models.shapes import count_macs, count_parameters, shared_groups, state_shapes
from tests.models.golden_reference import golden_models

# Giga multiply-adds and million parameters, as published.
PUBLISHED = {
    "ms_conv_xxs": (0.7, 5),
    "ms_trans_xxs": (0.5, 2),
    "ms_mlp_xxs": (0.9, 6),
    "ms_conv_s": (7.2, 44),
    "ms_trans_s": (7.6, 40),
    "ms_mlp_s": (8.2, 46),
    "ms_hybrid_s": (11.2, 63),
    "ms_hybrid_s+": (12.3, 63),
}


def meta_model(name: str, image_size: int = 224, num_classes: int = 1000) -> Spach:
    with torch.device("meta"):
        return create_model(name, image_size=image_size, num_classes=num_classes)


def shapes_of(model: Spach) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_are_the_published_ones(name: str) -> None:
    golden = {key: tuple(shape) for key, shape in golden_models()[name]["state_dict"].items()}
    model = meta_model(name)
    assert shapes_of(model) == golden
    assert state_shapes(CONFIGS[name]) == golden
    assert list(state_shapes(CONFIGS[name])) == list(model.state_dict())
    expected = golden_models()[name]["parameters"]
    assert count_parameters(CONFIGS[name]) == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_golden_tables_are_of_these_models() -> None:
    assert list(golden_models()) == list(CONFIGS)


@pytest.mark.parametrize("name", ["conv_xxs", "ms_mlp_xxs", "ms_trans_xs", "ms_hybrid_xs+", "mlp_s_shared"])
def test_other_sizes_and_classes_agree_with_the_modules(name: str) -> None:
    model = meta_model(name, image_size=256, num_classes=10)
    assert state_shapes(CONFIGS[name], 256, 10) == shapes_of(model)
    assert count_parameters(CONFIGS[name], 256, 10) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 224) for name in CONFIGS), ("ms_mlp_xxs", 256), ("ms_hybrid_xs+", 256)]
)
def test_macs_are_those_of_the_modules(name: str, size: int) -> None:
    """PyTorch's counter sees each product and convolution of a forward pass, two per multiply-add."""
    model = meta_model(name, image_size=size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    assert 2 * count_macs(CONFIGS[name], size) == counter.get_total_flops()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    """Half a unit of the last digit, and 2 % for what published figures count beside matrices."""
    giga, million = PUBLISHED[name]
    assert abs(count_macs(CONFIGS[name]) / 1e9 - giga) <= 0.05 + 0.02 * giga
    assert abs(count_parameters(CONFIGS[name]) / 1e6 - million) < 1


@pytest.mark.parametrize("name", ["mlp_s_shared", "ms_mlp_s_shared"])
def test_shared_groups_are_the_module_s_shared_tensors(name: str) -> None:
    state = meta_model(name).state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for key, tensor in state.items():
        groups.setdefault(id(tensor), []).append(key)
    assert sorted(shared_groups(CONFIGS[name])) == sorted(group for group in groups.values() if len(group) > 1)


@pytest.mark.parametrize(
    ("name", "size", "hint"),
    [
        ("ms_hybrid_s", 225, "Take 224 or 256"),
        ("trans_xxs", 225, "Take 224 or 240"),
        ("ms_hybrid_s", 16, "Take 64"),
        ("ms_hybrid_s", 0, "Take 64 or more"),
        ("ms_hybrid_s", 32, "2 by 2"),
        ("ms_hybrid_s", -32, "Take 64 or more"),
        ("mlp_xxs", 16, "2 by 2"),
        ("ms_mlp_xxs", 32, "Take 64 or more"),
    ],
)
def test_image_sizes_that_do_not_work_are_refused(name: str, size: int, hint: str) -> None:
    with pytest.raises(ModelError, match=hint):
        create_model(name, image_size=size)


@pytest.mark.parametrize("name", ["conv_xxs", "ms_trans_xxs", "mlp_xxs", "ms_mlp_xxs", "ms_hybrid_xs+"])
def test_the_smallest_image_size_works(name: str) -> None:
    size = CONFIGS[name].smallest_image_size
    with torch.no_grad():
        assert create_model(name, image_size=size)(torch.zeros(1, 3, size, size)).shape == (1, 1000)

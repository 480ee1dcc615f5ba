"""The definitions compute what the published implementation computes."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spach_deploy.models.configs import CONFIGS, SpachConfig
from spach_deploy.models.layers import MixingBlock
from spach_deploy.models.spach import Spach
from tests.models.golden_reference import golden_logits, golden_models, reference_input, reference_state_dict


def relative_l2(name: str, config: SpachConfig) -> float:
    """Distance of `config`'s logits from the golden ones of `name`, with the golden weights."""
    state = reference_state_dict(golden_models()[name]["state_dict"])
    with torch.device("meta"):
        model = Spach(config)
    model.to_empty(device="cpu").eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    with torch.no_grad():
        logits = model(torch.from_numpy(reference_input())).numpy()
    golden = golden_logits()[name]
    return float(np.linalg.norm(logits - golden) / np.linalg.norm(golden))


def family(name: str) -> str:
    """`ms_hybrid_s+` -> `ms_hybrid+`."""
    return re.sub(r"_(xxs|xs|s)\b", "", name.replace("_shared", "-shared"))


def test_every_family_has_golden_logits() -> None:
    assert {family(name) for name in CONFIGS} - {family(name) for name in golden_logits()} == {"mlp-shared"}
    assert len(golden_logits()) == 20


@pytest.mark.parametrize("name", golden_logits())
def test_logits_are_the_published_ones(name: str) -> None:
    assert relative_l2(name, CONFIGS[name]) <= 1e-5


@pytest.mark.parametrize(("name", "heads"), [("ms_trans_xxs", 2), ("trans_xxs", 12)])
def test_a_wrong_number_of_heads_is_seen(name: str, heads: int) -> None:
    wrong = dataclasses.replace(CONFIGS[name], num_heads=heads)
    assert relative_l2(name, wrong) > 1e-3


def test_a_depthwise_convolution_in_the_wrong_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def after_mixing(block: MixingBlock, x: Tensor) -> Tensor:
        if block.has_spatial:
            x = x + block.gamma_1 * block.spatial_func(block.norm1(x))
        x = x + block.cpe_net(x)
        y: Tensor = x + block.channel_func(block.norm2(x))
        return y

    monkeypatch.setattr(MixingBlock, "forward", after_mixing)
    assert relative_l2("ms_trans_xxs", CONFIGS["ms_trans_xxs"]) > 1e-3


def test_an_approximate_gelu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: nn.functional.gelu(x, approximate="tanh"))
    assert relative_l2("ms_conv_xxs", CONFIGS["ms_conv_xxs"]) > 1e-5

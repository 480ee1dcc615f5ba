"""Known blocks are found in any model by what they compute, whatever they are called, and proven."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from spach_deploy.blocks.attention import StaticAttention
from spach_deploy.blocks.base import FP64_LIMIT
from spach_deploy.blocks.channel_mlp import StaticChannelMLP
from spach_deploy.blocks.mixing_block import StaticBlock
from spach_deploy.blocks.replace import replace_known
from spach_deploy.blocks.token_mlp import StaticSpatialMLP
from tests.own_models import FunctionalMLP, PackedAttention, PlainNet, TransformerBlock, TwoHeads
from tests.static_models import small_model


def relative_l2(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def replaced(model: nn.Module, *shape: int) -> tuple[nn.Module, dict[str, float]]:
    """The copy with static forms, which computes the same, and the proven error by path."""
    torch.manual_seed(0)
    x = torch.randn(2, *shape)
    before = copy.deepcopy(model.state_dict())
    static, outcome = replace_known(model.eval(), (x,))
    with torch.inference_mode():
        assert relative_l2(static(x), model(x)) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return static, {change.module: change.error for change in outcome.changes}


@pytest.mark.parametrize("kind", ["conv", "trans", "mlp", "hybrid", "hybrid_stem"])
def test_every_block_of_a_spach_is_found_by_structure_alone(kind: str) -> None:
    model = small_model(kind)
    static, errors = replaced(model, 3, *model.architecture.image_size)
    blocks = [f"{stage}.{index}" for stage in model.stage_names for index in range(len(getattr(model, stage)))]
    assert list(errors) == ["stem", *blocks]
    assert max(errors.values()) <= FP64_LIMIT
    assert type(static) is type(model)
    assert any(isinstance(module, StaticBlock) for module in static.modules())


@pytest.mark.parametrize(("heads", "scale"), [(1, None), (4, None), (2, 0.3)])
def test_an_attention_of_another_name_with_any_heads_and_scale(heads: int, scale: float | None) -> None:
    static, errors = replaced(PackedAttention(16, heads, scale), 9, 16)
    assert isinstance(static, StaticAttention)
    assert (static.num_heads, static.scale) == (heads, 4.0**-1 if scale is None and heads == 1 else static.scale)
    assert errors[""] <= FP64_LIMIT


def test_an_mlp_is_over_channels_or_tokens_as_it_computes() -> None:
    assert isinstance(replaced(FunctionalMLP(16, 24), 9, 16)[0], StaticChannelMLP)
    assert isinstance(replaced(FunctionalMLP(16, 24), 3, 3, 16)[0], StaticChannelMLP)

    class OverTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = FunctionalMLP(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x.mT).mT

    class TokenMLP(FunctionalMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mT).mT

    assert isinstance(replaced(TokenMLP(16, 8), 16, 16)[0], StaticSpatialMLP)
    assert list(replaced(OverTokens(), 16, 12)[1]) == ["mlp"]


def test_what_only_looks_like_a_kind_is_left_alone() -> None:
    class Twisted(PackedAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1e-3 * x

    static, errors = replaced(nn.Sequential(Twisted(16, 2), TransformerBlock(16)), 9, 16)
    assert list(errors) == ["1.mix", "1.mlp"]
    assert isinstance(static.get_submodule("0"), Twisted)


def test_a_model_without_known_blocks_stays_as_it_is() -> None:
    assert replaced(PlainNet(), 3, 16, 16)[1] == {}


def test_children_of_a_model_with_several_outputs_are_found() -> None:
    model = TwoHeads().eval()
    static, outcome = replace_known(model, (torch.rand(2, 3, 16, 16),))
    assert [change.module for change in outcome.changes] == [
        f"blocks.{i}.{part}" for i in (0, 1) for part in ("mix", "mlp")
    ]
    x = torch.rand(3, 3, 16, 16)
    with torch.inference_mode():
        assert all(relative_l2(static(x)[name], value) < 1e-5 for name, value in model(x).items())

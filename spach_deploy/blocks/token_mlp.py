"""The MLP over tokens (the spatial MLP of the papers): two linear layers on each channel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spach_deploy.blocks.base import Call
from spach_deploy.blocks.channel_mlp import linear_pair


class TokenLinear(nn.Module):
    """A linear layer over tokens, W x + b with b a column: (B, N, C) -> (B, M, C).

    W x needs no transpose of tokens and channels; nn.Linear needs one before and one after it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = nn.Parameter(linear.bias.detach().reshape(-1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens of each channel."""
        return torch.matmul(self.weight, x) + self.bias


class StaticSpatialMLP(nn.Module):
    """Two linear layers over tokens: (..., C) -> (B, N, C)."""

    def __init__(self, fc1: TokenLinear, act: nn.Module, fc2: TokenLinear, dim: int) -> None:
        super().__init__()
        self.fc1 = fc1
        self.act = act
        self.fc2 = fc2
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens of each channel."""
        x = x.reshape(-1, self.fc1.weight.shape[1], self.dim)
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


def static_forms(module: nn.Module, call: Call) -> Iterator[nn.Module]:
    """Token MLPs that `module` may be, for tokens by channels."""
    pair = linear_pair(module)
    if pair is not None and call.is_tokens and call.input[1] == pair[0].in_features:
        for act in pair[2]:
            yield StaticSpatialMLP(TokenLinear(pair[0]), act, TokenLinear(pair[1]), call.input[2])

"""The MLP over tokens (the spatial MLP of the papers): two linear layers on each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

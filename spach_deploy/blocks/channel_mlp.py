"""The MLP over channels: two linear layers on each token."""

from __future__ import annotations

from torch import Tensor, nn


class StaticChannelMLP(nn.Module):
    """Two linear layers on rows: (..., C) -> (B*N, C)."""

    def __init__(self, fc1: nn.Linear, act: nn.Module, fc2: nn.Linear) -> None:
        super().__init__()
        self.fc1 = fc1
        self.act = act
        self.fc2 = fc2

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels of each token."""
        y: Tensor = self.fc2(self.act(self.fc1(x.reshape(-1, self.fc1.in_features))))
        return y

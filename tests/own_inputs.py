"""Modules with several inputs, for tests, and modules as frameworks wrap and change them."""

# mypy: disable-error-code="no-any-return,operator,no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor, nn

from spach_deploy.models.demo import load_demo_weights
from tests.own_models import PlainNet, TransformerBlock

IMAGE = torch.zeros(1, 3, 32, 32)


def seeded(model: nn.Module) -> nn.Module:
    load_demo_weights(model)
    return model


class Siamese(nn.Module):
    """Two images, through one network, whose layers run twice, and a layer that runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PlainNet(6)
        self.compare = nn.Linear(6, 4)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        one, other = self.net(left), self.net(right)
        return {"difference": self.compare(one - other), "embedding": one}


class Reading(nn.Module):
    """An image, words by number, a mask of booleans, and one number for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.words = nn.Embedding(11, 16)
        self.block = TransformerBlock(16)
        self.head = nn.Linear(16, 5)

    def forward(self, pixels: Tensor, words: Tensor, mask: Tensor, temperature: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([x, self.words(words) * mask.unsqueeze(-1)], 1)
        return self.head(self.block(x).mean(1)) / (0.5 + temperature)


READING = {
    "mask": torch.tensor([[True, True, True, False]]),
    "words": torch.tensor([[1, 5, 7, 0]]),
    "pixels": IMAGE,
    "temperature": torch.full((1, 1), 0.7),
}
"""Example inputs of `Reading`, by name, in another order than those of its forward."""


def reading() -> tuple[nn.Module, dict[str, Tensor]]:
    """A factory that gives example inputs too."""
    return seeded(Reading()), READING


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = PlainNet(3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


class FullyShardedDataParallel(nn.Module):
    """What has the name of PyTorch's class, which needs several processes."""

    def __init__(self) -> None:
        super().__init__()
        self.module = PlainNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


class TrainingLoss(nn.Module):
    """A loss that is None but in training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PlainNet()

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        return {"logits": self.net(x), "loss": None}


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x.mean((2, 3)))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return PlainNet()


def traced() -> nn.Module:
    return torch.jit.trace(PlainNet().eval(), IMAGE)


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(PlainNet().eval(), {nn.Linear})


def parametrized() -> nn.Module:
    model = PlainNet()
    load_demo_weights(model)
    model.head = nn.utils.parametrizations.weight_norm(model.head)
    return model


class CompiledInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(seeded(PlainNet()), backend="eager")
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

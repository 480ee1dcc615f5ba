"""Models as users write them, for tests: other names, other forwards, known blocks within, and none at all."""

# mypy: disable-error-code="no-any-return,operator"

from __future__ import annotations

import contextlib
import threading

import torch
from einops import rearrange
from torch import Tensor, nn


class PackedAttention(nn.Module):
    """Attention as vision transformers have it: other names, `chunk` instead of einops, a dropout."""

    def __init__(self, dim: int, groups: int, scale: float | None = None) -> None:
        super().__init__()
        self.groups = groups
        self.temperature = (dim // groups) ** -0.5 if scale is None else scale
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.groups) for part in self.to_qkv(x).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) * self.temperature, -1)
        return self.out(rearrange(self.drop(weights) @ v, "b h n d -> b n (h d)"))


class FunctionalMLP(nn.Module):
    """Two linear layers with a functional activation between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block, which is no SPACH block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(dim)
        self.mix = PackedAttention(dim, 2)
        self.after = nn.LayerNorm(dim)
        self.mlp = FunctionalMLP(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.before(x))
        return x + self.mlp(self.after(x))


class TwoHeads(nn.Module):
    """Normalization of pixels in front, a class token, and two heads: outputs as a dictionary."""

    def __init__(self, dim: int = 16, depth: int = 2, classes: int = 7) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).reshape(1, 3, 1, 1))
        self.patches = nn.Conv2d(3, dim, 8, 8)
        self.blocks = nn.Sequential(*(TransformerBlock(dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.classes = nn.Linear(dim, classes)
        self.angle = nn.Linear(dim, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.patches((image - self.mean) / 0.25).flatten(2).transpose(1, 2)
        x = self.norm(self.blocks(x)).mean(1)
        return {"classes": self.classes(x), "angle": torch.tanh(self.angle(x))}


class PlainNet(nn.Module):
    """A small convolutional network without a single known block."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.Hardswish(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Growing(PlainNet):
    """A factory that makes a layer more each time; the others have the same weights."""

    made = 0

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        Growing.made += 1
        self.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(Growing.made))


class TwoInputs(nn.Module):
    """An image and a vector: outputs as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.image = PlainNet(6)
        self.vector = nn.Linear(4, 6)

    def forward(self, image: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        joined = self.image(image) + self.vector(vector)
        return joined, joined.softmax(-1)


class Branching(nn.Module):
    """What no tracer can follow: the path depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PlainNet(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        if y.sum() > 0:
            return y
        return -y


class ClassToken(nn.Module):
    """A class token that is expanded to the batch, and attention of PyTorch, which gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.rand(1, 1, 8))
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)
        tokens = tokens + self.mix(tokens, tokens, tokens)[0]
        return self.head(tokens[:, 0] + tokens.mean(1))


class Encoder(nn.Module):
    """PyTorch's own transformer encoder behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        layer = nn.TransformerEncoderLayer(32, 8, 64, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class BatchOfFive(PlainNet):
    """Another path for one size of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y if x.shape[0] == 5 else y


class Looping(PlainNet):
    """Runs its images one by one, in a loop over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        rows = [super(Looping, self).forward(x[index : index + 1])[0] for index in range(x.shape[0])]
        return torch.stack(rows)


class Locked(PlainNet):
    """Holds what cannot be copied, a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x)


class HiddenByTry(PlainNet):
    """A branch on values, hidden from a trace by an `except`."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        with contextlib.suppress(Exception):
            if x.abs().max() > 50:
                found = found * 2
        return found


class HiddenFromExport(PlainNet):
    """A branch on values, which its code leaves out while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        if not torch.compiler.is_compiling() and x.mean().item() > 5:
            found = found * 2
        return found


class Talking(PlainNet):
    """Prints in the factory and in every forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)
        print("made")

    def forward(self, x: Tensor) -> Tensor:
        print("called")
        return super().forward(x)


class Picky(nn.Module):
    """A part that raises in batches of four."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 4:
            raise KeyError("four")
        return x


class RaisesLater(PlainNet):
    """Runs on its example, and raises what no one expects in a batch of the profile."""

    def __init__(self) -> None:
        super().__init__()
        self.picky = Picky()

    def forward(self, x: Tensor) -> Tensor:
        return self.picky(super().forward(x))


class BadExample(PlainNet):
    """Its example inputs raise."""

    @property
    def example_inputs(self) -> Tensor:
        raise OSError("no example")


class Inner(nn.Module):
    """Branches on data in a part, in a helper function."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Sign()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x.mean((2, 3)))


class Sign(nn.Module):
    """See `Inner`."""

    def forward(self, x: Tensor) -> Tensor:
        return -x if _is_positive(x) else x


def _is_positive(x: Tensor) -> bool:
    return bool(x.sum() > 0)

"""The reference: ShiftViT in PyTorch, whose blocks mix tokens by moving a part of the channels to neighbours.

Source: Wang et al., "When Shift Operation Meets Vision Transformer: An Extremely Simple Alternative to Attention
Mechanism", arXiv 2201.10801. Names of modules and attributes are the state-dict keys of the published checkpoints.
Tensors are images (B, C, H, W). Every norm is a GroupNorm of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spach_deploy.bundle.outputs import usual_outputs
from spach_deploy.models.outputs import SelectableOutputs, image_or_tokens, stage_shapes
from spach_deploy.models.spach import activation
from spach_deploy.options.architecture import Architecture


class Shift(nn.Module):
    """Move the first channels by one pixel, `group` of them each left, right, up and down: (B, C, H, W), zeros enter.

    Without parameters. The same as a depthwise 3x3 convolution with one 1 in each kernel.
    """

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """out[.., w] is x[.., w + 1] in the first group, x[.., w - 1], x[.., h + 1, :], x[.., h - 1, :] in the next."""
        left, right, up, down = (slice(i * self.group, (i + 1) * self.group) for i in range(4))
        y = torch.zeros_like(x)
        y[:, left, :, :-1] = x[:, left, :, 1:]
        y[:, right, :, 1:] = x[:, right, :, :-1]
        y[:, up, :-1] = x[:, up, 1:]
        y[:, down, 1:] = x[:, down, :-1]
        y[:, 4 * self.group :] = x[:, 4 * self.group :]
        return y


class ConvMLP(nn.Module):
    """Two 1x1 convolutions with GELU between: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, hidden_dim: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, kernel_size=1)
        self.act = activation(act)
        self.fc2 = nn.Conv2d(hidden_dim, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels of each pixel."""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class ShiftBlock(nn.Module):
    """One block: (B, C, H, W) -> (B, C, H, W). y = shift(x), then y + mlp(norm2(y)): the shortcut is shifted too."""

    def __init__(self, architecture: Architecture, dim: int) -> None:
        super().__init__()
        self.shift = Shift(dim // architecture.divisions)
        self.norm2 = nn.GroupNorm(1, dim, eps=architecture.norm_eps)
        self.mlp = ConvMLP(dim, int(dim * architecture.channel_ratio), architecture.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Mix pixels, then channels."""
        x = self.shift(x)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class PatchEmbedding(nn.Module):
    """One convolution, kernel = stride = patch, and a norm: (B, channels, H, W) -> (B, C, H / patch, W / patch)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        dim, patch = architecture.width, architecture.patch_size
        self.proj = nn.Conv2d(architecture.channels, dim, kernel_size=patch, stride=patch)
        self.norm = nn.GroupNorm(1, dim, eps=architecture.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches."""
        y: Tensor = self.norm(self.proj(x))
        return y


class PatchMerging(nn.Module):
    """Halve the grid, double the channels: (B, C, H, W) -> (B, 2C, H / 2, W / 2)."""

    def __init__(self, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=2, stride=2, bias=False)
        self.norm = nn.GroupNorm(1, dim, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Merge each 2x2 neighbourhood."""
        y: Tensor = self.reduction(self.norm(x))
        return y


class ShiftStage(nn.Module):
    """Blocks of one width: (B, C, H, W) -> (B, C, H, W). Their downsampling is for whoever reads the next stage."""

    def __init__(self, architecture: Architecture, stage: int) -> None:
        super().__init__()
        dim, depth = architecture.stage_dims[stage], len(architecture.mixers[stage])
        is_last = stage == len(architecture.stages) - 1
        self.blocks = nn.Sequential(*(ShiftBlock(architecture, dim) for _ in range(depth)))
        self.downsample = nn.Identity() if is_last else PatchMerging(dim, architecture.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks."""
        for block in self.blocks:
            x = block(x)
        return x


class ShiftViT(SelectableOutputs):
    """A ShiftViT classifier: images (B, channels, H, W) normalized, float -> logits (B, classes), or chosen outputs.

    Without classes there is no head, and it gives the embedding (B, C), the mean over the grid.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        width = architecture.stage_dims[-1]
        self.patch_embed = PatchEmbedding(architecture)
        self.layers = nn.Sequential(*(ShiftStage(architecture, stage) for stage in range(len(architecture.stages))))
        self.norm = nn.GroupNorm(1, width, eps=architecture.norm_eps)
        if architecture.classes:
            self.head = nn.Linear(width, architecture.classes)
        self.stage_shapes = stage_shapes(architecture)
        self.outputs = usual_outputs(architecture.classes, width)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images (B, channels, H, W) -> logits (B, classes), or the outputs that are chosen."""
        x = self.patch_embed(x)
        stages = []
        for stage in self.layers:
            assert isinstance(stage, ShiftStage)
            stages.append(stage(x))
            x = stage.downsample(stages[-1])
        return self.arranged(
            lambda: (image_or_tokens(stage, self.layout) for stage in stages),
            lambda: self.norm(x).mean(dim=(2, 3)),
            lambda embedding: self.head(embedding),
        )

"""The reference: sMLPNet in PyTorch, whose blocks mix tokens by a linear layer along each axis of the grid.

Source: Tang et al., "Sparse MLP for Image Recognition: Is Self-Attention Really Necessary?", arXiv 2109.05422. Names of
modules and attributes are the state-dict keys of the published checkpoints, misspelt ones too. Tensors are images
(B, C, H, W).
"""

from __future__ import annotations

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from spach_deploy.bundle.outputs import usual_outputs
from spach_deploy.models.outputs import SelectableOutputs, image_or_tokens, stage_shapes
from spach_deploy.models.spach import activation
from spach_deploy.options.architecture import Architecture


class DepthwiseMixing(nn.Module):
    """BatchNorm, GELU and a depthwise 3x3 convolution: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, act: str) -> None:
        super().__init__()
        self.conv_merge = nn.ModuleDict(
            {
                "BN": nn.BatchNorm2d(dim),
                "GELU": activation(act),
                "Conv": nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix each pixel with its neighbours."""
        for layer in self.conv_merge.values():
            x = layer(x)
        return x


class SparseMLP(nn.Module):
    """A linear layer along each axis: (B, C, H, W) -> (B, C, H, W). Its weights fix H and W.

    z = GELU(BatchNorm(x)); `fuse` sees z, z mixed along rows and z mixed along columns, one after the other.
    """

    def __init__(self, dim: int, grid: tuple[int, int], act: str) -> None:
        super().__init__()
        height, width = grid
        self.BN = nn.BatchNorm2d(dim)
        self.act = activation(act)
        self.proj_h = nn.Conv2d(width, width, kernel_size=1)
        self.proh_w = nn.Conv2d(height, height, kernel_size=1)
        self.fuse = nn.Conv2d(3 * dim, dim, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix pixels along each axis."""
        z = self.act(self.BN(x))
        last = self.proj_h(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, W, C, H): W is mixed
        third = self.proh_w(z.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)  # (B, H, C, W): H is mixed
        y: Tensor = self.fuse(torch.cat([z, last, third], dim=1))
        return y


class FeedForward(nn.Module):
    """Two linear layers over the last axis with GELU between. Indices 2 and 4 were dropout."""

    def __init__(self, dim: int, hidden_dim: int, act: str) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden_dim), activation(act), nn.Identity(), nn.Linear(hidden_dim, dim), nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels of each pixel."""
        y: Tensor = self.net(x)
        return y


class TokenMixing(nn.Sequential):
    """Pixels mixed with neighbours, then along both axes: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, grid: tuple[int, int], act: str) -> None:
        super().__init__(DepthwiseMixing(dim, act), SparseMLP(dim, grid, act))


class ChannelMixing(nn.Sequential):
    """Channels mixed by an MLP: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, hidden_dim: int, architecture: Architecture) -> None:
        super().__init__(
            Rearrange("b c h w -> b h w c"),
            nn.LayerNorm(dim, eps=architecture.norm_eps),
            FeedForward(dim, hidden_dim, architecture.activation),
            Rearrange("b h w c -> b c h w"),
        )


class SMLPNet(SelectableOutputs):
    """An sMLPNet classifier: images (B, channels, H, W) normalized, float -> logits (B, classes), or chosen outputs.

    Without classes there is no head, and it gives the embedding (B, C), the mean over the grid. Each stage begins with
    a convolution of kernel = stride; blocks are counted through all stages.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.to_patch_embedding = nn.ModuleList()
        self.token_mix = nn.ModuleList()
        self.channel_mix = nn.ModuleList()
        inputs = architecture.channels
        stages = zip(architecture.stage_dims, architecture.grids, architecture.mixers, strict=True)
        for stage, (dim, grid, mixers) in enumerate(stages):
            kernel = 2 if stage else architecture.patch_size
            embedding = nn.Conv2d(inputs, dim, kernel_size=kernel, stride=kernel, bias=False)
            self.to_patch_embedding.append(nn.Sequential(embedding))
            for _ in mixers:
                self.token_mix.append(TokenMixing(dim, grid, architecture.activation))
                self.channel_mix.append(ChannelMixing(dim, int(dim * architecture.channel_ratio), architecture))
            inputs = dim
        self.batch_norm = nn.BatchNorm2d(inputs)
        if architecture.classes:
            self.mlp_head = nn.Sequential(nn.Linear(inputs, architecture.classes))
        self.stage_shapes = stage_shapes(architecture)
        self.outputs = usual_outputs(architecture.classes, inputs)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images (B, channels, H, W) -> logits (B, classes), or the outputs that are chosen."""
        blocks, stages = iter(zip(self.token_mix, self.channel_mix, strict=True)), []
        for embedding, mixers in zip(self.to_patch_embedding, self.architecture.mixers, strict=True):
            x = embedding(x)
            for _ in mixers:
                token_mix, channel_mix = next(blocks)
                x = x + token_mix(x)
                x = x + channel_mix(x)
            stages.append(x)
        return self.arranged(
            lambda: (image_or_tokens(stage, self.layout) for stage in stages),
            lambda: self.batch_norm(stages[-1]).mean(dim=(2, 3)),
            lambda vector: self.mlp_head(vector),
        )

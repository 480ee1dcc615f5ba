"""MLPs over tokens: over all of them (the spatial MLP of SPACH), or along rows and columns (sMLPNet).

A spatial MLP is two linear layers on each channel. `_axis_forms` knows the two halves of an sMLPNet block: tokens mixed
by a linear layer along each axis, and channels by an MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spach_deploy.blocks.base import (
    Call,
    Change,
    GraphForm,
    Outcome,
    children_of,
    double,
    has_other_parameters,
    modules_of,
    nested,
    probe,
    prove,
    set_parameter,
)
from spach_deploy.blocks.channel_mlp import linear_of, linear_pair
from spach_deploy.models.smlpnet import SMLPNet
from spach_deploy.options.specs import Role


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
    """Token MLPs that `module` may be, for tokens by channels, and halves of an sMLPNet block, for images."""
    pair = linear_pair(module)
    if pair is not None and call.is_tokens and call.input[1] == pair[0].in_features:
        for act in pair[2]:
            yield StaticSpatialMLP(TokenLinear(pair[0]), act, TokenLinear(pair[1]), call.input[2])
    yield from _axis_forms(module, call)


class Affine(nn.Module):
    """A factor and a summand for each channel, what a BatchNorm is in evaluation: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> Affine:
        """That of `norm`, in its precision."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return cls(weight.detach(), (norm.bias - norm.running_mean * weight).detach())

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel."""
        return x * self.weight + self.bias


class StaticAxisMixing(nn.Module):
    """Depthwise convolution, then a linear layer along each axis and one over the channels of all three.

        d = depthwise(act(norm(x))), z = act(norm(d)), y = fuse(z, z mixed along rows, z mixed along columns)

    (B, C, H, W) -> (B, C, H, W), channels last inside. Products P z need no transposes: of (B*H, W, C) along rows, of
    (B, H, W*C) along columns. `paths`: of first norm, first activation, convolution, second norm, second activation,
    the linear layers along rows and columns, and fuse; those of the module that it replaces. `fold_batchnorm` makes the
    first norm an `Affine` and puts the second into the convolution.
    """

    def __init__(self, paths: tuple[str, ...], parts: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.paths = paths
        nested(self, dict(zip(paths, parts, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        """Mix pixels with their neighbours, then along both axes."""
        norm1, act1, conv, norm2, act2, rows, columns, fuse = (self.get_submodule(path) for path in self.paths)
        if not isinstance(norm1, Affine):
            x = norm1(x)
        x = x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        x = act1(norm1(x) if isinstance(norm1, Affine) else x)
        z = act2(norm2(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))
        _, height, width, channels = z.shape
        y: Tensor = fuse(torch.cat([z, *self._along_axes(z, rows, columns)], dim=-1).reshape(-1, 3 * channels))
        y = y.reshape(-1, height, width, channels)
        return y.permute(0, 3, 1, 2)

    def wrong_layer(self, z: Tensor, error: Tensor) -> str:
        """Path of the linear layer whose weight or bias alone explains `error` of the result given a right `z`, both
        (B, H, W, C); "" where none does. For graphs in which the three are one product.

        A wrong layer adds what fuse makes of a matrix times z: (W, W) along rows, (H, H) along columns, (C, 3C) over
        channels. Least squares finds it; of those that leave less than half of the error the one with fewest unknowns.
        """
        rows, columns, fuse = (self.get_submodule(path) for path in self.paths[-3:])
        _, by_row, by_column = fuse.weight.chunk(3, dim=1)  # type: ignore[operator]  # a tensor
        along_rows, along_columns = self._along_axes(z, rows, columns)
        explained = (
            _unexplained(z @ by_row.T, error, 2, by_row.sum(dim=1)),
            _unexplained(z @ by_column.T, error, 1, by_column.sum(dim=1)),
            _unexplained(torch.cat([z, along_rows, along_columns], dim=-1), error, 3),
        )
        return next((path for path, left in zip(self.paths[-3:], explained, strict=True) if left < 0.5), "")

    @staticmethod
    def _along_axes(z: Tensor, rows: nn.Module, columns: nn.Module) -> tuple[Tensor, Tensor]:
        _, height, width, channels = z.shape
        along_rows = rows(z.reshape(-1, width, channels)).reshape(-1, height, width, channels)
        return along_rows, columns(z.reshape(-1, height, width * channels)).reshape(-1, height, width, channels)


def _unexplained(x: Tensor, error: Tensor, axis: int, bias: Tensor | None = None) -> float:
    """The share of `error` that no matrix along `axis` of `x` makes; with `bias`, what a bias there is multiplied
    with, no matrix and bias.
    """
    read, left = x.movedim(axis, -1).flatten(0, -2), error.movedim(axis, -1).flatten(0, -2)
    if bias is not None:
        read = torch.cat([read, bias.repeat(len(read) // len(bias))[:, None]], dim=1)
    fitted = torch.linalg.lstsq(read.double(), left.double()).solution
    return float((read.double() @ fitted - left).norm() / left.norm())


class StaticChannelMixing(nn.Module):
    """mlp(norm(x)) over the channels of images: (B, C, H, W) -> (B, C, H, W), channels last inside.

    `paths`: of norm, first linear layer, activation and second linear layer, those of the module that it replaces.
    """

    def __init__(self, paths: tuple[str, ...], parts: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.paths = paths
        nested(self, dict(zip(paths, parts, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels of each pixel."""
        norm, fc1, act, fc2 = (self.get_submodule(path) for path in self.paths)
        x = x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        _, height, width, channels = x.shape
        y = fc2(act(fc1(norm(x).reshape(-1, channels)))).reshape(-1, height, width, channels)
        return y.permute(0, 3, 1, 2)  # type: ignore[no-any-return]


_ACTIVATIONS = (nn.GELU, nn.ReLU, nn.SiLU)


def _axis_forms(module: nn.Module, call: Call) -> Iterator[nn.Module]:
    """Halves of an sMLPNet block that `module`, which takes and gives images, may be."""
    if len(call.input) != 4 or call.input != call.output:
        return
    leaves = {path: part for path, part in module.named_modules() if path and not children_of(part)}
    weighted = {path: part for path, part in leaves.items() if next(part.parameters(), None) is not None}
    acts = [path for path, part in leaves.items() if isinstance(part, _ACTIVATIONS)]
    if not has_other_parameters(module, list(weighted.values())):
        yield from _axis_mixings(weighted, acts, leaves, call)
        yield from _channel_mixings(weighted, acts, leaves, call)


def _axis_mixings(
    weighted: dict[str, nn.Module], acts: list[str], leaves: dict[str, nn.Module], call: Call
) -> Iterator[nn.Module]:
    """Norm, convolution, norm, a layer along each axis (either order), fuse."""
    kinds = [nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, nn.Conv2d, nn.Conv2d]
    if sorted(map(repr, map(type, weighted.values()))) != sorted(map(repr, kinds)) or len(acts) not in (1, 2):
        return
    _, channels, height, width = call.input
    norms = [path for path, part in weighted.items() if isinstance(part, nn.BatchNorm2d)]
    layers = {path: linear for path, part in weighted.items() if (linear := linear_of(part)) is not None}
    convolutions = [path for path in weighted if path not in layers and path not in norms]
    fuses = [path for path, linear in layers.items() if linear.in_features == 3 * channels]
    axes = [path for path in layers if path not in fuses]
    if [len(found) for found in (norms, convolutions, fuses, axes)] != [2, 1, 1, 2]:
        return
    for rows, columns in (axes, axes[::-1]):
        if (layers[rows].in_features, layers[columns].in_features) == (width, height):
            paths = (norms[0], acts[0], convolutions[0], norms[1], acts[-1], rows, columns, fuses[0])
            parts = {path: leaves[path] for path in paths}
            parts |= {path: TokenLinear(layers[path]) for path in (rows, columns)} | {fuses[0]: layers[fuses[0]]}
            yield StaticAxisMixing(paths, tuple(parts[path] for path in paths))


def _channel_mixings(
    weighted: dict[str, nn.Module], acts: list[str], leaves: dict[str, nn.Module], call: Call
) -> Iterator[nn.Module]:
    """LayerNorm, linear layer, activation, linear layer."""
    if [type(part) for part in weighted.values()] == [nn.LayerNorm, nn.Linear, nn.Linear] and len(acts) == 1:
        norm, fc1, fc2 = weighted
        paths = (norm, fc1, acts[0], fc2)
        yield StaticChannelMixing(paths, tuple(leaves[path] for path in paths))


def _channels_first(affine: Affine) -> Callable[[Tensor], Tensor]:
    return lambda x: affine(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def fold_batchnorm(model: nn.Module, form: GraphForm) -> Outcome:
    """Fold each BatchNorm of sMLPNet's blocks into the convolution before it, and its last one into the head, in place.

    The one that begins a block reads the residual stream, so it stays as a factor and a summand. The head's stays where
    the embedding, which it makes, is an output.
    """
    changes: list[Change] = []
    for path, mixing in modules_of(model, StaticAxisMixing):
        assert isinstance(mixing, StaticAxisMixing)
        changes.extend(_fold_into_axis_mixing(path, mixing))
    if isinstance(model, SMLPNet) and all(tensor.role is not Role.EMBEDDING for tensor in model.outputs):
        changes.append(_fold_into_head("batch_norm", model))
    return Outcome(tuple(changes))


def _fold_into_axis_mixing(path: str, mixing: StaticAxisMixing) -> list[Change]:
    """Make the first BatchNorm a factor and a summand, and fold the second into the convolution, in place."""
    first, _, conv, second, *_ = (mixing.get_submodule(part) for part in mixing.paths)
    assert isinstance(first, nn.BatchNorm2d)
    assert isinstance(second, nn.BatchNorm2d)
    assert isinstance(conv, nn.Conv2d)
    old_first, old_conv, old_second = double(first), double(conv), double(second)
    affine, folded = Affine.of(old_first), fuse_conv_bn_eval(old_conv, old_second)
    x = probe(2, conv.in_channels, 5, 4)
    changes = [
        prove("fold_batchnorm", f"{path}.{mixing.paths[0]}", old_first, _channels_first(affine), x),
        prove("fold_batchnorm", f"{path}.{mixing.paths[3]}", nn.Sequential(old_conv, old_second), folded, x),
    ]
    parts = {mixing.paths[0]: affine.float(), mixing.paths[2]: folded.float(), mixing.paths[3]: nn.Identity()}
    nested(mixing, parts)
    return changes


def _fold_into_head(path: str, model: SMLPNet) -> Change:
    """Fold the last BatchNorm into the linear layer that reads its mean over pixels, in place.

    W mean(s x + t) + b = W diag(s) mean(x) + (W t + b)
    """
    head = model.mlp_head[0]
    assert isinstance(head, nn.Linear)
    norm, old, new = double(model.batch_norm), double(head), double(head)
    affine = Affine.of(norm)
    new.weight = nn.Parameter(old.weight * affine.weight, requires_grad=False)
    new.bias = nn.Parameter(old.bias + old.weight @ affine.bias, requires_grad=False)
    x = probe(2, head.in_features, 3, 4)
    change = prove(
        "fold_batchnorm", path, lambda y: old(norm(y).mean(dim=(2, 3))), lambda y: new(y.mean(dim=(2, 3))), x
    )
    set_parameter(head, "weight", new.weight)
    set_parameter(head, "bias", new.bias)
    model.batch_norm = nn.Identity()  # type: ignore[assignment]
    return change

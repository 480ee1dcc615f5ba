"""The shift block: runs of channels move by one pixel, then an MLP over channels. One per block of a ShiftViT."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spach_deploy.blocks.base import Call, children_of, double, has_other_parameters, nested, probe
from spach_deploy.blocks.channel_mlp import linear_of

Move = tuple[int, int, int]
"""A run of channels: how many, and from which neighbour they come, rows down and columns to the right."""


class StaticShift(nn.Module):
    """Runs of channels from neighbours, zeros from outside of the grid: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, moves: tuple[Move, ...]) -> None:
        super().__init__()
        self.moves = moves

    def extra_repr(self) -> str:
        """The moves, which no parameter shows."""
        return f"moves={self.moves}"

    def forward(self, x: Tensor) -> Tensor:
        """out[h, w] = x[h + rows, w + columns] for each run."""
        ends = list(itertools.accumulate(channels for channels, _, _ in self.moves))
        parts = [
            moved(x, rows, columns, slice(end - channels, end))
            for (channels, rows, columns), end in zip(self.moves, ends, strict=True)
        ]
        return torch.cat(parts, dim=-1)


def moved(x: Tensor, rows: int, columns: int, channels: slice) -> Tensor:
    """x[h + rows, w + columns] of some channels of (B, H, W, C), zero where there is no such pixel."""
    height, width = x.shape[1:3]
    part = x[:, max(rows, 0) : height + min(rows, 0), max(columns, 0) : width + min(columns, 0), channels]
    if not rows and not columns:
        return part
    return nn.functional.pad(part, (0, 0, max(-columns, 0), max(columns, 0), max(-rows, 0), max(rows, 0)))


class StaticShiftBlock(nn.Module):
    """y = shift(x), then y + mlp(norm(y)): (B, C, H, W) -> (B, C, H, W), channels last inside.

    `paths`: of norm, first linear layer, activation and second linear layer, those of the module that it replaces.
    """

    def __init__(self, moves: tuple[Move, ...], paths: tuple[str, ...], parts: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.shift = StaticShift(moves)
        self.paths = paths
        nested(self, dict(zip(paths, parts, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        """Mix pixels, then channels."""
        norm, fc1, act, fc2 = (self.get_submodule(path) for path in self.paths)
        x = self.shift(x.permute(0, 2, 3, 1))  # (B, C, H, W) -> (B, H, W, C)
        _, height, width, channels = x.shape
        rows = norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(-1, channels)
        y: Tensor = x + fc2(act(fc1(rows))).reshape(-1, height, width, channels)
        return y.permute(0, 3, 1, 2)


def static_forms(module: nn.Module, call: Call) -> Iterator[nn.Module]:
    """Shift blocks that `module` may be: a GroupNorm of one group and two 1x1 convolutions of images."""
    leaves = {path: part for path, part in module.named_modules() if path and not children_of(part)}
    norms = [path for path, part in leaves.items() if isinstance(part, nn.GroupNorm) and part.num_groups == 1]
    layers = [path for path, part in leaves.items() if linear_of(part) is not None]
    if len(call.input) != 4 or call.input != call.output or len(norms) != 1 or len(layers) != 2:
        return
    known = [leaves[path] for path in (*norms, *layers)]
    acts = [path for path, part in leaves.items() if isinstance(part, nn.GELU | nn.ReLU | nn.SiLU)]
    moves = () if has_other_parameters(module, known) else _moves(module, norms[0], call)
    if len(acts) != 1 or not moves:
        return
    first, second = (linear_of(leaves[path]) for path in layers)
    assert first is not None
    assert second is not None
    yield StaticShiftBlock(
        moves, (norms[0], layers[0], acts[0], layers[1]), (leaves[norms[0]], first, leaves[acts[0]], second)
    )


def _moves(module: nn.Module, norm: str, call: Call) -> tuple[Move, ...]:
    """What `module` moves before its norm reads it, seen in an example run; () where it does anything else."""
    x, seen = probe(1, *call.input[1:]), list[Tensor]()
    copied = double(module)
    copied.get_submodule(norm).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.inference_mode():
        copied(x)
    if len(seen) != 1 or seen[0].shape != x.shape:
        return ()
    runs = [(len(list(run)), move) for move, run in itertools.groupby(_neighbours(x, seen[0]))]
    known = [(channels, *move) for channels, move in runs if move is not None]
    return tuple(known) if len(known) == len(runs) and any(rows or columns for _, rows, columns in known) else ()


def _neighbours(x: Tensor, y: Tensor) -> list[tuple[int, int] | None]:
    """For each channel of `y` (B, C, H, W), the neighbour (rows, columns) of which it is `x`; None for none."""
    x, y = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
    found: list[tuple[int, int] | None] = [None] * x.shape[-1]
    for rows, columns in itertools.product((0, 1, -1), repeat=2):
        same = (moved(x, rows, columns, slice(None)) == y).flatten(0, 2).all(dim=0)
        found = [(rows, columns) if old is None and new else old for old, new in zip(found, same.tolist(), strict=True)]
    return found

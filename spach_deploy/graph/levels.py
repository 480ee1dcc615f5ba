"""How well the blocks of a user's own module are known: known, plain or unknown, with their shares of the arithmetic.

- *known*: the block's kind is known, and its static form was proven to compute what the user's module computes.
- *plain*: a layer of PyTorch, such as nn.Linear or nn.Conv2d; typed and quantized by the rules for its operator.
- *unknown*: the user's own operations; exported as they are and validated at the outputs, without promises on their
  form.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Collection, Mapping

import onnx_ir as ir
from torch import nn

from spach_deploy.bundle.schema import LevelEntry
from spach_deploy.graph.editing import macs_of, name_of, owner, shapes_at_batch_one


class Level(str, enum.Enum):
    """How well a block is known."""

    KNOWN = "known"
    PLAIN = "plain"
    UNKNOWN = "unknown"


def levels(graph: ir.Model, module: nn.Module, known: Collection[str]) -> dict[str, LevelEntry]:
    """The shares of each level in the exported graph of `module`, whose blocks at the paths `known` are proven."""
    shapes = shapes_at_batch_one(graph)
    work: Counter[tuple[Level, str]] = Counter()
    for node in graph.graph:
        work[_level(owner(name_of(node)), module, known)] += macs_of(node, shapes)
    total = sum(work.values()) or 1
    return {
        level.value: LevelEntry(
            modules=tuple(sorted(path for found, path in work if found is level)),
            macs=sum(macs for (found, _), macs in work.items() if found is level) / total,
        )
        for level in Level
    }


def _level(path: str, module: nn.Module, known: Collection[str]) -> tuple[Level, str]:
    """The level of the block that a node with this module path belongs to, and the block's path."""
    block = next((block for block in known if path == block or path.startswith(f"{block}.") or not block), None)
    if block is not None:
        return Level.KNOWN, block or "model"
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        return Level.UNKNOWN, path
    is_plain = type(layer).__module__.startswith("torch.nn") and not list(layer.children())
    return (Level.PLAIN if is_plain else Level.UNKNOWN), path


def described(found: Mapping[str, LevelEntry]) -> str:
    """The levels in a line: `4 known (87 % of the arithmetic), 6 plain (13 %), 1 unknown (0 %: model)`."""
    parts: list[str] = []
    for level, share in found.items():
        if share.modules:
            names = f": {', '.join(share.modules[:3])}" if level == Level.UNKNOWN else ""
            unit = "" if parts else " of the arithmetic"
            parts.append(f"{len(share.modules)} {Level(level).value} ({100 * share.macs:.0f} %{unit}{names})")
    return ", ".join(parts)

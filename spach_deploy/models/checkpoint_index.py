"""Checkpoints in several files: an index (`model.safetensors.index.json`) says which file holds which tensor.

The format is Hugging Face's: {"metadata": {...}, "weight_map": {tensor: file}}, the files beside the index. Nothing
here imports torch, as an export's cache asks which files it depends on before torch is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from spach_deploy.errors import CheckpointError

_SUFFIX = ".index.json"
_SHARD = re.compile(r"-(\d{2,9})-of-(\d{2,9})\.\w+")
_LARGEST = 32_000_000  # bytes; some eighty a tensor
_ONE_DOWNLOAD = "Put the index and all files that it names into one folder, from one download."


@dataclasses.dataclass(frozen=True)
class CheckpointIndex:
    """An index file, and the name of the file beside it that holds each tensor."""

    path: Path
    weight_map: dict[str, str]

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files that hold tensors."""
        return tuple(self.path.parent / name for name in sorted(set(self.weight_map.values())))

    def names_in(self, shard: Path) -> set[str]:
        """The tensors that a file holds."""
        return {name for name, file in self.weight_map.items() if file == shard.name}


def find_index(path: Path) -> CheckpointIndex | None:
    """The index that `path` is, or the one beside it that names it; None for a checkpoint in one file.

    CheckpointError for an index that cannot be followed, and for one of several files without an index.
    """
    try:
        if not path.is_file():
            return None
        if _is_json(path):
            return _read(path)
        beside = [file for file in sorted(path.parent.glob(f"*{_SUFFIX}")) if file.is_file()]
    except OSError:
        return None  # whoever reads the checkpoint explains
    for file in beside:
        if path.name in _weight_map(file).values():
            return _read(file)
    if (shard := _SHARD.search(path.name)) and int(shard[2]) > 1:
        raise CheckpointError(
            f"Checkpoint {path} is one file of {int(shard[2])}, and no index beside it names it (*{_SUFFIX}).",
            _ONE_DOWNLOAD,
        )
    return None


def checkpoint_files(path: Path) -> tuple[Path, ...]:
    """All files that the checkpoint at `path` consists of. CheckpointError as in `find_index`."""
    index = find_index(path)
    return (path,) if index is None else (index.path, *index.shards)


def _is_json(path: Path) -> bool:
    """Also of the header of safetensors the first byte may be a brace, as a part of its length."""
    with path.open("rb") as file:
        head = file.read(64)
    return head.lstrip()[:1] == b"{" and int.from_bytes(head[:8], "little") > path.stat().st_size


def _read(path: Path) -> CheckpointIndex:
    weight_map = _weight_map(path)
    if not weight_map:
        raise CheckpointError(
            f"Checkpoint {path} is JSON without a weight_map of tensors and files, so it is no index of a checkpoint.",
            "Give a .pth, .pt or .safetensors file, or an index.",
        )
    for name in dict.fromkeys(weight_map.values()):
        if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise CheckpointError(f"Index {path} names {name!r}, which is no file beside it.", _ONE_DOWNLOAD)
        if not (path.parent / name).is_file():
            raise CheckpointError(f"Index {path} names {name}, which is not beside it.", _ONE_DOWNLOAD)
    return CheckpointIndex(path, weight_map)


def _weight_map(path: Path) -> dict[str, str]:
    """What an index says; empty where the file is none."""
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
        content: Any = json.loads(text) if len(text) <= _LARGEST else None
    except (OSError, ValueError, RecursionError):
        return {}
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        return {}
    return found

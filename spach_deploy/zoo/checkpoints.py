"""The checkpoint of each model, from a folder that holds one for each."""

from __future__ import annotations

from pathlib import Path

from spach_deploy.errors import CheckpointError, UsageError

SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".safetensors.index.json")


def checkpoint_of(model: str, given: Path | None, *, is_alone: bool) -> Path | None:
    """`given` itself for one model alone; else the file named like the model, or like the published one, in the folder.

    Raises UsageError for one file and several models, CheckpointError for a folder without such a file, or with two.
    """
    if given is None or (is_alone and not given.is_dir()):
        return given
    if not given.is_dir():
        raise UsageError(
            f"--checkpoint {given} is one file, and --zoo names several models.",
            "Give a folder with a checkpoint for each: ms_hybrid_s.pth or spach_ms_hybrid_s.pth.",
        )
    names = [f"{stem}{suffix}" for stem in (model, f"spach_{model}") for suffix in SUFFIXES]
    found = [given / name for name in names if (given / name).is_file()]
    if len(found) != 1:
        what = "no checkpoint" if not found else f"{len(found)} checkpoints ({', '.join(file.name for file in found)})"
        raise CheckpointError(f"{given} holds {what} of {model}.", f"Put one there, such as {model}.pth.")
    return found[0]

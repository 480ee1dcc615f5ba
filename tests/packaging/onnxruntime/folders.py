"""Folders of spach-package onnxruntime that a test changes."""

from __future__ import annotations

from pathlib import Path

from spach_deploy.bundle.store import GRAPH
from spach_deploy.common.files import sha256_of
from spach_deploy.packaging.onnxruntime.folder import MODEL_TEXT


def recorded(folder: Path, name: str = GRAPH) -> None:
    """Let model.txt say of a file what it is now."""
    lines = (folder / MODEL_TEXT).read_text().splitlines(keepends=True)
    others = [line for line in lines if not line.startswith(f"file {name} ")]
    new = f"file {name} {(folder / name).stat().st_size} {sha256_of(folder / name)}\n"
    (folder / MODEL_TEXT).write_text("".join((new, *others)))

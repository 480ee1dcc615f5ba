"""Bundles made by hand: a manifest as an export writes it, and files with the right hashes and nothing in them."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from spach_deploy.bundle.store import GOLDEN, GRAPH, MANIFEST, PLAN
from tests import manifests
from tests.doctor import plans
from tests.doctor.machines import A100, L4


def write_bundle(directory: Path, *, plan: bytes | None = None, **engine: Any) -> Path:
    """A bundle with a plan of TensorRT for RTX for sm80 and sm89, or with `plan` and what `engine` says of it."""
    content = plans.rtx_plan(A100.capability, L4.capability) if plan is None else plan
    files = {"build.log": b"", GRAPH: b"\x08\x0a\x12\x04test", GOLDEN: golden(), PLAN: content}
    directory.mkdir(parents=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    usual = {"flavour": "tensorrt-rtx", "version": "1.7.1.116", "gpus": ["sm80", "sm89"], "tf32": True}
    rewrite(directory, engine={**usual, **engine}, files={name: _entry(data) for name, data in files.items()})
    return directory


def golden(**arrays: Any) -> bytes:
    """A golden pack of one image, with some arrays changed."""
    usual = {"input": np.zeros((1, 3, 8, 8)), "logits": np.zeros((1, 7), np.float32), "names": np.array(["a"])}
    content = io.BytesIO()
    np.savez(content, **{**usual, **arrays})
    return content.getvalue()


def _entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def rewrite(directory: Path, **sections: Any) -> None:
    """Replace sections of the manifest."""
    file = directory / MANIFEST
    content = json.loads(file.read_text()) if file.is_file() else dict(_MANIFEST)
    file.write_text(json.dumps({**content, **sections}))


def read(directory: Path) -> dict[str, Any]:
    """The manifest."""
    content: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
    return content


def without(directory: Path, name: str) -> Path:
    """The bundle as if it had been exported without that file."""
    (directory / name).unlink()
    files = read(directory)["files"]
    del files[name]
    rewrite(directory, files=files)
    return directory


_MANIFEST: dict[str, Any] = manifests.sections(
    graph={"certificate": {"opset": 20, "ir_version": 9}},
    validation={**manifests.sections()["validation"], "image_count": 8, "reference": "PyTorch in FP32"},
)

"""Tiny bundles with engines of a given TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny
from tests.small_bundles import read_manifest, write_manifest


def with_engine(folder: Path, version: str = "10.13.2.6", tiny: Tiny | None = None, **engine: Any) -> Path:
    """A bundle whose plan was built by ordinary TensorRT `version`, for sm90 unless `engine` says otherwise."""
    bundle = tiny_bundles.write(folder, tiny or Tiny())
    manifest = read_manifest(bundle)
    manifest["engine"] |= {"version": version, "gpus": ["sm90"], **engine}
    write_manifest(bundle, manifest)
    return bundle


def with_rtx_engine(folder: Path, tiny: Tiny | None = None) -> Path:
    """A bundle whose plan was built by TensorRT for RTX."""
    return tiny_bundles.write(folder, tiny or Tiny(engine="tensorrt-rtx"))

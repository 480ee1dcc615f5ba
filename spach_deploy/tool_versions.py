"""Versions of everything that has a hand in an export or a validation."""

from __future__ import annotations

import importlib.metadata
import platform

from spach_deploy._version import __version__

_PACKAGES = (
    *("torch", "einops", "numpy", "onnx", "onnxscript", "onnxsim", "onnxruntime", "polygraphy", "pillow"),
    *("tensorrt", "tensorrt-rtx", "safetensors"),
)


def tool_versions() -> dict[str, str]:
    """By package name; what is not installed is left out."""
    return {"spach-deploy": __version__, "python": platform.python_version(), **_installed()}


def _installed() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions

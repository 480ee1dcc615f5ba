"""The Python packages of both flavours of TensorRT: import names, installed versions, how to install them."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from spach_deploy.common.errors import MissingPackageError
from spach_deploy.options.specs import Flavour

MODULE_NAMES = {Flavour.TENSORRT: "tensorrt", Flavour.TENSORRT_RTX: "tensorrt_rtx"}
"""By flavour: the name under which its package is imported."""

_INSTALL = {
    Flavour.TENSORRT: "pip install 'spach-deploy[gpu]'",
    Flavour.TENSORRT_RTX: "pip install 'spach-deploy[cpu]'",
}
_TENSORRT_ADVICE = (
    " (its libraries are not in the public package index: the installer fetches them from NVIDIA's own, and fails "
    "where that is out of reach; install NVIDIA's wheels by hand there, or build with --engine tensorrt-rtx)."
)


def is_installed(flavour: Flavour) -> bool:
    """Whether the package is installed; its libraries may still fail to load."""
    return importlib.util.find_spec(MODULE_NAMES[flavour]) is not None


def installed_version(flavour: Flavour) -> str | None:
    """Version of the installed package, without importing it; None when it is absent."""
    try:
        return importlib.metadata.version(MODULE_NAMES[flavour])
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_package(flavour: Flavour, purpose: str, reason: str = "") -> MissingPackageError:
    """The error for a package that is absent or, with `reason`, installed but does not load.

    `purpose`: what needs it, for the message.
    """
    package = f"a working {flavour.value} (importing it failed: {reason})" if reason else flavour.value
    advice = _TENSORRT_ADVICE if flavour is Flavour.TENSORRT else "."
    return MissingPackageError(package, purpose, _INSTALL[flavour] + advice)

"""spach-deploy: from a SPACH checkpoint to a verified TensorRT engine.

Attributes are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
import os

from spach_deploy._version import __version__

TYPE_CHECKING = False  # typing takes milliseconds to load, in which Ctrl-C is a traceback yet (cli/interrupts.py)
if TYPE_CHECKING:
    from typing import Any

    from spach_deploy.bundle.store import Bundle
    from spach_deploy.models import create_model

# ONNX Runtime's wheels send usage data to Microsoft unless told otherwise before they are loaded. Models are their
# owners' business: whoever wants to send it sets ORT_DISABLE_TELEMETRY=0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_LAZY = {
    "Bundle": "spach_deploy.bundle.store",
    "create_model": "spach_deploy.models",
}

__all__ = ["Bundle", "__version__", "create_model"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

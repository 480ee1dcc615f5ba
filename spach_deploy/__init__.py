"""spach-deploy: from a SPACH checkpoint to a verified TensorRT engine. docs/python.md shows how to use it.

Attributes are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
import os

from spach_deploy._version import __version__

TYPE_CHECKING = False  # importing typing takes milliseconds in which Ctrl-C still shows a traceback (cli/interrupts.py)
if TYPE_CHECKING:
    from typing import Any

    from spach_deploy.api import Bundle, ExportResult, calibrate, export, validate
    from spach_deploy.common.errors import MismatchError, SpachError, UnavailableError, UsageError
    from spach_deploy.common.progress import ExportObserver
    from spach_deploy.models import create_model
    from spach_deploy.options.architecture import Architecture
    from spach_deploy.quantization.calibration import Calibration
    from spach_deploy.runtime.session import ClassScore, Prediction, Session
    from spach_deploy.validation.result import Validation

# ONNX Runtime's wheels send usage data to Microsoft unless this variable is set before they are loaded. To send it, set
# ORT_DISABLE_TELEMETRY=0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_LAZY = {
    "Architecture": "spach_deploy.options.architecture",
    "Bundle": "spach_deploy.api",
    "Calibration": "spach_deploy.quantization.calibration",
    "ClassScore": "spach_deploy.runtime.session",
    "ExportObserver": "spach_deploy.common.progress",
    "ExportResult": "spach_deploy.api",
    "MismatchError": "spach_deploy.common.errors",
    "Prediction": "spach_deploy.runtime.session",
    "Session": "spach_deploy.runtime.session",
    "SpachError": "spach_deploy.common.errors",
    "UnavailableError": "spach_deploy.common.errors",
    "UsageError": "spach_deploy.common.errors",
    "Validation": "spach_deploy.validation.result",
    "calibrate": "spach_deploy.api",
    "create_model": "spach_deploy.models",
    "export": "spach_deploy.api",
    "validate": "spach_deploy.api",
}

__all__ = [
    "Architecture",
    "Bundle",
    "Calibration",
    "ClassScore",
    "ExportObserver",
    "ExportResult",
    "MismatchError",
    "Prediction",
    "Session",
    "SpachError",
    "UnavailableError",
    "UsageError",
    "Validation",
    "__version__",
    "calibrate",
    "create_model",
    "export",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

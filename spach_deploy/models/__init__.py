"""SPACH models in PyTorch (the reference), the table of published models, and loading of checkpoints.

Attributes of this package are imported on first use, because a command that lists models or refuses a name should not
wait for torch. `published` and `registry` need none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spach_deploy.models.checkpoint import LoadedModel, load_model
    from spach_deploy.models.demo import load_demo_weights
    from spach_deploy.models.registry import ModelInfo, create_model, list_models, model_info, resolve
    from spach_deploy.models.spach import Spach
    from spach_deploy.options.architecture import Architecture

_LAZY = {
    "Architecture": "spach_deploy.options.architecture",
    "LoadedModel": "spach_deploy.models.checkpoint",
    "ModelInfo": "spach_deploy.models.registry",
    "Spach": "spach_deploy.models.spach",
    "create_model": "spach_deploy.models.registry",
    "list_models": "spach_deploy.models.registry",
    "load_demo_weights": "spach_deploy.models.demo",
    "load_model": "spach_deploy.models.checkpoint",
    "model_info": "spach_deploy.models.registry",
    "resolve": "spach_deploy.models.registry",
}

__all__ = [
    "Architecture",
    "LoadedModel",
    "ModelInfo",
    "Spach",
    "create_model",
    "list_models",
    "load_demo_weights",
    "load_model",
    "model_info",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

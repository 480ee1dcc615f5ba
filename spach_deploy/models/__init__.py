"""SPACH models in PyTorch (the reference), the table of published models, and loading of checkpoints.

Attributes of this package are imported on first use, because a command that lists models or refuses a name should not
wait for torch. `published`, `shapes` and `registry` need none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spach_deploy.models.checkpoint import LoadedModel, load_model
    from spach_deploy.models.demo import load_demo_weights
    from spach_deploy.models.published import SpachConfig
    from spach_deploy.models.registry import ModelInfo, create_model, list_models, model_info, resolve
    from spach_deploy.models.spach import Spach

_LAZY = {
    "LoadedModel": "checkpoint",
    "ModelInfo": "registry",
    "Spach": "spach",
    "SpachConfig": "published",
    "create_model": "registry",
    "list_models": "registry",
    "load_demo_weights": "demo",
    "load_model": "checkpoint",
    "model_info": "registry",
    "resolve": "registry",
}

__all__ = [
    "LoadedModel",
    "ModelInfo",
    "Spach",
    "SpachConfig",
    "create_model",
    "list_models",
    "load_demo_weights",
    "load_model",
    "model_info",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

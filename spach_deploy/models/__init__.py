"""Reference definitions of the SPACH models, their registry, and checkpoint loading."""

from __future__ import annotations

from spach_deploy.models.registry import create_model
from spach_deploy.models.spach import Spach, SpachConfig

__all__ = ["Spach", "SpachConfig", "create_model"]

"""What a deployment is asked to be, as frozen objects."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from spach_deploy.common.errors import UsageError
from spach_deploy.packaging.kubernetes.names import check_image_name, check_kubernetes_name
from spach_deploy.packaging.triton.options import Backend

REGISTRY = "registry.example.com/spach"
"""Where images are said to be until a user says where."""


@dataclasses.dataclass(frozen=True)
class Replicas:
    """How many pods there are at least and at most."""

    min: int = 2
    max: int = 8

    @classmethod
    def parse(cls, text: str) -> Replicas:
        """`MIN:MAX`, or one number. UsageError for anything else."""
        match = re.fullmatch(r"([1-9]\d{0,3})(?::([1-9]\d{0,3}))?", text)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"--replicas {text!r} is no number of pods.", "Give MIN:MAX, such as 2:8, or one number.")
        return cls(int(match[1]), int(match[2] or match[1]))


@dataclasses.dataclass(frozen=True)
class KubernetesOptions:
    """All that `spach-package kubernetes` was asked for.

    `triton_version` None: the newest image that fits. `name` and `image` None: made from the model's name.
    """

    triton_version: str | None = None
    kserve: bool = False
    backend: Backend = Backend.AUTO
    name: str | None = None
    image: str | None = None
    replicas: Replicas = Replicas()
    labels: Path | None = None
    ensemble: bool = False

    def __post_init__(self) -> None:
        if self.name is not None:
            check_kubernetes_name(self.name)
        if self.image is not None:
            check_image_name(self.image)

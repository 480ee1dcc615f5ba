"""Options of spach-package kubernetes, and names for Kubernetes, Triton and registries.

Names are made from the model's name, or checked where a user gave them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

from spach_deploy.common.errors import UsageError
from spach_deploy.packaging.triton.options import Backend

LONGEST = 40
"""Longest name, so that with `-predictor`, a namespace or a pod's suffix it stays within 63 characters (DNS label)."""

_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_HOST = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?"
_PART = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(rf"({_HOST}/)?{_PART}(/{_PART})*")


def kubernetes_name(model: str) -> str:
    """A DNS label (RFC 1035) for a model's name: `ms_hybrid_s+` -> `ms-hybrid-s-plus`."""
    spelled = model.lower().replace("+", "-plus-")
    name = re.sub(r"[^a-z0-9]+", "-", spelled).strip("-")
    if not name[:1].isalpha():
        name = f"model-{name}".rstrip("-")
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 7].rstrip('-')}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


def triton_name(model: str) -> str:
    """A model's name for Triton, where it is a folder's name and part of a URL."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", model.replace("+", "_plus"))
    return name if name[:1].isalnum() else f"model{name}"


def check_kubernetes_name(name: str) -> None:
    """UsageError unless `name` is a DNS label of at most `LONGEST` characters."""
    if len(name) > LONGEST or not _LABEL.fullmatch(name):
        raise UsageError(
            f"--name {name!r} is no name for Kubernetes.",
            f"Use lower-case letters, digits and hyphens, a letter first, at most {LONGEST} characters.",
        )


def check_image_name(name: str) -> None:
    """UsageError unless `name` is the name of an image without tag and digest."""
    if len(name) > 200 or not _IMAGE.fullmatch(name):
        raise UsageError(
            f"--image {name!r} is no image's name.",
            "Give registry/path/name without a tag, such as registry.example.com/team/classifier.",
        )


REGISTRY = "registry.example.com/spach"
"""Placeholder registry in the name of the image where the user gives none."""


@dataclasses.dataclass(frozen=True)
class Replicas:
    """Smallest and largest number of pods."""

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
    """All options of `spach-package kubernetes`.

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

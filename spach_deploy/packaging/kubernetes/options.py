"""Names that Kubernetes, Triton and registries take, made from models' names or checked where a user gave them.

What a deployment is asked to be, as frozen objects.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

from spach_deploy.common.errors import UsageError
from spach_deploy.packaging.triton.options import Backend

LONGEST = 40
"""So that what is appended (`-predictor`, a namespace, a pod's suffix) stays within a DNS label's 63 characters."""

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
    """A model's name as Triton takes it: a folder's, and part of a URL."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", model.replace("+", "_plus"))
    return name if name[:1].isalnum() else f"model{name}"


def check_kubernetes_name(name: str) -> None:
    """UsageError unless `name` is a DNS label short enough for what is appended to it."""
    if len(name) > LONGEST or not _LABEL.fullmatch(name):
        raise UsageError(
            f"--name {name!r} is no name for Kubernetes.",
            f"Use lower-case letters, digits and hyphens, a letter first, at most {LONGEST} characters.",
        )


def check_image_name(name: str) -> None:
    """UsageError unless `name` is an image's name without tag and digest."""
    if len(name) > 200 or not _IMAGE.fullmatch(name):
        raise UsageError(
            f"--image {name!r} is no image's name.",
            "Give registry/path/name without a tag, such as registry.example.com/team/classifier.",
        )


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

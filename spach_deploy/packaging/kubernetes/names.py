"""Names that Kubernetes, Triton and registries take, made from models' names or checked where a user gave them."""

from __future__ import annotations

import hashlib
import re

from spach_deploy.common.errors import UsageError

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

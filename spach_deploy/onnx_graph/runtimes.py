"""Which ONNX Runtime loads which graph, and which Triton image carries which versions (runtimes.json, with sources).

Everything that advises where a graph can run reads this one table: Triton's repositories and their check, Kubernetes'
manifests, the doctor, Polygraphy's folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spach_deploy.errors import UsageError

REPOSITORY = "nvcr.io/nvidia/tritonserver"

DATA = Path(__file__).with_name("runtimes.json")
"""The table; `sources` in it explains where its rows are from."""


@dataclasses.dataclass(frozen=True)
class OnnxRuntime:
    """A release of ONNX Runtime: the newest opset and the newest version of ONNX's own format (IR) that it loads."""

    version: str
    opset: int
    ir: int
    seen: str


@dataclasses.dataclass(frozen=True)
class TritonImage:
    """NVIDIA's image of a release, and what it carries. `tensorrt` None: not known. `seen`: where each is from."""

    release: str
    tensorrt: str | None
    onnxruntime: str
    cuda: str
    seen: Mapping[str, str] = dataclasses.field(repr=False)

    @property
    def reference(self) -> str:
        """What a Dockerfile calls it."""
        return f"{REPOSITORY}:{self.release}-py3"

    @property
    def notes(self) -> str:
        """The address of its release notes."""
        page = f"rel-{self.release.replace('.', '-')}.html"
        return f"https://docs.nvidia.com/deeplearning/triton-inference-server/release-notes/{page}"


@dataclasses.dataclass(frozen=True)
class Runtimes:
    """All that are known, oldest first. `sources`: what the words of `seen` stand for."""

    onnxruntimes: tuple[OnnxRuntime, ...]
    images: tuple[TritonImage, ...]
    read: str
    sources: Mapping[str, str]

    @classmethod
    def parse(cls, content: Any) -> Runtimes:
        """What runtimes.json says."""
        runtimes = [OnnxRuntime(version, **entry) for version, entry in content["onnxruntime"].items()]
        images = [TritonImage(release, **entry) for release, entry in content["images"].items()]
        return cls(
            tuple(sorted(runtimes, key=lambda runtime: version_numbers(runtime.version))),
            tuple(sorted(images, key=lambda image: image.release)),
            str(content["read"]),
            content["sources"],
        )

    def image(self, release: str) -> TritonImage:
        """The image of a release. UsageError for one that is not known."""
        found = next((image for image in self.images if image.release == release), None)
        if found is None:
            raise UsageError(
                f"--triton-version {release}: what that Triton image carries is not known here.",
                f"Known are {self.images[0].release} to {self.images[-1].release}; --list-versions shows them.",
            )
        return found

    def onnxruntime(self, version: str) -> OnnxRuntime | None:
        """What is known of a version: its own row, or that of the newest older one; None for one before all of them.

        ONNX Runtime goes on loading what it once loaded.
        """
        asked = version_numbers(version)
        older = [runtime for runtime in self.onnxruntimes if version_numbers(runtime.version) <= asked]
        return older[-1] if older else None


@functools.cache
def runtimes() -> Runtimes:
    """The table that is shipped."""
    return Runtimes.parse(json.loads(DATA.read_text(encoding="utf-8")))


def version_numbers(version: str) -> tuple[int, ...]:
    """`10.13.2.6` -> (10, 13, 2, 6); up to the first part that is no number."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)

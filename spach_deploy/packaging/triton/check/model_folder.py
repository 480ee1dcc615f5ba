"""A model's folder, as the rules see it: its config.pbtxt, its versions, and the tensors of its files.

Tensors of an ONNX graph are read from the file. A plan cannot be read without TensorRT and a GPU, so its tensors come
from bundle.json in the same folder, the bundle's manifest, which is valid for the plan with the SHA-256 in it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spach_deploy.bundle.schema import Manifest, TensorInfo
from spach_deploy.bundle.store import GRAPH, PLAN
from spach_deploy.common.errors import BundleError
from spach_deploy.options.specs import BatchProfile
from spach_deploy.packaging.triton.check.findings import RepositoryFinding, Severity
from spach_deploy.packaging.triton.options import Backend
from spach_deploy.packaging.triton.repository import FACTS
from spach_deploy.validation.bundle_facts import by_name, graph_tensors


@dataclasses.dataclass(frozen=True)
class Facts:
    """Inputs and outputs of a version's file, by name, with None for a free extent in their shapes.

    `source`: the file that they were read from. `profile`: batch profile, None where not known. `digest`: the SHA-256
    that the served file must have, where its bundle is known.
    """

    source: str
    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    profile: BatchProfile | None = None
    digest: str | None = None


def artifact_facts(version: Path, file_name: str, backend: str) -> Facts | None:
    """Facts of a version's file; None where they cannot be read, which `check_files` reports."""
    manifest = bundle_manifest(version)
    graph = graph_tensors(version / file_name) if backend == "onnxruntime" else None
    if manifest is None:
        return None if graph is None else Facts(f"{version.name}/{file_name}", *graph)
    inputs, outputs = graph or (by_name(manifest.inputs), by_name(manifest.outputs))
    source = f"{version.name}/{file_name if graph else FACTS}"
    digest = manifest.sha256(GRAPH if backend == "onnxruntime" else PLAN)
    return Facts(source, inputs, outputs, manifest.batch, digest)


def bundle_manifest(version: Path) -> Manifest | None:
    """The manifest of the bundle that a version came from; None where it is absent or cannot be read."""
    try:
        return Manifest.read(version / FACTS)
    except BundleError:
        return None


CONFIG = "config.pbtxt"

PLATFORMS = {
    "tensorrt_plan": "tensorrt",
    "onnxruntime_onnx": "onnxruntime",
    "pytorch_libtorch": "pytorch",
    "tensorflow_graphdef": "tensorflow",
    "tensorflow_savedmodel": "tensorflow",
}
"""The backend of each `platform`; an ensemble has none."""

DEFAULT_FILES = {
    "tensorrt": "model.plan",
    "onnxruntime": "model.onnx",
    "pytorch": "model.pt",
    "python": "model.py",
    "openvino": "model.xml",
}
"""The file that each backend loads by default."""


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model's folder whose config.pbtxt could be parsed."""

    path: Path
    config: Any

    @property
    def name(self) -> str:
        """The folder's name, which is the model's name for Triton."""
        return self.path.name

    @property
    def is_ensemble(self) -> bool:
        """Whether the model is an ensemble of other models."""
        return bool(self.config.platform == "ensemble" or self.config.HasField("ensemble_scheduling"))

    @property
    def backend(self) -> str:
        """The backend. Without `backend` and `platform` it follows from the existing file, as in Triton.

        Empty where it cannot be told.
        """
        named = self.config.backend or PLATFORMS.get(self.config.platform, "")
        if named or self.config.platform or self.config.default_model_filename:
            return str(named)
        backends = [backend for backend, file in DEFAULT_FILES.items() if self._has(file)]
        return backends[0] if backends else ""

    def _has(self, file: str) -> bool:
        return bool(self.versions) and (self.path / str(self.versions[-1]) / file).exists()

    @property
    def is_tensorrt(self) -> bool:
        """Whether Triton's TensorRT backend runs the model."""
        return self.backend == Backend.TENSORRT.value

    @property
    def file_name(self) -> str:
        """Name of the file in each version's folder; empty for an ensemble or an unknown backend."""
        if self.is_ensemble:
            return ""
        return str(self.config.default_model_filename or DEFAULT_FILES.get(self.backend, ""))

    @functools.cached_property
    def versions(self) -> tuple[int, ...]:
        """Numbers of the version folders that Triton sees, ascending."""
        folders = (entry.name for entry in self.path.iterdir() if entry.is_dir())
        return tuple(sorted(int(name) for name in folders if is_version(name)))

    @property
    def served_versions(self) -> tuple[int, ...]:
        """The versions that the version policy serves."""
        policy = self.config.version_policy
        choice = policy.WhichOneof("policy_choice")
        if choice == "all":
            return self.versions
        if choice == "specific":
            return tuple(version for version in self.versions if version in policy.specific.versions)
        count = policy.latest.num_versions if choice == "latest" else 1
        return self.versions[-count:] if count else ()

    @functools.cached_property
    def facts(self) -> dict[int, Facts]:
        """Facts of each version's file, by version; versions without facts are left out."""
        if self.is_ensemble or not self.file_name:
            return {}
        facts_by_version = {
            number: artifact_facts(self.path / str(number), self.file_name, self.backend) for number in self.versions
        }
        return {number: facts for number, facts in facts_by_version.items() if facts is not None}

    def finding(
        self,
        field: str,
        found: str,
        expected: str,
        fix: str,
        *,
        file: str = CONFIG,
        severity: Severity = Severity.ERROR,
    ) -> RepositoryFinding:
        """A finding in one of the model's files."""
        return RepositoryFinding(f"{self.name}/{file}", field, found, expected, fix, severity)

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """All inputs and outputs, each with its field, such as `input[0]`."""
        yield from ((f"input[{index}]", tensor) for index, tensor in enumerate(self.config.input))
        yield from ((f"output[{index}]", tensor) for index, tensor in enumerate(self.config.output))


def is_version(name: str) -> bool:
    """Whether Triton takes a folder of this name as a version: a number that does not begin with 0."""
    return name.isascii() and name.isdigit() and not name.startswith("0")


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository: the models whose config.pbtxt could be parsed, and the names of all folders."""

    path: Path
    models: tuple[ModelFolder, ...]
    folders: frozenset[str]

    def find(self, name: str) -> ModelFolder | None:
        """The model of a name, if there is one."""
        return next((model for model in self.models if model.name == name), None)

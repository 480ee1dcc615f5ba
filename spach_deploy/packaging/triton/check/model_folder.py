"""A model's folder, as the rules see it: its config.pbtxt, its versions, and the tensors of its files.

Tensors of an ONNX graph are read from the file. A plan cannot be read without TensorRT and a GPU, so its tensors come
from bundle.json in the same folder, the bundle's manifest, which is valid for the plan with the SHA-256 in it.

The rules for it look at version folders, the plan or graph in each, its weights, and the bundle's manifest.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spach_deploy.bundle.schema import Manifest, TensorInfo
from spach_deploy.bundle.store import GRAPH, PLAN
from spach_deploy.common.errors import BundleError, printable
from spach_deploy.common.files import read_bytes, sha256_of
from spach_deploy.graph.external_data import data_outside, missing_data
from spach_deploy.graph.runtimes import GraphNeeds, runtimes
from spach_deploy.options.specs import BatchProfile, Flavour
from spach_deploy.packaging.triton.check.findings import RepositoryFinding, Severity
from spach_deploy.packaging.triton.config import ACCEPTS_RTX
from spach_deploy.packaging.triton.options import KIND_AUTO, KIND_CPU, Accelerator, Backend
from spach_deploy.packaging.triton.repository import FACTS
from spach_deploy.packaging.triton.served_model import RTX_REASON
from spach_deploy.runtime.plan_identity import identify_plan_file
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
    def is_accelerated(self) -> bool:
        """Whether ONNX Runtime hands the graph to TensorRT."""
        accelerators = self.config.optimization.execution_accelerators.gpu_execution_accelerator
        return any(accelerator.name == Accelerator.TENSORRT.value for accelerator in accelerators)

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


_AGAIN = "Write it again with spach-package triton."

STEP_CLASS = "TritonPythonModel"
"""The class that Triton's Python backend makes of a step's file."""


def check_files(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """Check version folders, model files, and the manifest of the bundle in the same folder."""
    name = model.config.default_model_filename
    if name and Path(name).name != name:
        yield model.finding("default_model_filename", f'"{name}"', "a file name without folders", "Correct it.")
        return
    yield from _version_folders(model)
    for key, file in model.config.cc_model_filenames.items():
        for version in model.versions:
            if not (model.path / str(version) / file).is_file():
                yield model.finding(
                    f'cc_model_filenames["{key}"]', f"no {version}/{file}", "a file in each version", "Add it."
                )
    if model.file_name:
        for version in model.versions:
            yield from _version(model, version)


def _version_folders(model: ModelFolder) -> Iterator[RepositoryFinding]:
    if not model.versions:
        yield model.finding("", "no version", "a folder named 1 or higher", "Add it, with the model in it.", file="")
    for folder in sorted(entry.name for entry in model.path.iterdir() if entry.is_dir()):
        if folder.isdigit() and folder.startswith("0"):
            yield model.finding(
                "", f"folder {folder}, which Triton ignores", "a number from 1 without zeros", "Rename it.", file=folder
            )


def _version(model: ModelFolder, version: int) -> Iterator[RepositoryFinding]:
    file = model.path / str(version) / model.file_name
    where = f"{version}/{model.file_name}"
    if not file.exists():
        there = sorted(entry.name for entry in file.parent.iterdir() if entry.name != FACTS)
        found = f"no such file; there is {', '.join(there)}" if there else "no such file"
        fix = "Add it, correct the platform, or name the file with default_model_filename."
        yield model.finding("", found, f"what backend {model.backend} loads", fix, file=where)
        return
    if not file.is_file():
        return  # some backends load a folder
    if model.is_tensorrt:
        yield from _plan(model, file, where)
    elif model.backend == "onnxruntime" and graph_tensors(file) is None:
        yield model.finding("", _what_it_is(file), "an ONNX graph", "Correct the platform, or the file.", file=where)
    elif model.backend == "onnxruntime":
        yield from _graph(model, file, where)
    elif model.backend == "python":
        yield from _program(model, file, where)
    yield from _bundle(model, version, file, where)


def _plan(model: ModelFolder, file: Path, where: str) -> Iterator[RepositoryFinding]:
    identity = identify_plan_file(file)
    if not identity.is_plan:
        is_graph = identity.flavour is None and graph_tensors(file) is not None
        found = "an ONNX graph" if is_graph else f"no whole plan: {identity.problem}"
        yield model.finding("", found, "a TensorRT plan", "Correct the platform, or the file.", file=where)
    elif identity.flavour is Flavour.TENSORRT_RTX:
        is_accepted = model.config.parameters[ACCEPTS_RTX].string_value == "true" if _has_flag(model) else False
        yield model.finding(
            "",
            f"a plan of TensorRT for RTX {identity.version}",
            f"one of TensorRT: {RTX_REASON}",
            "Serve the graph: spach-package triton --backend onnxruntime.",
            file=where,
            severity=Severity.WARNING if is_accepted else Severity.ERROR,
        )


def _graph(model: ModelFolder, file: Path, where: str) -> Iterator[RepositoryFinding]:
    """A graph's weights must exist, and a known Triton image must run it on the devices of its instances."""
    if wrong := _wrong_data(file):
        found, fix = wrong
        yield model.finding("", found, "the graph with its weights", fix, file=where)
    if (needs := GraphNeeds.of(file)) is None:
        return
    known = runtimes()
    newest = known.images[-1]
    if model.is_accelerated:
        needs = known.of_tensorrt(needs)
    if not known.fitting((needs,), on_gpu=True):
        found = f"a graph that no known Triton image runs: {known.misfit(newest, (needs,), on_gpu=True)}"
        yield model.finding("", found, "one that ONNX Runtime runs", "Export it with --fp16.", file=where)
        return
    kinds = [group.kind for group in model.config.instance_group] or [KIND_AUTO]
    on_cpus = KIND_CPU in kinds
    if needs.bfloat16 and (on_cpus or KIND_AUTO in kinds):
        found = "KIND_CPU" if on_cpus else "KIND_AUTO, a CPU where there is no GPU"
        expected = f"KIND_GPU: {known.misfit(newest, (needs,), on_gpu=False)}"
        severity = Severity.ERROR if on_cpus else Severity.WARNING
        yield model.finding("instance_group.kind", found, expected, "Write kind: KIND_GPU.", severity=severity)


def _wrong_data(file: Path) -> tuple[str, str] | None:
    """What is wrong with the files of a graph's weights, and how to fix it; None where they are complete."""
    import onnx

    graph = onnx.load(file, load_external_data=False)
    if outside := printable(data_outside(graph, file.parent)):
        return f"weights in {outside}, which leads outside of its folder", "Put a graph with its weights there."
    if missing := printable(missing_data(graph, file.parent)):
        return f"no {missing}, which holds its weights", f"Add {missing} beside it."
    return None


def _program(model: ModelFolder, file: Path, where: str) -> Iterator[RepositoryFinding]:
    """A Python step must be Python, and have the class that the server makes. It is not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning
            tree = ast.parse(read_bytes(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f"line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        found = f"no Python: {error.msg if isinstance(error, SyntaxError) else error}"
        yield model.finding(line, found, "a program that the server can load", "Correct it.", file=where)
        return
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    if STEP_CLASS not in names:
        yield model.finding("", f"no {STEP_CLASS}", "the class that the server makes", "Add it.", file=where)


def _has_flag(model: ModelFolder) -> bool:
    return ACCEPTS_RTX in model.config.parameters  # indexing a protobuf map adds an absent key


def _what_it_is(file: Path) -> str:
    """What a file is that should be an ONNX graph and is none."""
    if (flavour := identify_plan_file(file).flavour) is not None:
        return f"a plan of {flavour.value}"
    return "no whole ONNX graph: it is empty, cut off, or of another kind"


def _bundle(model: ModelFolder, version: int, file: Path, where: str) -> Iterator[RepositoryFinding]:
    """A plan needs the manifest of its bundle, whose SHA-256 must be that of the file."""
    path = file.parent / FACTS
    if not path.is_file():
        if model.is_tensorrt:
            yield model.finding(
                "",
                "no such file",
                "the manifest of the bundle, without which a plan cannot be checked offline",
                _AGAIN,
                file=f"{version}/{FACTS}",
            )
        return
    if bundle_manifest(file.parent) is None:
        yield model.finding("", "no manifest that can be read", "a bundle's", _AGAIN, file=f"{version}/{FACTS}")
        return
    facts = model.facts.get(version)
    if facts is not None and facts.digest != sha256_of(file):
        yield model.finding("", "a file with another SHA-256", f"the one that {FACTS} is of", _AGAIN, file=where)

"""Rules for a model's files: version folders, the plan or graph in each, its weights, and the bundle's manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spach_deploy.common.errors import printable
from spach_deploy.common.files import sha256_of
from spach_deploy.graph.external_data import data_outside, missing_data
from spach_deploy.graph.runtimes import GraphNeeds, runtimes
from spach_deploy.options.specs import Flavour
from spach_deploy.packaging.triton.check.findings import RepositoryFinding, Severity
from spach_deploy.packaging.triton.check.model_folder import ModelFolder, Repository, bundle_manifest
from spach_deploy.packaging.triton.config import ACCEPTS_RTX
from spach_deploy.packaging.triton.options import KIND_AUTO, KIND_CPU
from spach_deploy.packaging.triton.repository import FACTS
from spach_deploy.packaging.triton.served_model import RTX_REASON
from spach_deploy.runtime.plan_identity import identify_plan_file
from spach_deploy.validation.bundle_facts import graph_tensors

_AGAIN = "Write it again with spach-package triton."


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


def _has_flag(model: ModelFolder) -> bool:
    return ACCEPTS_RTX in model.config.parameters  # indexing a protobuf map adds an absent key


def _what_it_is(file: Path) -> str:
    identity = identify_plan_file(file)
    if identity.flavour is not None:
        return f"a plan of {identity.flavour.value}"
    return f"no ONNX graph: {identity.problem}" if identity.problem else "no ONNX graph"


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

"""Folders that spach-package cpp wrote, with plans that the double runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
from onnx import numpy_helper

from spach_deploy.bundle.store import GRAPH
from spach_deploy.options.specs import OutputSpec
from spach_deploy.packaging.cpp.folder import FileFacts, PackagedModel, model_text, write_folder
from tests.packaging.cpp import plans
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny

ALL_OUTPUTS = OutputSpec(top_k=3, softmax=True)
EVERY = Tiny(outputs=ALL_OUTPUTS, engine="tensorrt-rtx")
"""A model with every output there is."""


def bundle(folder: Path, tiny: Tiny = EVERY, flavour: str = "tensorrt-rtx") -> Path:
    """A bundle whose engine the double runs."""
    path = tiny_bundles.write(folder, dataclasses.replace(tiny, engine=flavour))
    plans.give_plan(path, flavour)
    return path


def package(folder: Path, tiny: Tiny = EVERY, flavour: str = "tensorrt-rtx", labels: Path | None = None) -> Path:
    """What spach-package cpp writes of it; `model` in it is what programs load."""
    write_folder(bundle(folder / "bundle", tiny, flavour), folder / "package", labels=labels)
    return folder / "package"


def model(folder: Path, tiny: Tiny = EVERY, flavour: str = "tensorrt-rtx") -> Path:
    """The model's folder alone."""
    return package(folder, tiny, flavour) / "model"


def replace_plan(model: Path, bundle_path: Path, graph: bytes) -> None:
    """Another graph behind the same promises: the plan's size and hash are those of the new one."""
    packaged = PackagedModel.of(bundle_path)
    content = plans.plan_bytes(graph, packaged.facts.batch)
    (model / "engine.plan").write_bytes(content)
    refresh(model, bundle_path)


def refresh(model: Path, bundle_path: Path) -> None:
    """model.txt with the sizes and hashes of the files that are there now."""
    packaged = PackagedModel.of(bundle_path)
    text = model_text(packaged, FileFacts.of(model / "engine.plan"), FileFacts.of(model / "golden.bin"))
    (model / "model.txt").write_text(text)


def graph_with_weights(bundle_path: Path, change: object) -> bytes:
    """The bundle's graph, its weights passed through `change`."""
    graph = onnx.load(bundle_path / GRAPH)
    (weights,) = [tensor for tensor in graph.graph.initializer if tensor.name == "weights"]
    weights.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weights)), "weights"))  # type: ignore[operator]
    return bytes(graph.SerializeToString())

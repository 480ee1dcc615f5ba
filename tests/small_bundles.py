"""Small bundles, exported for real once per run of the tests; tests that spoil one take a copy.

The model is a small hybrid. Within `registered` it has a name, so that `load_model` and a manifest can name it. A plan
is a header with nothing behind it: enough for all that happens on a machine that cannot run it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto

from spach_deploy.bundle.schema import Form
from spach_deploy.bundle.store import GRAPH, MANIFEST, PLAN
from spach_deploy.models import published as configs
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, IODtype, ModelSpec, OutputSpec, Precision
from spach_deploy.pipeline.export import export
from spach_deploy.pipeline.steps import graph as graph_step
from spach_deploy.pipeline.steps import manifest as manifest_step
from tests import static_models
from tests.shared import once

NAME = "small_hybrid"
SIZE = static_models.IMAGE_SIZE
CLASSES = static_models.CLASSES


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Let the registry know the small model, for as long as the block lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.ARCHITECTURES, NAME, static_models.ARCHITECTURES["hybrid"])
        yield


def bundle(precision: Precision = Precision.FP16) -> Path:
    """A bundle with a plan, which tests share and do not change. FP16 comes with every output there is."""

    def make(target: Path) -> None:
        outputs = OutputSpec(top_k=3, softmax=True) if precision is Precision.FP16 else OutputSpec()
        model = ModelSpec(NAME, image_size=SIZE, num_classes=CLASSES)
        with registered():
            export(ExportOptions(model, precision, outputs, EngineTarget(Flavour.NONE), output=target))
        give_plan(target)

    return once(f"small-bundles/{precision.value}", make)


@contextlib.contextmanager
def form_for_tensorrt() -> Iterator[None]:
    """Let exports without an engine give their graphs the form for TensorRT, for as long as the block lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (graph_step, manifest_step):
            patch.setattr(module, "form_of", lambda _: Form.TENSORRT)
        yield


def for_tensorrt() -> Path:
    """A bundle with a plan and a graph in TensorRT's form, in FP16, with pixels in and every output there is."""

    def make(target: Path) -> None:
        outputs = OutputSpec(IODtype.UINT8, top_k=3, softmax=True)
        model = ModelSpec(NAME, image_size=SIZE, num_classes=CLASSES)
        with registered(), form_for_tensorrt():
            export(ExportOptions(model, Precision.FP16, outputs, EngineTarget(Flavour.NONE), output=target))
        give_plan(target)

    return once("small-bundles/for-tensorrt", make)


def copy(original: Path, to: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(original, to)
    return to


def plan_bytes(total: int = 4096) -> bytes:
    """The header of a TensorRT for RTX plan, and zeros up to its declared size."""
    header = bytearray(64)
    header[:4] = b"vtrt"
    header[16:24] = total.to_bytes(8, "little")
    header[24:27] = bytes((1, 7, 1))
    return bytes(header) + bytes(total - len(header))


def give_plan(directory: Path) -> None:
    """Make the bundle one that was exported with an engine."""
    content = plan_bytes()
    (directory / PLAN).write_bytes(content)
    manifest = read_manifest(directory)
    manifest["files"][PLAN] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["engine"] = {"flavour": "tensorrt-rtx", "version": "1.7.1", "gpus": ["sm86", "sm89"], "tf32": True}
    write_manifest(directory, manifest)


def take_plan(directory: Path) -> None:
    """Make the bundle one that was exported without an engine."""
    (directory / PLAN).unlink()
    manifest = read_manifest(directory)
    del manifest["files"][PLAN]
    manifest["engine"] = {"flavour": "none", "reason": "--engine none was asked for"}
    write_manifest(directory, manifest)


def read_manifest(directory: Path) -> dict[str, Any]:
    """manifest.json."""
    content: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
    return content


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Replace manifest.json."""
    (directory / MANIFEST).write_text(json.dumps(content))


def load_graph(directory: Path) -> ModelProto:
    """The bundle's graph."""
    return onnx.load(directory / GRAPH)


def save_graph(model: ModelProto, directory: Path, name: str = GRAPH) -> Path:
    """Put a graph beside the manifest."""
    onnx.save(model, directory / name)
    return directory / name

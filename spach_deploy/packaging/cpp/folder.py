"""The folder that spach-package cpp writes, in one step: a killed run leaves the old folder or none.

FOLDER/
  manifest.json    marks the folder as written by spach-package, from which bundle; no program reads it
  README.md        how to build, test and use it
  CMakeLists.txt cmake/ include/ src/ tools/   the library, the same for every bundle
  model/engine.plan model.txt golden.bin       what programs load; labels.txt with --labels

golden.bin is the golden pack in a form that C++ reads with a few bounds checks, little-endian, with the shapes and
dtypes of model.txt:

    8 bytes   SPACHGLD
    u32       version, 1
    u32       number of images N
    N times   u32 length, then the image's name in UTF-8
    input     N x input, in the input's dtype
    outputs   one after another, in the manifest's order: N x float32 for floats, N x int64 for integers
"""

from __future__ import annotations

import dataclasses
import shutil
import struct
from pathlib import Path

import numpy as np

from spach_deploy._version import __version__
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import expected_outputs, of_role
from spach_deploy.bundle.store import GOLDEN, MANIFEST, PLAN, DirectoryKind, check_target, writing
from spach_deploy.common.errors import UsageError
from spach_deploy.common.text import json_text
from spach_deploy.data.labels import as_text, read_labels
from spach_deploy.options.specs import Role, size_in_words
from spach_deploy.packaging.cpp.model_file import FileFacts, PackagedModel, model_text

MAGIC = b"SPACHGLD"
VERSION = 1


def golden_bytes(model: PackagedModel) -> bytes:
    """The content of golden.bin. BundleError where the golden pack does not fit the model."""
    golden = Golden.load(model.bundle.file(GOLDEN))
    golden.check(model.bundle)
    expected = expected_outputs(golden.outputs, model.outputs)
    names = [name.encode() for name in golden.names]
    parts = [
        MAGIC,
        struct.pack("<II", VERSION, len(names)),
        *(struct.pack("<I", len(name)) + name for name in names),
        np.ascontiguousarray(golden.input).tobytes(),
    ]
    for output in model.outputs:
        dtype = "<i8" if output.dtype == "int64" else "<f4"
        parts.append(np.ascontiguousarray(expected[output.name]).astype(dtype).tobytes())
    return b"".join(parts)


CONTENTS = DirectoryKind("cpp-library", "a C++ library")
LIBRARY = Path(__file__).with_name("library")
MODEL, MODEL_TEXT, GOLDEN_BIN, LABELS = "model", "model.txt", "golden.bin", "labels.txt"
README = "README.md"


@dataclasses.dataclass(frozen=True)
class CppPackage:
    """A written folder, and the model in it."""

    path: Path
    model: PackagedModel
    has_labels: bool


def write_folder(bundle: Path, output: Path, *, labels: Path | None = None, overwrite: bool = False) -> CppPackage:
    """Write the library with the model of `bundle` to `output`.

    Raises BundleError where `bundle` is not a bundle, was changed or has no plan, or the target cannot be written, and
    UsageError for labels that do not fit.
    """
    destination = check_target(output, overwrite=overwrite, contents=CONTENTS)
    model = PackagedModel.of(bundle)
    if labels is not None and of_role(model.outputs, Role.LOGITS) is None:
        raise UsageError("--labels names classes, and the bundle has no logits.", "Leave --labels out.")
    names = None if labels is None else read_labels(labels, model.classes)
    golden = golden_bytes(model)
    with writing(destination) as staging:
        shutil.copytree(LIBRARY, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        _write_model(staging / MODEL, model, golden)
        if names is not None:
            _write_text(staging / MODEL / LABELS, as_text(names))
        _write_text(staging / README, readme(model))
        _write_text(staging / MANIFEST, _manifest(model))
    return CppPackage(output, model, names is not None)


def _write_model(folder: Path, model: PackagedModel, golden: bytes) -> None:
    folder.mkdir()
    shutil.copyfile(model.plan, folder / PLAN)
    (folder / GOLDEN_BIN).write_bytes(golden)
    text = model_text(model, FileFacts.of(folder / PLAN), FileFacts.of(folder / GOLDEN_BIN))
    _write_text(folder / MODEL_TEXT, text)


def readme(model: PackagedModel) -> str:
    """README.md with its placeholders, such as @MODEL@, replaced."""
    text = (LIBRARY / README).read_text(encoding="utf-8")
    for name, value in _template_context(model).items():
        text = text.replace(f"@{name}@", value)
    return text


def _template_context(model: PackagedModel) -> dict[str, str]:
    shape = "x".join(str(extent) for extent in model.input.shape[1:])
    return {
        "MODEL": model.name,
        "PRECISION": model.facts.precision.value,
        "SIZE": size_in_words(model.facts.preprocessing.image_size),
        "CLASSES": str(model.classes),
        "INPUT": f"{model.input.dtype} {shape}",
        "OUTPUTS": ", ".join(f"`{output.name}`" for output in model.outputs),
        "BATCH": f"{model.facts.batch.min} to {model.facts.batch.max}",
        "FLAVOUR": model.facts.flavour.value,
        "VERSION": model.version,
        "GPUS": ", ".join(model.gpus) or "the GPU that it was built on",
        "LIBRARY": "tensorrt_rtx" if model.facts.flavour.value == "tensorrt-rtx" else "nvinfer",
    }


def _manifest(model: PackagedModel) -> str:
    content = {
        "kind": CONTENTS.kind,
        "spach_deploy": __version__,
        "bundle": model.bundle.path.name,
        "model": model.name,
        "plan_sha256": model.bundle.manifest.files[PLAN].sha256,
    }
    return json_text(content) + "\n"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

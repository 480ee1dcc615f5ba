"""The folder that spach-package cpp writes, in one step: a killed run leaves the old folder or none.

FOLDER/
  manifest.json    marks the folder as written by spach-package, from which bundle; no program reads it
  README.md        how to build, test and use it
  CMakeLists.txt cmake/ include/ src/ tools/   the library, the same for every bundle
  conanfile.py vcpkg/     recipes of package managers
  model/engine.plan model.txt golden.bin       what programs load; labels.txt with --labels

golden.bin is the golden pack in a form that C++ reads with a few bounds checks, little-endian, with the shapes and
dtypes of model.txt:

    8 bytes   SPACHGLD
    u32       version, 1
    u32       number of images N
    N times   u32 length, then the image's name in UTF-8
    input     N x input, in the input's dtype
    outputs   one after another, in the manifest's order: N x float32 for floats, N x int64 for integers

model.txt has what the C++ code needs from a bundle's manifest, one entry a line, readable without a JSON parser.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL

from spach_deploy._version import __version__
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import expected_outputs, of_role
from spach_deploy.bundle.schema import EngineSection, TensorInfo, role_of_name
from spach_deploy.bundle.store import GOLDEN, MANIFEST, PLAN, Bundle, DirectoryKind, check_target, writing
from spach_deploy.common.errors import BundleError, UsageError
from spach_deploy.common.files import sha256_of
from spach_deploy.common.text import json_text
from spach_deploy.data.labels import as_text, read_labels
from spach_deploy.options.specs import Preprocessing, Role, sides, size_in_words
from spach_deploy.validation.bundle_facts import SERVE_SEVERAL, BundleFacts, check_interface
from spach_deploy.validation.verdict import Tolerance

MAGIC = b"SPACHGLD"
VERSION = 1


def golden_bytes(bundle: Bundle) -> bytes:
    """The content of golden.bin. BundleError where the golden pack does not fit the model."""
    golden, outputs = Golden.load(bundle.file(GOLDEN)), bundle.manifest.outputs
    golden.check(bundle)
    expected = expected_outputs(golden.outputs, outputs)
    names = [name.encode() for name in golden.names]
    parts = [
        MAGIC,
        struct.pack("<II", VERSION, len(names)),
        *(struct.pack("<I", len(name)) + name for name in names),
        np.ascontiguousarray(golden.input).tobytes(),
    ]
    for output in outputs:
        dtype = "<i8" if output.dtype == "int64" else "<f4"
        parts.append(np.ascontiguousarray(expected[output.name]).astype(dtype).tobytes())
    return b"".join(parts)


CONTENTS = DirectoryKind("cpp-library", "a C++ library")
LIBRARY = Path(__file__).with_name("library")
MODEL, MODEL_TEXT, GOLDEN_BIN, LABELS = "model", "model.txt", "golden.bin", "labels.txt"
README = "README.md"
RECIPE = "conanfile.py"
RECIPE_SOURCE = f"{RECIPE}.in"
"""Under another name here, where every .py is a module of this package."""


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
    golden = golden_bytes(model.bundle)
    with writing(destination) as staging:
        shutil.copytree(LIBRARY, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        (staging / RECIPE_SOURCE).rename(staging / RECIPE)
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
    path.write_text(text, encoding="utf-8", newline="\n")


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """A file's size and SHA-256."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileFacts:
        """Read both from a file."""
        return cls(file.stat().st_size, sha256_of(file))


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A bundle whose plan can be packaged, with its manifest checked."""

    bundle: Bundle
    facts: BundleFacts
    engine: EngineSection
    plan: Path

    @classmethod
    def of(cls, path: Path) -> PackagedModel:
        """Open the bundle at `path`. BundleError where it is none, was changed, or has no plan that C++ could run."""
        bundle = Bundle.open(path)
        facts = BundleFacts.of(bundle)
        facts.check_one_input("the C++ library feeds one", SERVE_SEVERAL)
        if bundle.plan is None:
            raise BundleError(
                f"Bundle {bundle.path} has no {PLAN}: {bundle.manifest.engine.why_none}.",
                "Export it with --engine tensorrt-rtx, which needs no GPU, or --engine tensorrt.",
            )
        model = cls(bundle, facts, bundle.manifest.engine, bundle.file(PLAN))
        if problem := model._problem():
            raise BundleError(f"{bundle.path / MANIFEST} {problem}.", "Export the bundle again.")
        check_interface(bundle)
        return model

    def _problem(self) -> str:
        for tensor in (self.input, *self.outputs):
            if len(tensor.shape) < 2 or any(size is None for size in tensor.shape[1:]):
                return f"has a tensor {tensor.name} of shape {tensor.shape}; only the batch may be free"
        bounded = {*self.tolerances, *(output.name for output in self.outputs if output.dtype == "int64")}
        if unbounded := [output.name for output in self.outputs if output.name not in bounded]:
            return f"has no tolerance for the output {unbounded[0]}"
        return ""

    @property
    def name(self) -> str:
        """The model's name."""
        return self.bundle.manifest.model.name

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.bundle.manifest.model.num_classes

    @property
    def input(self) -> TensorInfo:
        """The only input."""
        return self.bundle.manifest.inputs[0]

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """The outputs, in order."""
        return self.bundle.manifest.outputs

    @property
    def tolerances(self) -> dict[str, Tolerance]:
        """Tolerances of the engine's outputs, by name."""
        return dict(self.facts.tolerances.engine.outputs)

    @property
    def gpus(self) -> tuple[str, ...]:
        """Compute capabilities that the plan was built for, such as sm89."""
        return self.engine.gpus

    @property
    def version(self) -> str:
        """Version of the TensorRT that built the plan."""
        return self.engine.version

    @property
    def pillow(self) -> int:
        """Major version of Pillow at export. Pillow 13 changed the order of the two passes of a resize."""
        recorded = self.bundle.manifest.tools.get("pillow", "")
        major = re.match(r"\d{1,4}", recorded) or re.match(r"\d{1,4}", PIL.__version__)
        return int(major.group()) if major else 0


def model_text(model: PackagedModel, plan: FileFacts, golden: FileFacts) -> str:
    """The content of model.txt. BundleError where an entry of the manifest cannot be written to it."""
    entries = [(key, value) for key, value in _entries(model, plan, golden)]
    if wrong := [key for key, value in entries if "\n" in value or not value.isascii()]:
        raise BundleError(f"The manifest's {wrong[0]} cannot be written to model.txt.", "Export the bundle again.")
    return "".join(f"{key} {value}".rstrip() + "\n" for key, value in entries)


def _entries(model: PackagedModel, plan: FileFacts, golden: FileFacts) -> Iterator[tuple[str, str]]:
    facts, transform = model.facts, model.facts.preprocessing
    yield "spach-model", "1"
    yield "name", _word(model.name)
    yield "precision", facts.precision.value
    yield "flavour", facts.flavour.value
    yield "version", _word(model.version)
    yield "version-compatible", str(int(model.engine.version_compatible))
    yield "gpus", " ".join(_capability(gpu) for gpu in model.gpus)
    yield "batch", f"{facts.batch.min} {facts.batch.opt} {facts.batch.max}"
    yield "input", _tensor(model.input)
    for output in model.outputs:
        bounds = "" if output.dtype == "int64" else f" {_tolerance(model.tolerances[output.name])}"
        yield "output", _tensor(output) + bounds + _role(output)
    yield "resize", " ".join(map(str, sizes(transform)))
    if transform.interpolation != Preprocessing.interpolation:
        yield "interpolation", transform.interpolation.split(",")[0]
    yield "pillow", str(model.pillow)
    yield "mean", " ".join(repr(value) for value in transform.mean)
    yield "std", " ".join(repr(value) for value in transform.std)
    yield "plan", f"{plan.bytes} {plan.sha256}"
    yield "golden", f"{golden.bytes} {golden.sha256}"


def sizes(transform: Preprocessing) -> tuple[int, ...]:
    """Sizes of the resize and the crop: one number each if square, else height and width of each."""
    resized, size = transform.resize_size, transform.image_size
    if isinstance(resized, int) and isinstance(size, int):
        return resized, size
    return *sides(resized), *sides(size)


def _tensor(tensor: TensorInfo) -> str:
    """`logits float32 1 1000`: name, dtype, rank and extents without the batch."""
    shape = tensor.shape[1:]
    return " ".join([_word(tensor.name), tensor.dtype, str(len(shape)), *(str(size) for size in shape)])


def _role(output: TensorInfo) -> str:
    """` embedding`, where the name does not say it."""
    return "" if output.role is role_of_name(output.name) else f" {(output.role or Role.OTHER).value}"


def _tolerance(tolerance: Tolerance) -> str:
    """The values of `rel_l2 max_abs cosine_min flip_margin`, `any` where there is no bound."""
    figures = (tolerance.rel_l2, tolerance.max_abs, tolerance.cosine_min, tolerance.flip_margin)
    return " ".join("any" if figure is None else repr(float(figure)) for figure in figures)


def _capability(gpu: str) -> str:
    """`sm89` -> `89`. BundleError for anything but a compute capability."""
    if not re.fullmatch(r"sm\d{2,4}", gpu):
        raise BundleError(f"The manifest names a GPU {gpu!r}, which is no compute capability.", "Export it again.")
    return gpu.removeprefix("sm")


def _word(text: str) -> str:
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise UsageError(f"{text!r} is no name that model.txt can hold.", "Use ASCII letters, digits and hyphens.")
    return text

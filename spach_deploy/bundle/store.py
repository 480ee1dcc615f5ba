"""The bundle: one directory with the engine, the graph it was built from, and the evidence. Read, write, verify.

    manifest.json    what, from what, with what, how well, and the SHA-256 of every other file
    model.onnx       the typed graph the engine was built from
    engine.plan      plain TensorRT plan, or absent with the reason in the manifest
    golden.npz       a few preprocessed inputs with the reference logits
    report.json      the validation in full
    report.html      the same as a page to read
    build.log        what the engine's builder said

It is written into a hidden sibling directory and moved into place in one step, so that a killed export leaves the old
bundle or none, never half of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spach_deploy.common.errors import BundleError, ChangedFileError, UsageError
from spach_deploy.common.files import Destination, draft_name, parse_json, read_json, sha256_of, short_name
from spach_deploy.common.npz import npz_headers
from spach_deploy.common.processes import is_alive
from spach_deploy.common.text import json_text, without_surrogates

SCHEMA_VERSION = 1
MANIFEST, GRAPH, PLAN, GOLDEN, REPORT, PAGE = (
    "manifest.json",
    "model.onnx",
    "engine.plan",
    "golden.npz",
    "report.json",
    "report.html",
)
BUILD_LOG = "build.log"
REWRITTEN = (REPORT, PAGE)
"""What validating a bundle writes again; no part of what is hashed."""

QUANTIZATION = "quantization.json"
HASHED = (GRAPH, PLAN, GOLDEN, QUANTIZATION)
"""What is read from a bundle and must be what was exported."""

GOLDEN_BYTES = {"input": 1 << 30, "logits": 1 << 28, "names": 1 << 24}
"""Of a golden pack's arrays at most: far more than a few images and their answers have."""

SENSITIVITY = "sensitivity.svg"
_SECTIONS = (
    "model",
    "preprocessing",
    "inputs",
    "outputs",
    "batch",
    "precision",
    "engine",
    "validation",
    "files",
)

LARGEST_SIDE, MOST_CLASSES, LARGEST_BATCH = 16_384, 1_000_000, 999_999
"""Of the images in pixels, and of the batch what --batch takes; no SPACH model is near the others."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A graph input or output. `shape` has None where the batch is free; `layout` names the axes, such as NCHW."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    layout: str = ""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """manifest.json. Sections are plain JSON; what code relies on has an accessor that checks it."""

    content: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str, where: str) -> Manifest:
        """Check the shape of a manifest; BundleError says what is wrong with it."""
        try:
            return cls._of(without_surrogates(parse_json(text)), where)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{where} is not JSON ({error}).", "Export the bundle again.") from None

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest in a file; BundleError says what is wrong with it."""
        try:
            return cls._of(without_surrogates(read_json(path)), str(path))
        except OSError as error:
            reason = error.strerror or error
            raise BundleError(f"{path} cannot be read ({reason}).", "Export the bundle again.") from None
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is not JSON ({error}).", "Export the bundle again.") from None

    @classmethod
    def _of(cls, content: Any, where: str) -> Manifest:
        if not isinstance(content, dict) or "schema_version" not in content:
            raise BundleError(f"{where} is not a spach-deploy manifest.", "Give a bundle that spach-export wrote.")
        if content["schema_version"] != SCHEMA_VERSION:
            raise BundleError(
                f"{where} has schema version {content['schema_version']!r}; this is spach-deploy for version"
                f" {SCHEMA_VERSION}.",
                "Export the bundle again, or install the spach-deploy that wrote it.",
            )
        missing = [name for name in _SECTIONS if name not in content]
        if missing:
            raise BundleError(f"{where} lacks {', '.join(missing)}.", "Export the bundle again.")
        return cls(content)._checked(where)

    def _checked(self, where: str) -> Manifest:
        """Read every accessor once, so that a manifest of wrong types or absurd sizes fails here and by name."""
        for name in _SECTIONS:
            with reading(where, name):
                _check_kind(self.content[name], list if name in ("inputs", "outputs") else dict)
        for name, read in _READERS.items():
            with reading(where, name):
                read(self)
        return self

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of each file, by name."""
        return {str(name): str(entry["sha256"]) for name, entry in self.content["files"].items()}

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Graph inputs."""
        return tuple(_tensor_info(entry) for entry in self.content["inputs"])

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Graph outputs."""
        return tuple(_tensor_info(entry) for entry in self.content["outputs"])

    @property
    def model(self) -> dict[str, Any]:
        """Name, image size, classes, origin of the weights."""
        return dict(self.content["model"])

    @property
    def precision(self) -> str:
        """fp32, fp16, bf16, int8 or fp8."""
        return str(self.content["precision"]["asked"])

    @property
    def engine(self) -> dict[str, Any]:
        """Flavour, GPUs, plan facts, or the reason why there is no plan."""
        return dict(self.content["engine"])


@contextlib.contextmanager
def reading(where: str, name: str) -> Iterator[None]:
    """While an entry `name` of the manifest `where` is read: BundleError that names it where it is not as written."""
    try:
        yield
    except KeyError as error:
        reason = f"{name} lacks {error}"
    except UsageError as error:
        reason = f"{name}: {error.message.rstrip('.')}"
    except ValueError as error:
        reason = f"{name}: {error}"
    except (TypeError, AttributeError, OverflowError):
        reason = f"{name} is not what spach-export writes"
    else:
        return
    raise BundleError(f"{where} has an entry of the wrong kind ({reason}).", "Export the bundle again.")


def _check_kind(value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{json.dumps(value)[:40]} is no {'list' if kind is list else 'object'}")


def _check_int(section: Mapping[str, Any], name: str, most: int) -> None:
    """ValueError for an entry that is there, and no whole number from 1 to `most`."""
    if name in section and not (type(section[name]) is int and 1 <= section[name] <= most):
        raise ValueError(f"{name} is {str(section[name])[:40]}, not 1 to {most:,}")


def _check_model(manifest: Manifest) -> None:
    _ = manifest.model["name"]
    _check_int(manifest.model, "image_size", LARGEST_SIDE)
    _check_int(manifest.model, "num_classes", MOST_CLASSES)


def _check_preprocessing(manifest: Manifest) -> None:
    section, size = manifest.content["preprocessing"], manifest.model.get("image_size")
    _check_int(section, "resize_size", 2 * LARGEST_SIDE)
    if section.get("image_size", size) != size:
        raise ValueError(f"image_size is {str(section['image_size'])[:40]}, and the model's is {size}")
    for name in {"mean", "std"} & section.keys():
        values = section[name]
        is_plain = (
            isinstance(values, list) and len(values) == 3 and all(type(value) in (int, float) for value in values)
        )
        if not is_plain or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
            raise ValueError(f"{name} is {str(values)[:40]}, not three {'positive ' * (name == 'std')}numbers")


def _check_batch(manifest: Manifest) -> None:
    section = manifest.content["batch"]
    if section.keys() != {"min", "opt", "max"}:
        raise ValueError("it has not min, opt and max alone")
    for name in section:
        _check_int(section, name, LARGEST_BATCH)


def _check_inputs(manifest: Manifest) -> None:
    size = manifest.model.get("image_size")
    for tensor in manifest.inputs:
        sides = tensor.shape[1:3] if tensor.layout == "NHWC" else tensor.shape[2:4]
        if size is not None and not {*sides} <= {size, None}:
            raise ValueError(f"{tensor.name} has shape {tensor.shape}, and the model's image_size is {size}")


def _check_outputs(manifest: Manifest) -> None:
    classes = manifest.model.get("num_classes")
    for tensor in manifest.outputs:
        is_by_class = tensor.name in ("logits", "probabilities") and classes is not None
        if is_by_class and not {*tensor.shape[1:]} <= {classes, None}:
            raise ValueError(f"{tensor.name} has shape {tensor.shape}, and the model's num_classes is {classes}")


_READERS: Mapping[str, Callable[[Manifest], object]] = {
    "files": lambda manifest: manifest.files,
    "model": _check_model,
    "preprocessing": _check_preprocessing,
    "inputs": _check_inputs,
    "outputs": _check_outputs,
    "batch": _check_batch,
    "precision": lambda manifest: manifest.precision,
    "engine": lambda manifest: manifest.engine["flavour"],
}
"""Of each section what code relies on, looked at once."""


def _tensor_info(entry: Mapping[str, Any]) -> TensorInfo:
    shape = tuple(None if size is None else int(size) for size in entry["shape"])
    return TensorInfo(str(entry["name"]), str(entry["dtype"]), shape, str(entry.get("layout", "")))


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Bundle:
        """The bundle at `path`, a directory or a file in it.

        With `verify` every file's SHA-256 is compared with the manifest. Raises BundleError for what is no bundle, and
        ChangedFileError that names what is missing or changed.
        """
        directory = find_bundle(Path(path))
        bundle = cls(directory, Manifest.read(directory / MANIFEST))
        changed = bundle.changed_files() if verify else {}
        if changed:
            listed = "; ".join(f"{name} {state}" for name, state in changed.items())
            raise ChangedFileError(f"Bundle {directory} is not as it was exported: {listed}.", "Export it again.")
        return bundle

    def changed_files(self) -> dict[str, str]:
        """Files that are not what the manifest says: name -> "is missing", "was changed" or why else."""
        listed = self.manifest.files
        states = {name: self._state(name, digest) for name, digest in listed.items()}
        unlisted = [name for name in HASHED if name not in listed and (self.path / name).exists()]
        states |= dict.fromkeys(unlisted, "is not in the manifest")
        return {name: state for name, state in states.items() if state}

    def _state(self, name: str, digest: str) -> str:
        if Path(name).name != name:
            return "is outside the bundle"
        file = self.path / name
        if not file.is_file():
            return "is missing"
        try:
            return "" if sha256_of(file) == digest else "was changed"
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files; BundleError when it is not there."""
        file = self.path / name
        if not file.is_file():
            raise BundleError(f"Bundle {self.path} has no {name}.", "Export it again.")
        return file

    @property
    def needs_vnni(self) -> bool:
        """Whether its graph computes something else on CPUs without VNNI: ONNX Runtime sums in 16 bits there."""
        section = self.manifest.content.get("quantization")
        return isinstance(section, dict) and section.get("vnni") is True

    @property
    def quantizes_fp16(self) -> bool:
        """Whether its graph makes integers of FP16, which some ONNX Runtimes truncate (`runtime.truncation`): as INT8
        exports did before manifests said what they quantize."""
        section = self.manifest.content.get("quantization")
        if not isinstance(section, dict) or section.get("format") != "int8":
            return False
        return bool(section.get("quantized_from", section.get("rest")) == "fp16")

    @property
    def plan(self) -> Path | None:
        """The engine's plan, or None where the bundle was made without one."""
        return self.path / PLAN if PLAN in self.manifest.files else None


def find_bundle(path: Path) -> Path:
    """The bundle's directory, for the directory itself or a file in it; BundleError otherwise."""
    if not path.exists():
        raise BundleError(f"{path} does not exist.", "Give a bundle directory, its engine.plan or its model.onnx.")
    directory = path if path.is_dir() else path.parent
    if (directory / MANIFEST).is_file():
        return directory
    kind = "is a directory without" if path.is_dir() else "has beside it no"
    raise BundleError(f"{path} {kind} {MANIFEST}, so it is no bundle.", "Give what spach-export wrote.")


def golden_problem(file: Path) -> str:
    """Why a file is no golden pack, as a clause, by its directory and headers; empty where it is one."""
    try:
        found = npz_headers(file, GOLDEN_BYTES)
    except ValueError as error:
        return f"cannot be read as a golden pack ({error})"
    images, logits, names = (found[name].shape for name in ("input", "logits", "names"))
    if len(logits) != 2 or found["logits"].dtype != "float32" or not logits[0]:
        return f"is no golden pack: its logits are {found['logits'].dtype} {logits}"
    if len(images) != 4 or not images[0] == logits[0] == (names or (1,))[0]:
        return f"is no golden pack: {images[:1]} inputs, {logits[0]} answers and {(names or (1,))[0]} names"
    return ""


def default_directory(model: str, precision: str) -> Path:
    """Where a bundle goes that was given no place."""
    return Path("build") / f"{model}-{precision}"


@dataclasses.dataclass(frozen=True)
class DirectoryKind:
    """What a directory of ours holds, as its manifest says (`kind`; none in a bundle's) and in words."""

    kind: str | None
    what: str

    def lie_in(self, path: Path) -> bool:
        """Whether the manifest in `path` is of this kind: other programs call theirs by the same name."""
        try:
            content = read_json(path / MANIFEST)
        except (OSError, ValueError):
            return False
        if not isinstance(content, dict):
            return False
        return content.get("kind") == self.kind if self.kind else "schema_version" in content


BUNDLE = DirectoryKind(None, "a bundle")


def check_target(target: Path, *, overwrite: bool, contents: DirectoryKind = BUNDLE) -> Destination:
    """Refuse a target that holds anything but `contents`, or could not be written, before the work begins.

    What is given back is for `writing`, which replaces nothing else than what lies there now.
    """
    place = Destination.of(target)
    if os.path.ismount(target) or target.absolute() == Path.cwd():
        what = "a mount point" if os.path.ismount(target) else "the directory you are in"
        raise BundleError(f"{target} is {what}, which cannot be replaced.", "Give an --output inside it.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise BundleError(f"{target} exists and is not a directory.", "Choose another --output.")
    if target.is_dir() and any(target.iterdir()):
        if not contents.lie_in(target):
            raise BundleError(
                f"{target} holds something else than {contents.what}, which is left alone.", "Choose another --output."
            )
        if not overwrite:
            raise BundleError(f"{target} holds {contents.what} already.", "Give --overwrite, or another --output.")
    parent = _existing_parent(target)
    try:  # permissions do not tell: root may write everywhere, except where the file system says no
        os.rmdir(tempfile.mkdtemp(prefix=f"{_staging_prefix(target)}{os.getpid()}-", dir=parent))
    except OSError as error:
        raise BundleError(f"{parent} is not writable ({error.strerror}).", "Choose another --output.") from error
    return place


def _existing_parent(target: Path) -> Path:
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise BundleError(f"{parent} is not a directory.", "Choose another --output.")
    return parent


@contextlib.contextmanager
def writing(place: Destination) -> Iterator[Path]:
    """A hidden sibling directory to fill; it goes to its place when the block ends well, and disappears otherwise.

    `place` comes from `check_target`, and `seal` must have been called in the block. Raises BundleError for a full
    disk, and for a target that cannot be written or holds something that was not there when it was checked.
    """
    target = place.path
    try:
        place.check()
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        staging = _staging_path(target)
        staging.mkdir()
    except OSError as error:
        raise _write_error(target, error) from error
    try:
        yield staging
        place.put(staging)
        _flush(target.absolute().parent)
    except OSError as error:
        raise _write_error(target, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


FileDigests = Mapping[str, Mapping[str, Any]]
"""SHA-256 and size of files by name, as the manifest has them."""


def digest_files(staging: Path, known: FileDigests = MappingProxyType({})) -> FileDigests:
    """Flush the files in `staging` to disk and hash them; those in `known` are as they were then.

    The report and its page are no part of what is hashed: validating again may write them again.
    """
    files = [file for file in sorted(staging.iterdir()) if file.name not in (MANIFEST, *REWRITTEN)]
    return {file.name: known.get(file.name) or _settled(file) for file in files}


def _settled(file: Path) -> dict[str, Any]:
    _flush(file)
    return {"sha256": sha256_of(file), "bytes": file.stat().st_size}


def seal(staging: Path, sections: Mapping[str, Any], settled: FileDigests = MappingProxyType({})) -> Manifest:
    """Write manifest.json with the hashes of the files in `staging`, and flush everything to disk.

    `settled`: what `settle` said of files that nobody has changed since.
    """
    files = digest_files(staging, settled)
    content = {"schema_version": SCHEMA_VERSION, **sections, "files": files}
    text = json_text(content) + "\n"
    manifest = Manifest.parse(text, str(staging / MANIFEST))
    (staging / MANIFEST).write_text(text, encoding="utf-8")
    for file in staging.iterdir():
        _flush(file)
    return manifest


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(target: Path, error: OSError) -> BundleError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BundleError(f"No space left while writing {target}; nothing was changed there.", "Free some space.")
    return BundleError(f"{target} cannot be written ({error.strerror or error}).", "Choose another --output.")


def _staging_prefix(target: Path) -> str:
    return f".{short_name(target)}.partial-{socket.gethostname()}-"


def _staging_path(target: Path) -> Path:
    return target.absolute().parent / f"{_staging_prefix(target)}{draft_name()}"


def remove_leftovers(target: Path) -> None:
    """Delete what killed exports to the same target left on this host."""
    prefix = _staging_prefix(target)
    for sibling in target.absolute().parent.iterdir():
        if sibling.name.startswith(prefix) and sibling.is_dir() and not sibling.is_symlink():
            pid = sibling.name.removeprefix(prefix).split("-")[0]
            if pid.isdigit() and not is_alive(int(pid)):
                shutil.rmtree(sibling, ignore_errors=True)

"""Reading, writing and verifying bundles. A bundle is the directory that an export writes:

    manifest.json    options, sources, tools and results of the export, and the SHA-256 of every other file
    model.onnx       the typed graph the engine was built from
    engine.plan      plain TensorRT plan, or absent with the reason in the manifest
    golden.npz       a few preprocessed inputs with the reference's outputs
    report.json      the validation in full
    report.html      the same as a page to read
    build.log        messages of the engine's builder
    openvino.xml     of --target cpu, where OpenVINO's own conversion was faster than every graph: that, with its
                     weights in openvino.bin

`check_target` refuses a target before the work begins. `writing` gives a hidden sibling directory to fill, which
`seal` completes with the manifest; it is then moved into place in one step, so that a killed export leaves the old
bundle or none, never half of one. `Bundle.open` reads a bundle and compares its files with the manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from spach_deploy.bundle.schema import FileEntry, Manifest
from spach_deploy.common.errors import BundleError, ChangedFileError
from spach_deploy.common.files import Destination, draft_name, npz_headers, npz_names, read_json, sha256_of, short_name
from spach_deploy.common.operating_system import flush, is_alive, problem_of_name
from spach_deploy.common.text import json_text
from spach_deploy.options.specs import Precision

if TYPE_CHECKING:
    from typing_extensions import Self

MANIFEST, GRAPH, PLAN, GOLDEN, REPORT, PAGE = (
    "manifest.json",
    "model.onnx",
    "engine.plan",
    "golden.npz",
    "report.json",
    "report.html",
)
BUILD_LOG = "build.log"
OPENVINO_MODEL, OPENVINO_WEIGHTS = "openvino.xml", "openvino.bin"
CONTEXT = "model_ctx.onnx"
"""In a folder of spach-package onnxruntime: the EPContext model that loads the plan."""

REWRITTEN = (REPORT, PAGE)
"""Files that spach-validate rewrites, and that are therefore not hashed."""

QUANTIZATION = "quantization.json"
HASHED = (GRAPH, PLAN, GOLDEN, QUANTIZATION, OPENVINO_MODEL, OPENVINO_WEIGHTS)
"""Files that later commands read, and that must be exactly those of the export."""

GOLDEN_BYTES = {"input": 1 << 30, "names": 1 << 24}
OTHER_INPUT = "input."
"""What the names of a golden pack's other inputs begin with; no output's name has a full stop."""

OUTPUT_BYTES = 1 << 28
"""Largest size of a golden pack's arrays, in bytes: far more than a few images and what a model makes of them take."""

SENSITIVITY = "sensitivity.svg"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle on disk: its directory and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Self:
        """Open the bundle at `path`, its directory or a file in it.

        With `verify` every file's SHA-256 is compared with the manifest. Raises BundleError where there is no bundle,
        and ChangedFileError with the names of missing and changed files.
        """
        directory = find_bundle(Path(path))
        bundle = cls(directory, Manifest.read(directory / MANIFEST))
        changed = bundle.changed_files() if verify else {}
        if changed:
            listed = "; ".join(f"{name} {state}" for name, state in changed.items())
            raise ChangedFileError(f"Bundle {directory} is not as it was exported: {listed}.", "Export it again.")
        return bundle

    def changed_files(self) -> dict[str, str]:
        """Files that differ from the manifest, by name: "is missing", "was changed" or another reason."""
        listed = self.manifest.files
        states = {name: self._state(name, file.sha256) for name, file in listed.items()}
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
        """Path of one of the bundle's files. BundleError where it is missing."""
        file = self.path / name
        if not file.is_file():
            raise BundleError(f"Bundle {self.path} has no {name}.", "Export it again.")
        return file

    @property
    def needs_vnni(self) -> bool:
        """Whether its graph computes wrong results on CPUs without VNNI, where ONNX Runtime accumulates in 16 bits."""
        section = self.manifest.quantization
        return section is not None and section.vnni

    @property
    def is_for_cpu(self) -> bool:
        """Whether it was exported with --target cpu."""
        return self.manifest.cpu is not None

    @property
    def is_for_openvino(self) -> bool:
        """Whether --target cpu chose OpenVINO, whose precision it sets."""
        return self.manifest.cpu is not None and "INFERENCE_PRECISION_HINT" in self.manifest.cpu.chosen.settings

    @property
    def quantizes_fp16(self) -> bool:
        """Whether its graph quantizes FP16 tensors, where some versions of ONNX Runtime truncate instead of rounding
        (`runtime.truncation`). Manifests without `quantized_from` are of exports that did so."""
        section = self.manifest.quantization
        if section is None or section.format is not Precision.INT8:
            return False
        return (section.quantized_from or section.rest) is Precision.FP16

    @property
    def plan(self) -> Path | None:
        """Path of the engine plan, or None where the bundle has none."""
        return self.path / PLAN if PLAN in self.manifest.files else None


def find_bundle(path: Path) -> Path:
    """The bundle's directory, given the directory or a file in it. BundleError otherwise."""
    if not path.exists():
        raise BundleError(f"{path} does not exist.", "Give a bundle directory, its engine.plan or its model.onnx.")
    directory = path if path.is_dir() else path.parent
    if (directory / MANIFEST).is_file():
        return directory
    kind = "is a directory without" if path.is_dir() else "has beside it no"
    raise BundleError(f"{path} {kind} {MANIFEST}, so it is no bundle.", "Give what spach-export wrote.")


def is_other_input(name: str) -> bool:
    """Whether an array of a golden pack is another input than the images."""
    return name.startswith(OTHER_INPUT)


def golden_sizes(file: Path) -> dict[str, int]:
    """The largest size in bytes of each array of a golden pack; ValueError for a file that is no npz."""
    outputs = [name for name in npz_names(file) if name not in GOLDEN_BYTES]
    each = OUTPUT_BYTES // max(1, len(outputs))
    return {"input": GOLDEN_BYTES["input"], **dict.fromkeys(outputs, each), "names": GOLDEN_BYTES["names"]}


def golden_problem(file: Path) -> str:
    """Why a file is not a golden pack, as a clause, judged by the npz headers alone; empty where it is one."""
    try:
        headers = npz_headers(file, golden_sizes(file))
    except ValueError as error:
        return f"cannot be read as a golden pack ({error})"
    others = {name: headers.pop(name) for name in [*headers] if is_other_input(name)}
    outputs = {name: header for name, header in headers.items() if name not in GOLDEN_BYTES}
    images, names = headers["input"].shape, headers["names"].shape or (1,)
    if not outputs:
        return "is no golden pack: it has no answers"
    for name, header in outputs.items():
        if len(header.shape) < 2 or header.dtype != "float32" or not header.shape[0]:
            return f"is no golden pack: its {name} are {header.dtype} {header.shape}"
        if len(images) != 4 or not images[0] == header.shape[0] == names[0]:
            return f"is no golden pack: {images[:1]} inputs, {header.shape[0]} answers and {names[0]} names"
    for name, header in others.items():
        if header.shape[:1] != images[:1]:
            return f"is no golden pack: {images[:1]} images, and {name} of shape {header.shape}"
    return ""


def default_directory(model: str, precision: str) -> Path:
    """Where a bundle goes without --output: `build/MODEL-PRECISION`."""
    return Path("build") / f"{model}-{precision}"


@dataclasses.dataclass(frozen=True)
class DirectoryKind:
    """A kind of directory that this package writes: `kind` in its manifest (None in a bundle), and a name."""

    kind: str | None
    what: str

    def lie_in(self, path: Path) -> bool:
        """Whether `path` has a manifest of this kind; manifest.json is a common name, so its content is checked."""
        try:
            content = read_json(path / MANIFEST)
        except (OSError, ValueError):
            return False
        if not isinstance(content, dict):
            return False
        return content.get("kind") == self.kind if self.kind else "schema_version" in content and "kind" not in content


BUNDLE = DirectoryKind(None, "a bundle")
ONNXRUNTIME = DirectoryKind("onnxruntime", "a folder for ONNX Runtime")
"""What spach-package onnxruntime writes. Its manifest is a bundle's with a kind: it opens as a bundle whose graph has
ONNX Runtime's form."""


def check_target(target: Path, *, overwrite: bool, contents: DirectoryKind = BUNDLE) -> Destination:
    """Refuse a target that holds anything but `contents`, or could not be written, before the work begins.

    Returns the destination for `writing`, which replaces only what is at `target` now. BundleError where refused.
    """
    destination = Destination.of(target)
    if problem := problem_of_name(target.name):
        raise BundleError(f"{target} cannot be written: {problem}.", "Choose another --output.")
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
    try:  # permission bits are not enough: root passes them on read-only file systems
        os.rmdir(tempfile.mkdtemp(prefix=f"{_staging_prefix(target)}{os.getpid()}-", dir=parent))
    except OSError as error:
        raise BundleError(f"{parent} is not writable ({error.strerror}).", "Choose another --output.") from error
    return destination


def _existing_parent(target: Path) -> Path:
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise BundleError(f"{parent} is not a directory.", "Choose another --output.")
    return parent


@contextlib.contextmanager
def writing(destination: Destination) -> Iterator[Path]:
    """A hidden sibling directory to fill. It is moved to `destination` when the block succeeds, and deleted otherwise.

    `destination` comes from `check_target`, and the block must call `seal`. Raises BundleError for a full disk, and for
    a target that cannot be written or that has changed since it was checked.
    """
    target = destination.path
    try:
        destination.check()
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        staging = _staging_path(target)
        staging.mkdir()
    except OSError as error:
        raise _write_error(target, error) from error
    try:
        yield staging
        destination.put(staging)
        flush(target.absolute().parent)
    except OSError as error:
        raise _write_error(target, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


FileDigests = Mapping[str, FileEntry]
"""SHA-256 and size of files by name, as in the manifest."""


def digest_files(staging: Path, known: FileDigests = MappingProxyType({})) -> FileDigests:
    """Flush the files in `staging` to disk and hash them. Digests in `known` are taken over without reading the file.

    The report and its page are not hashed, because spach-validate rewrites them.
    """
    files = [file for file in sorted(staging.iterdir()) if file.name not in (MANIFEST, *REWRITTEN)]
    return {file.name: known.get(file.name) or _file_entry(file) for file in files}


def _file_entry(file: Path) -> FileEntry:
    flush(file)
    return FileEntry(sha256=sha256_of(file), bytes=file.stat().st_size)


def seal(staging: Path, manifest: Manifest, known: FileDigests = MappingProxyType({})) -> Manifest:
    """Write `manifest` with the hashes of the files in `staging`, and flush everything to disk.

    `known`: an earlier result of `digest_files` for files that have not changed since.
    """
    return _sealed(staging, msgspec.structs.replace(manifest, files=dict(digest_files(staging, known))).content())


def seal_as(kind: DirectoryKind, staging: Path, manifest: Manifest) -> Manifest:
    """`seal` a directory of another kind that opens as a bundle too."""
    digests = dict(digest_files(staging))
    return _sealed(staging, {"kind": kind.kind, **msgspec.structs.replace(manifest, files=digests).content()})


def seal_again(staging: Path, source: Path, **sections: msgspec.Struct | str) -> Manifest:
    """`seal` a copy of the bundle at `source`, with `sections` replaced in or added to its manifest.

    All other fields of that manifest are kept, those of later versions too.
    """
    content = read_json(source / MANIFEST)
    kept = {name: value for name, value in content.items() if name != "files"}
    made = {"files": dict(digest_files(staging)), **sections}
    return _sealed(staging, {**kept, **{name: msgspec.to_builtins(made[name]) for name in (*sections, "files")}})


def _sealed(staging: Path, content: Mapping[str, Any]) -> Manifest:
    text = json_text(content) + "\n"
    manifest = Manifest.parse(text, str(staging / MANIFEST))
    (staging / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
    for file in staging.iterdir():
        flush(file)
    return manifest


def _write_error(target: Path, error: OSError) -> BundleError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BundleError(f"No space left while writing {target}; nothing was changed there.", "Free some space.")
    return BundleError(f"{target} cannot be written ({error.strerror or error}).", "Choose another --output.")


def _staging_prefix(target: Path) -> str:
    return f".{short_name(target)}.partial-{socket.gethostname()}-"


def _staging_path(target: Path) -> Path:
    return target.absolute().parent / f"{_staging_prefix(target)}{draft_name()}"


def remove_leftovers(target: Path) -> None:
    """Delete staging directories that killed exports to the same target left on this host."""
    prefix = _staging_prefix(target)
    for sibling in target.absolute().parent.iterdir():
        if sibling.name.startswith(prefix) and sibling.is_dir() and not sibling.is_symlink():
            pid = sibling.name.removeprefix(prefix).split("-")[0]
            if pid.isdigit() and not is_alive(int(pid)):
                shutil.rmtree(sibling, ignore_errors=True)

"""What a file is that is no plan: recognised by its first bytes, with what to do with it."""

from __future__ import annotations

import codecs
import dataclasses
import zipfile
from pathlib import Path

from spach_deploy.doctor.plan_file import json_prefix

_HEAD_BYTES = 4096
_EXPORT = "Export it: spach-export --checkpoint {path} --fp16."
_GIVE = "Give a bundle or the engine.plan that spach-export wrote."


@dataclasses.dataclass(frozen=True)
class OtherFile:
    """`kind` completes "It is ..."; `advice` is a sentence with the next step. `is_container`: a plan may be inside."""

    kind: str
    advice: str = _GIVE
    is_container: bool = False


def what_it_is(path: Path) -> OtherFile:
    """The kind of a file that holds no plan. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for recognise in (_nothing, _pointer, _archive, _metadata_only, _tensors, _graph, _well_known, _text):
        if (found := recognise(head, path)) is not None:
            return found
    return OtherFile("not a TensorRT plan: it does not begin as one, and no other kind is recognised")


def _nothing(head: bytes, path: Path) -> OtherFile | None:
    if not head:
        return OtherFile("empty", "Export it again, or copy it again: the disk may have been full.")
    if not head.strip(b"\0"):
        return OtherFile("nothing but zeros where a plan begins", "Copy it again: a transfer was cut off.")
    return None


def _pointer(head: bytes, path: Path) -> OtherFile | None:
    """What git checks out in place of a large file where git-lfs is not installed."""
    if head.startswith(b"version https://git-lfs"):
        return OtherFile("a Git LFS pointer, not the file itself", f"Fetch it: git lfs pull --include {path.name}.")
    return None


def _archive(head: bytes, path: Path) -> OtherFile | None:
    if head[:2] == b"PK":
        return _zip(path)
    if head[257:262] == b"ustar":
        return OtherFile("a tar archive", "Unpack it, and give what is in it.", is_container=True)
    compressed = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd", b"BZ": "bzip2", b"\xfd7": "xz"}
    name = compressed.get(head[:2])
    return OtherFile(f"compressed with {name}", "Decompress it, and give what comes out.") if name else None


def _zip(path: Path) -> OtherFile:
    """Only the list of names is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return OtherFile("a zip archive that is damaged", "Copy it again.")
    if any(name.endswith("data.pkl") for name in names):
        return OtherFile("a PyTorch checkpoint", _EXPORT.format(path=path), is_container=True)
    if names and all(name.endswith(".npy") for name in names):
        return OtherFile("a NumPy archive, such as a bundle's golden.npz")
    return OtherFile("a zip archive", "Unpack it, and give the bundle or plan that is in it.", is_container=True)


def _tensors(head: bytes, path: Path) -> OtherFile | None:
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length <= path.stat().st_size - 8:
        return OtherFile("a checkpoint of safetensors", _EXPORT.format(path=path), is_container=True)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        kind = "a Python pickle, such as an old PyTorch checkpoint"
        return OtherFile(kind, _EXPORT.format(path=path), is_container=True)
    if head[:6] == b"\x93NUMPY":
        return OtherFile("a NumPy array")
    return None


def _graph(head: bytes, path: Path) -> OtherFile | None:
    """ONNX is a protobuf without a magic number: field 1, the IR version, then one of the fields that can follow it."""
    follows = {0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72}
    if head[:1] != b"\x08" or len(head) < 3 or not 1 <= head[1] < 32 or head[2] not in follows:
        return None
    advice = "Give the bundle that it belongs to, or its engine.plan."
    return OtherFile("an ONNX graph, not a plan", advice, is_container=True)


def _metadata_only(head: bytes, path: Path) -> OtherFile | None:
    """Such a prefix with nothing of a plan behind it."""
    if head[4:5] != b"{" or (length := json_prefix(_start(path, 1 << 20))) is None:
        return None
    behind = path.stat().st_size - 4 - length
    kind = f"{length:,} bytes of JSON metadata, as Ultralytics puts before a plan, with no plan behind it"
    return OtherFile(f"{kind} ({behind:,} bytes follow)", "Export it again where it was made.")


def _start(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _well_known(head: bytes, path: Path) -> OtherFile | None:
    kinds = {
        b"\x7fELF": "a compiled program or library",
        b"\x89HDF": "an HDF5 file",
        b"\x89PNG": "a PNG picture",
        b"\xff\xd8\xff": "a JPEG picture",
        b"%PDF": "a PDF document",
        b"GGUF": "a GGUF file",
    }
    found = next((kind for magic, kind in kinds.items() if head.startswith(magic)), None)
    if head[4:8] == b"TFL3":
        found = "a TensorFlow Lite model"
    return OtherFile(found) if found else None


def _text(head: bytes, path: Path) -> OtherFile | None:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the end may be in the middle of a character
    except UnicodeDecodeError:
        return None
    if not all(character.isprintable() or character.isspace() for character in text):
        return None
    if text.lstrip()[:1] == "<":
        return OtherFile("a page of HTML or XML, as a failed download leaves", "Download it again.")
    if b'"weight_map"' in head or path.name.endswith(".index.json"):
        return OtherFile("the index of a checkpoint in several files", _EXPORT.format(path=path))
    return OtherFile("a text file")

"""What a file contains, by its bytes: a TensorRT plan (flavour, version, GPUs, completeness), or some other known kind.

The plan header is not fully documented. What is read, and the source:

- `ftrt`, TensorRT from 8.6 on: a serialization version at byte 4; where that is 0, the four numbers of the product's
  version at bytes 24 to 27 (NVIDIA/TensorRT, samples/common/sampleEngines.cpp, which prints them for `trtexec
  --getPlanVersionOnly`). A published dump has the size in bytes at byte 16; it is used as a hint only. No known field
  has the GPU.
- `ptrt`, TensorRT up to 8.5: a serialization version at byte 8; three are known (NVIDIA/TensorRT issue 3073).
- `vtrt`, TensorRT for RTX: size at byte 16, version at 24 to 27; after a second `vtrt` at byte 28, one bit for each
  compute capability that it was built for (found by building for each with 1.7.1).
- Metadata may precede a plan: four bytes of length and JSON (Ultralytics), or anything else (NVIDIA/TensorRT issue 1751
  suggests it). A plan is searched for in the first megabyte.

All this serves explanations only: TensorRT decides whether a plan loads.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import zipfile
from pathlib import Path

from spach_deploy.options.specs import ComputeCapability, Flavour
from spach_deploy.runtime.devices import RTX_CAPABILITIES
from spach_deploy.runtime.plan_identity import HEADER_BYTES, PlanIdentity, plan_identity

SEARCHED_BYTES = 1 << 20
"""How far into a file to search for a plan."""

_RTX, _ORDINARY, _OLD = b"vtrt", b"ftrt", b"ptrt"
_OLD_VERSIONS = {205: "8.2", 213: "8.4", 232: "8.5"}
_PLAUSIBLE_MAJORS = range(8, 16)
_MOST_BYTES = 1 << 40
_LONGEST_JSON = 1 << 24


@dataclasses.dataclass(frozen=True)
class PlanFile:
    """A plan in a file, as far as its bytes tell.

    `offset`: where the plan begins; `before`: in words, what precedes it. `version`: four numbers where the header has
    them. `gpus`: None where the bytes do not tell. `newer_gpus`: it also carries code that newer GPUs can compile.
    `missing_bytes`, `surplus_bytes`: against the size in the header; `perhaps_cut`: the same where that size is only a
    hint.
    """

    flavour: Flavour
    version: str | None
    head: bytes
    total_bytes: int
    offset: int = 0
    before: str = ""
    gpus: tuple[ComputeCapability, ...] | None = None
    newer_gpus: bool = False
    missing_bytes: int = 0
    surplus_bytes: int = 0
    perhaps_cut: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether TensorRT can load the file as it is."""
        return not (self.offset or self.missing_bytes or self.surplus_bytes)


def find_plan(path: Path) -> PlanFile | None:
    """The plan in a file; None where none is found. Raises OSError where the file cannot be read."""
    total = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(SEARCHED_BYTES)
        offset, before = _locate(start, total)
        if offset is None:
            return None
        file.seek(offset)
        head = file.read(HEADER_BYTES)
    return _read(head, total, offset, before)


def _locate(start: bytes, total: int) -> tuple[int | None, str]:
    """Offset of the plan (None without one), and in words what precedes it."""
    if start[:4] in (_RTX, _ORDINARY, _OLD):
        return 0, ""
    length = json_prefix(start)
    if length is not None and start[4 + length : 8 + length] in (_RTX, _ORDINARY, _OLD):
        return 4 + length, f"{4 + length:,} bytes of JSON with their length, as Ultralytics writes them"
    for offset in _candidates(start):
        if _is_plausible(start[offset : offset + HEADER_BYTES], total - offset):
            return offset, f"{offset:,} bytes of another tool's"
    return None, ""


def json_prefix(start: bytes) -> int | None:
    """Length of the JSON that follows a 4-byte length at the start of a file; None without one."""
    length = int.from_bytes(start[:4], "little")
    if not 2 <= length <= min(_LONGEST_JSON, len(start) - 4) or start[4:5] != b"{":
        return None
    try:
        json.loads(start[4 : 4 + length])
    except (ValueError, RecursionError):
        return None
    return length


def _candidates(start: bytes) -> list[int]:
    """Offsets of the magic numbers, ascending."""
    found = []
    for magic in (_RTX, _ORDINARY):
        offset = start.find(magic)
        while offset >= 0:
            found.append(offset)
            offset = start.find(magic, offset + 1)
    return sorted(found)


def _is_plausible(head: bytes, total: int) -> bool:
    """Whether a header follows a magic number in the middle of a file, where any bytes may happen to spell one."""
    if len(head) < HEADER_BYTES or int.from_bytes(head[4:8], "little"):
        return False
    if head[:4] == _RTX:
        return head[28:32] == _RTX or int.from_bytes(head[16:24], "little") == total
    return head[24] in _PLAUSIBLE_MAJORS


def _read(head: bytes, total: int, offset: int, before: str) -> PlanFile:
    identity = plan_identity(head, total - offset)
    assert identity.flavour is not None
    declared = int.from_bytes(head[16:24], "little") if len(head) >= HEADER_BYTES else HEADER_BYTES
    excess = (total - offset) - declared
    plan = PlanFile(identity.flavour, _version(head, identity), head, total, offset, before)
    if len(head) < HEADER_BYTES:
        return dataclasses.replace(plan, missing_bytes=-excess)
    if head[:4] == _ORDINARY:
        return dataclasses.replace(plan, perhaps_cut=excess < 0 and declared < _MOST_BYTES)
    if head[:4] == _OLD:
        return plan
    gpus, newer = _rtx_gpus(head)
    missing, surplus = max(0, -excess), max(0, excess)
    return dataclasses.replace(plan, gpus=gpus, newer_gpus=newer, missing_bytes=missing, surplus_bytes=surplus)


def _version(head: bytes, identity: PlanIdentity) -> str | None:
    if head[:4] == _OLD:
        return _OLD_VERSIONS.get(head[8]) if len(head) > 8 else None
    if identity.version is None or int.from_bytes(head[4:8], "little"):
        return None
    return ".".join(str(number) for number in head[24:28])


def _rtx_gpus(head: bytes) -> tuple[tuple[ComputeCapability, ...] | None, bool]:
    """The GPUs whose bits are set, and whether the next bit, for newer GPUs, is set."""
    bits = int.from_bytes(head[32:36], "little")
    beyond = len(RTX_CAPABILITIES)
    if head[28:32] != _RTX or not bits or bits >> (beyond + 1):
        return None, False
    gpus = tuple(gpu for position, gpu in enumerate(RTX_CAPABILITIES) if bits >> position & 1)
    return gpus, bool(bits >> beyond & 1)


_HEAD_BYTES = 4096
_EXPORT = "Export it: spach-export --checkpoint {path} --fp16."
_GIVE = "Give a bundle or the engine.plan that spach-export wrote."


@dataclasses.dataclass(frozen=True)
class OtherFile:
    """A file that holds no plan. `kind` completes "It is ..."; `advice`: the next step. `is_container`: a plan may be
    inside.
    """

    kind: str
    advice: str = _GIVE
    is_container: bool = False


def identify_other_file(path: Path) -> OtherFile:
    """What a file without a plan is. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for detect in _DETECTORS:
        if (found := detect(head, path)) is not None:
            return found
    return OtherFile("not a TensorRT plan: it does not begin as one, and no other kind is recognised")


def _detect_empty(head: bytes, path: Path) -> OtherFile | None:
    if not head:
        return OtherFile("empty", "Export it again, or copy it again: the disk may have been full.")
    if not head.strip(b"\0"):
        return OtherFile("nothing but zeros where a plan begins", "Copy it again: a transfer was cut off.")
    return None


def _detect_lfs_pointer(head: bytes, path: Path) -> OtherFile | None:
    """The text that git checks out for a large file where git-lfs is not installed."""
    if head.startswith(b"version https://git-lfs"):
        return OtherFile("a Git LFS pointer, not the file itself", f"Fetch it: git lfs pull --include {path.name}.")
    return None


def _detect_archive(head: bytes, path: Path) -> OtherFile | None:
    if head[:2] == b"PK":
        return _zip(path)
    if head[257:262] == b"ustar":
        return OtherFile("a tar archive", "Unpack it, and give what is in it.", is_container=True)
    compressed = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd", b"BZ": "bzip2", b"\xfd7": "xz"}
    name = compressed.get(head[:2])
    return OtherFile(f"compressed with {name}", "Decompress it, and give what comes out.") if name else None


def _zip(path: Path) -> OtherFile:
    """What a zip archive is, by the names in it."""
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


def _detect_tensors(head: bytes, path: Path) -> OtherFile | None:
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length <= path.stat().st_size - 8:
        return OtherFile("a checkpoint of safetensors", _EXPORT.format(path=path), is_container=True)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        kind = "a Python pickle, such as an old PyTorch checkpoint"
        return OtherFile(kind, _EXPORT.format(path=path), is_container=True)
    if head[:6] == b"\x93NUMPY":
        return OtherFile("a NumPy array")
    return None


def _detect_graph(head: bytes, path: Path) -> OtherFile | None:
    """ONNX is a protobuf without a magic number: field 1, the IR version, then one of the fields that can follow it."""
    follows = {0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72}
    if head[:1] != b"\x08" or len(head) < 3 or not 1 <= head[1] < 32 or head[2] not in follows:
        return None
    advice = "Give the bundle that it belongs to, or its engine.plan."
    return OtherFile("an ONNX graph, not a plan", advice, is_container=True)


def _detect_metadata_only(head: bytes, path: Path) -> OtherFile | None:
    """Ultralytics' JSON metadata without a plan after it."""
    if head[4:5] != b"{" or (length := json_prefix(_start(path, 1 << 20))) is None:
        return None
    behind = path.stat().st_size - 4 - length
    kind = f"{length:,} bytes of JSON metadata, as Ultralytics puts before a plan, with no plan behind it"
    return OtherFile(f"{kind} ({behind:,} bytes follow)", "Export it again where it was made.")


def _start(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _detect_well_known(head: bytes, path: Path) -> OtherFile | None:
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


def _detect_text(head: bytes, path: Path) -> OtherFile | None:
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


_DETECTORS = (
    _detect_empty,
    _detect_lfs_pointer,
    _detect_archive,
    _detect_metadata_only,
    _detect_tensors,
    _detect_graph,
    _detect_well_known,
    _detect_text,
)

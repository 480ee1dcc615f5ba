"""Read checkpoint files (.pth, .pt, .safetensors, or several with an index) as plain data, without running their code.

- Pickles are read by `torch.load(weights_only=True)`, which builds tensors and containers itself, and no other names
  than those in `pickles.PLAIN_DATA`.
- The kind of a file is found by its content, not by its name. Web pages, large-file pointers and incomplete downloads
  are common, and get messages of their own.
- Memory is checked before reading: sizes in archives and headers in this file, what a pickle would build in
  `pickles.py`.
- A checkpoint in several files has an index in Hugging Face's format, `model.safetensors.index.json`, in the same
  folder: {"metadata": {...}, "weight_map": {tensor: file}}.

torch is imported only where tensors are read: an export's cache calls `checkpoint_files` before torch is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import stat
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from spach_deploy.common.errors import CheckpointError
from spach_deploy.common.files import sha256_of, utf8_path
from spach_deploy.models.pickles import PICKLE_BYTES, PLAIN_DATA, check_pickle

if TYPE_CHECKING:
    import torch

_SAVE_WEIGHTS = "Where it was made, save the weights alone: torch.save(model.state_dict(), 'weights.pth')."
_GET_AGAIN = "Copy or download it again."
_SAVE_AGAIN = "Load it where it was made, and save it with torch.save."
_KINDS = ("*.index.json", "*.safetensors", "*.pth", "*.pt", "*.ckpt", "*.bin")
_LOCAL_LENGTHS = 26  # bytes of a zip's local header before the lengths of name and extra field, which end it
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object itself, keys of its storages
_INFLATED_BYTES, _INFLATED_TIMES = 64_000_000, 16
"""Largest size of an archive's content: so many bytes, or so many times the file. Weights compress
little, zeros much.
"""


def read_checkpoint(path: Path) -> tuple[Any, str]:
    """Content of a `.pth`, `.pt` or `.safetensors` file, with tensors on the CPU, and the file's SHA-256 (hex).

    Raises CheckpointError, with the reason and the next step, for a file that is none of these, is damaged, or would
    become much larger in memory.
    """
    kind = _recognise(path)
    load = {"zip": _zip_reader, "pickle": _pickle_reader, "safetensors": _safetensors_reader}[kind](path)
    with ThreadPoolExecutor(max_workers=1) as pool:
        digest = pool.submit(sha256_of, path)  # while it is read: both are one pass over the file
        content = load()
        try:
            return content, digest.result()
        except OSError as error:
            raise CheckpointError(f"Checkpoint {path} cannot be read: {error.strerror}.", _GET_AGAIN) from error


def read_shards(index: CheckpointIndex) -> tuple[dict[str, Any], str]:
    """Tensors of a checkpoint in several files, and the SHA-256 of what sha256sum prints for index and files.

    Raises CheckpointError as `read_checkpoint` does, and where a file does not hold exactly the tensors of the index.
    """
    tensors: dict[str, Any] = {}
    digests = [f"{sha256_of(index.path)}  {index.path.name}\n"]
    for shard in index.shards:
        content, digest = read_checkpoint(shard)
        found = content if isinstance(content, Mapping) else {}
        if wrong := sorted(index.names_in(shard) ^ {str(name) for name in found}):
            raise CheckpointError(
                f"{shard} does not hold what {index.path.name} says: they differ in {len(wrong)} names ({wrong[0]}).",
                "Take the index and all files that it names from one download.",
            )
        tensors.update(found)
        digests.append(f"{digest}  {shard.name}\n")
    return tensors, hashlib.sha256("".join(digests).encode(errors="surrogateescape")).hexdigest()


def _recognise(path: Path) -> str:
    """`zip`, `pickle` or `safetensors`; CheckpointError for everything else."""
    head, size = _head(path)
    if size == 0:
        raise CheckpointError(f"Checkpoint {path} is empty.", _GET_AGAIN)
    for reason, hint, matches in _NOT_CHECKPOINTS:
        if matches(head):
            raise CheckpointError(f"Checkpoint {path} is {reason}.", hint)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:9] == b"{":  # tested before pickles, because the length of a header can begin like a pickle
        _check_header(path, int.from_bytes(head[:8], "little"), size)
        return "safetensors"
    if head[:1] == b"\x80":
        return "pickle"
    raise CheckpointError(
        f"Checkpoint {path} is not a PyTorch or safetensors file: it begins with {head[:8]!r}.",
        "Give a .pth, .pt or .safetensors file.",
    )


def _head(path: Path) -> tuple[bytes, int]:
    """The first 512 bytes, and the size in bytes."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"Checkpoint {path} is a directory.", _file_in(path))
        if not stat.S_ISREG(status.st_mode):  # a pipe or device would be read forever
            raise CheckpointError(f"Checkpoint {path} is not a regular file.", "Copy it to a file first.")
        with path.open("rb") as file:
            return file.read(512), status.st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {path}.", "Check the path.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"Checkpoint {path} cannot be read: {reason}.", "Check the path.") from error


def _file_in(folder: Path) -> str:
    """Hint: the checkpoint in a directory that may be meant."""
    if (folder / ".metadata").is_file():
        return "Where it was made, join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE."
    files = sorted(file.name for kind in _KINDS for file in folder.glob(kind))
    return f"Name the file in it, such as {files[0]}." if files else "Name the file in it."


def _is_web_page(head: bytes) -> bool:
    return head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml"))


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


_NOT_CHECKPOINTS: tuple[tuple[str, str, Callable[[bytes], bool]], ...] = (
    (
        "a Git LFS pointer, not the file it points to",
        "Fetch the file with `git lfs pull`.",
        lambda head: head.startswith(b"version https://git-lfs"),
    ),
    ("a web page, not a checkpoint", "Download the file itself, not the page about it.", _is_web_page),
    (
        "a tar archive, which is either packed or of a PyTorch older than 1.0",
        f"Unpack it. {_SAVE_WEIGHTS}",
        lambda head: _is_tar(head),
    ),
    (
        "compressed",
        "Unpack it first.",
        lambda head: head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")),
    ),
)


def _zip_reader(path: Path) -> Callable[[], Any]:
    """Reader of torch.save's format since 1.6: a zip archive of a pickle and the tensors' bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(path, members)
            for member in members:
                if _is_pickle(member):
                    check_pickle(path, _bytes_of(path, archive, member), 1)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged directory can raise more than BadZipFile
        raise CheckpointError(f"Checkpoint {path} is cut short or damaged ({error}).", _GET_AGAIN) from error
    return functools.partial(_load_zip, path, is_mapped=all(map(_is_stored, members)))


def _bytes_of(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Bytes of a member, also of one that is stored without a checksum, which zipfile refuses."""
    if not _is_stored(member):
        return archive.read(member)
    with path.open("rb") as file:
        file.seek(member.header_offset + _LOCAL_LENGTHS)
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(name + extra, os.SEEK_CUR)
        return file.read(member.file_size)


def _check_members(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """CheckpointError for archives of other kinds, too large ones, and those that differ from their directory."""
    names = [member.filename.lower() for member in members]  # as torch compares them
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"Checkpoint {path} is a TorchScript program, not weights.", _SAVE_WEIGHTS)
    if not any(_is_pickle(member) for member in members):
        raise CheckpointError(f"Checkpoint {path} is a zip archive but not one of torch.save.", _SAVE_WEIGHTS)
    if len(set(names)) < len(names):
        raise CheckpointError(f"Checkpoint {path} is damaged: two of its members have one name.", _GET_AGAIN)
    if {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise CheckpointError(f"Checkpoint {path} is packed in a way that torch.load cannot read.", _SAVE_AGAIN)
    _check_sizes(path, members)


def _check_sizes(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    size, inflated = path.stat().st_size, sum(member.file_size for member in members)
    if sum(member.compress_size for member in members) > size:
        raise CheckpointError(f"Checkpoint {path} is damaged: its members overlap.", _GET_AGAIN)
    if any(_is_stored(member) and member.file_size != member.compress_size for member in members):
        raise CheckpointError(f"Checkpoint {path} is damaged: a member's two sizes differ.", _GET_AGAIN)
    pickle = max(member.file_size for member in members if _is_pickle(member))
    if pickle > PICKLE_BYTES:
        raise CheckpointError(
            f"Checkpoint {path} has a pickle of {pickle / 1e6:,.0f} MB, which names tensors and needs no more than "
            f"{PICKLE_BYTES / 1e6:,.0f}.",
            _SAVE_WEIGHTS,
        )
    if inflated > max(_INFLATED_BYTES, _INFLATED_TIMES * size):
        raise CheckpointError(
            f"Checkpoint {path} has {size / 1e6:,.1f} MB and would become {inflated / 1e6:,.0f} MB, as no weights do.",
            _SAVE_AGAIN,
        )


def _is_pickle(member: zipfile.ZipInfo) -> bool:
    return member.filename.lower().endswith("/data.pkl")


def _is_stored(member: zipfile.ZipInfo) -> bool:
    return member.compress_type == zipfile.ZIP_STORED


def _load_zip(path: Path, *, is_mapped: bool) -> Any:
    """Content of a zip archive. `is_mapped`: tensors are memory-mapped, which needs members without compression."""
    with zipfile.ZipFile(path) as archive:
        has_checksums = any(member.CRC for member in archive.infolist())  # torch.save can leave them out
        broken = _broken(path, archive) if has_checksums else None  # torch itself does not compare them
    if broken is not None:
        raise CheckpointError(f"Checkpoint {path} is damaged: {broken} has a wrong checksum.", _GET_AGAIN)
    if path.suffix == ".safetensors":  # by this name alone, torch.load would take it for the other format
        return _load_stream(path)
    with utf8_path(path) as name:
        return _torch_load(path, name, mmap=is_mapped)


def _broken(path: Path, archive: zipfile.ZipFile) -> str | None:
    try:
        return archive.testzip()
    except Exception as error:  # zlib has errors of its own
        raise CheckpointError(f"Checkpoint {path} is cut short or damaged ({error}).", _GET_AGAIN) from error


def _pickle_reader(path: Path) -> Callable[[], Any]:
    """Reader of torch.save's format before 1.6: pickles one after the other, then the tensors' bytes."""
    with path.open("rb") as file:
        check_pickle(path, file.read(PICKLE_BYTES + 1), _LEGACY_PICKLES)
    return functools.partial(_load_stream, path)


def _load_stream(path: Path) -> Any:
    """Content of a file in either format of torch.save, through an open file, which the older format needs."""
    with path.open("rb") as file:
        return _torch_load(path, file, mmap=False)


def _torch_load(path: Path, source: str | BinaryIO, mmap: bool) -> Any:
    import torch

    try:
        with torch.serialization.safe_globals(list(PLAIN_DATA)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise _explain(path, error) from error


def _explain(path: Path, error: Exception) -> CheckpointError:
    text = str(error)
    if refused := re.search(r"GLOBAL ([\w.<>]+)|but got <class '(\w+\.[\w.]+)'>", text):
        reason = f"asks for {refused[1] or refused[2]}, and only tensors and plain data are read, so that no code runs"
        return CheckpointError(f"Checkpoint {path} was refused: it {reason}.", _SAVE_WEIGHTS)
    reason = "cut short, damaged, or a pickle that torch.save did not write"
    return CheckpointError(f"Checkpoint {path} cannot be read: it is {reason} ({_last_line(text)}).", _GET_AGAIN)


def _last_line(text: str) -> str:
    """The line of a long message of torch that says what happened."""
    cause = text.rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
    lines = [line.strip() for line in cause.splitlines() if line.strip()]
    return lines[0].rstrip(".")[:160] if lines else "no further reason given"


def _check_header(path: Path, header_bytes: int, size: int) -> None:
    if 8 + header_bytes > size:
        raise CheckpointError(f"Checkpoint {path} is cut short: its header alone is longer.", _GET_AGAIN)
    if header_bytes > PICKLE_BYTES:
        raise CheckpointError(
            f"Checkpoint {path} has a header of {header_bytes / 1e6:,.0f} MB, which names tensors and needs no more "
            f"than {PICKLE_BYTES / 1e6:,.0f}.",
            _GET_AGAIN,
        )


def _safetensors_reader(path: Path) -> Callable[[], Any]:
    return functools.partial(_load_safetensors, path)


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    try:
        with utf8_path(path) as name:
            tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(name, device="cpu")
    except Exception as error:  # safetensors has a class of its own, and torch raises others for unknown dtypes
        raise CheckpointError(f"Checkpoint {path} is cut short or damaged ({error}).", _GET_AGAIN) from error
    return tensors


_SUFFIX = ".index.json"
_SHARD = re.compile(r"-(\d{2,9})-of-(\d{2,9})\.\w+")
_LARGEST = 32_000_000  # bytes; some eighty a tensor
_ONE_DOWNLOAD = "Put the index and all files that it names into one folder, from one download."


@dataclasses.dataclass(frozen=True)
class CheckpointIndex:
    """An index file. `weight_map`: by tensor, the name of the file in the same folder that holds it."""

    path: Path
    weight_map: dict[str, str]

    @property
    def shards(self) -> tuple[Path, ...]:
        """Paths of the files that hold tensors."""
        return tuple(self.path.parent / name for name in sorted(set(self.weight_map.values())))

    def names_in(self, shard: Path) -> set[str]:
        """Names of the tensors that a file holds, by the index."""
        return {name for name, file in self.weight_map.items() if file == shard.name}


def find_index(path: Path) -> CheckpointIndex | None:
    """The index at `path`, or the index in its folder that names the file `path`; None for a checkpoint in one file.

    Raises CheckpointError for an index that is not valid, and for one of several files whose index is missing.
    """
    try:
        if not path.is_file():
            return None
        if _is_json(path):
            return _read(path)
        in_folder = [file for file in sorted(path.parent.glob(f"*{_SUFFIX}")) if file.is_file()]
    except OSError:
        return None  # reading the checkpoint will raise an error
    for file in in_folder:
        if path.name in _weight_map(file).values():
            return _read(file)
    if (shard := _SHARD.search(path.name)) and int(shard[2]) > 1:
        raise CheckpointError(
            f"Checkpoint {path} is one file of {int(shard[2])}, and no index beside it names it (*{_SUFFIX}).",
            _ONE_DOWNLOAD,
        )
    return None


def checkpoint_files(path: Path) -> tuple[Path, ...]:
    """All files that the checkpoint at `path` consists of. CheckpointError as in `find_index`."""
    index = find_index(path)
    return (path,) if index is None else (index.path, *index.shards)


def _is_json(path: Path) -> bool:
    """Whether a file begins like JSON. A safetensors file may too: its first byte is part of a length."""
    with path.open("rb") as file:
        head = file.read(64)
    return head.lstrip()[:1] == b"{" and int.from_bytes(head[:8], "little") > path.stat().st_size


def _read(path: Path) -> CheckpointIndex:
    weight_map = _weight_map(path)
    if not weight_map:
        raise CheckpointError(
            f"Checkpoint {path} is JSON without a weight_map of tensors and files, so it is no index of a checkpoint.",
            "Give a .pth, .pt or .safetensors file, or an index.",
        )
    for name in dict.fromkeys(weight_map.values()):
        if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise CheckpointError(f"Index {path} names {name!r}, which is no file beside it.", _ONE_DOWNLOAD)
        if not (path.parent / name).is_file():
            raise CheckpointError(f"Index {path} names {name}, which is not beside it.", _ONE_DOWNLOAD)
    return CheckpointIndex(path, weight_map)


def _weight_map(path: Path) -> dict[str, str]:
    """By tensor, its file's name; empty where the file at `path` is no index."""
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
        content: Any = json.loads(text) if len(text) <= _LARGEST else None
    except (OSError, ValueError, RecursionError):
        return {}
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        return {}
    return found

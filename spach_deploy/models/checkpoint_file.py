"""Checkpoint files to plain data, without running code from them.

Pickles go through `torch.load(weights_only=True)`, which builds tensors and containers itself and knows no
other name than those of `plain_data`. A file is recognised by its content, as names lie: downloads that are
web pages, large-file pointers or cut short are common, and each is explained.
"""

from __future__ import annotations

import hashlib
import re
import stat
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from spach_deploy.errors import CheckpointError
from spach_deploy.models.plain_data import PLAIN_DATA

_SAVE_WEIGHTS = "Where it was made, save the weights alone: torch.save(model.state_dict(), 'weights.pth')."
_GET_AGAIN = "Copy or download it again."


def read_checkpoint(path: Path) -> tuple[Any, str]:
    """Content of a `.pth`, `.pt` or `.safetensors` file, tensors on the CPU, and the file's sha256.

    CheckpointError, with the reason and the next step, for anything that is not one or is damaged.
    """
    kind = _recognise(path)
    load = {"zip": _load_zip, "pickle": _load_stream, "safetensors": _load_safetensors}[kind]
    with ThreadPoolExecutor(max_workers=1) as pool:
        digest = pool.submit(_sha256, path)  # beside the reading: both are a pass over the file
        content = load(path)
        try:
            return content, digest.result()
        except OSError as error:
            raise CheckpointError(f"Checkpoint {path} cannot be read: {error.strerror}.", _GET_AGAIN) from error


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
    if head[:1] == b"\x80":
        return "pickle"
    if head[8:9] == b"{":
        _check_safetensors_size(path, int.from_bytes(head[:8], "little"), size)
        return "safetensors"
    raise CheckpointError(
        f"Checkpoint {path} is not a PyTorch or safetensors file: it begins with {head[:8]!r}.",
        "Give a .pth, .pt or .safetensors file.",
    )


def _head(path: Path) -> tuple[bytes, int]:
    """The first 512 bytes, and the size in bytes."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"Checkpoint {path} is a directory.", "Name the file in it.")
        if not stat.S_ISREG(status.st_mode):  # a pipe or device would be read forever
            raise CheckpointError(f"Checkpoint {path} is not a regular file.", "Copy it to a file first.")
        with path.open("rb") as file:
            return file.read(512), status.st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {path}.", "Check the path.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"Checkpoint {path} cannot be read: {reason}.", "Check the path.") from error


def _is_web_page(head: bytes) -> bool:
    return head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml"))


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
        lambda head: head[257:262] == b"ustar",
    ),
    (
        "compressed",
        "Unpack it first.",
        lambda head: head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")),
    ),
)


def _load_zip(path: Path) -> Any:
    """A file of torch.save since 1.6: a zip archive whose members are a pickle and the tensors' bytes."""
    _check_zip(path)
    if path.suffix == ".safetensors":  # by this name alone, torch.load would take it for the other format
        return _load_stream(path)
    return _torch_load(path, path, mmap=True)


def _load_stream(path: Path) -> Any:
    """Either format through an open file; torch.save's before 1.6, pickles in a row, has no other way."""
    with path.open("rb") as file:
        return _torch_load(path, file, mmap=False)


def _check_zip(path: Path) -> None:
    """Refuse other archives and damaged ones; torch itself does not compare the members' checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            has_checksums = any(member.CRC for member in archive.infolist())  # torch.save can leave them out
            broken = archive.testzip() if has_checksums else None
    except Exception as error:  # a damaged directory can raise much more than BadZipFile
        raise CheckpointError(f"Checkpoint {path} is cut short or damaged ({error}).", _GET_AGAIN) from error
    if broken is not None:
        raise CheckpointError(f"Checkpoint {path} is damaged: {broken} has a wrong checksum.", _GET_AGAIN)
    if any(name.endswith("/constants.pkl") for name in members):
        raise CheckpointError(f"Checkpoint {path} is a TorchScript program, not weights.", _SAVE_WEIGHTS)
    if not any(name.endswith("/data.pkl") for name in members):
        raise CheckpointError(f"Checkpoint {path} is a zip archive but not one of torch.save.", _SAVE_WEIGHTS)


def _torch_load(path: Path, source: Path | BinaryIO, mmap: bool) -> Any:
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
    """The part of torch's long messages that says what happened."""
    cause = text.rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
    lines = [line.strip() for line in cause.splitlines() if line.strip()]
    return lines[0].rstrip(".")[:160] if lines else "no further reason given"


def _check_safetensors_size(path: Path, header_bytes: int, size: int) -> None:
    if 8 + header_bytes > size:
        raise CheckpointError(f"Checkpoint {path} is cut short: its header alone is longer.", _GET_AGAIN)


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(path, device="cpu")
    except Exception as error:  # safetensors raises its own class, torch others for dtypes it lacks
        raise CheckpointError(f"Checkpoint {path} is cut short or damaged ({error}).", _GET_AGAIN) from error
    return tensors


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""What an export depends on, as one digest: content, not times or names."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import spach_deploy
from spach_deploy.errors import CheckpointError
from spach_deploy.models.checkpoint_index import checkpoint_files
from spach_deploy.runtime.processor import all_cpu_flags, processor_name
from spach_deploy.small_files import check_regular
from spach_deploy.specs import ExportOptions
from spach_deploy.tool_versions import tool_versions

HASHED_BYTES = 2_000_000_000
"""Of a folder of images whose content is hashed; a larger one is known by its files' names, sizes and times."""

_BLOCK = 1 << 20
_DRIVER = Path("/proc/driver/nvidia")


def export_key(options: ExportOptions) -> str | None:
    """The digest of everything that decides what an export with `options` writes; None where it cannot be told.

    Options that make an export write somewhere else too, such as a timing cache, are such a case.
    """
    if options.engine.timing_cache is not None or options.quantization.cache is not None:
        return None
    quantization = options.quantization
    inputs = (options.images, options.answers, quantization.calibration, quantization.labels)
    try:
        weights = () if options.model.checkpoint is None else checkpoint_files(options.model.checkpoint)
        content = {
            "options": _plain(options),
            "place": str(options.output.resolve()) if options.output is not None else str(Path.cwd()),
            "files": {str(path): content_digest(path) for path in (*weights, *inputs) if path is not None},
            "code": code_digest(),
            "packages": tool_versions(),
            "machine": machine(),
        }
    except (OSError, CheckpointError):
        return None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Options as JSON, but for those that do not change what is written."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        for name in ("overwrite", "cluster"):
            fields.pop(name, None)
        return fields
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's names and contents. OSError where it cannot be read, or would be for ever."""
    digest = hashlib.sha256()
    if not path.is_dir():
        _add_file(digest, path)
        return digest.hexdigest()
    files = sorted(entry for entry in path.rglob("*") if entry.is_file())
    is_small = sum(file.stat().st_size for file in files) <= HASHED_BYTES
    for file in files:
        digest.update(os.fsencode(f"{file.relative_to(path)}\0{file.stat().st_size}\0"))
        if is_small:
            _add_file(digest, file)
        else:
            digest.update(f"{file.stat().st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _add_file(digest: Any, path: Path) -> None:
    check_regular(path)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)


def code_digest() -> str:
    """Of this package's own files."""
    root = Path(spach_deploy.__file__).parent
    digest = hashlib.sha256()
    for file in _sources(root):
        digest.update(f"{file.relative_to(root)}\0".encode())
        _add_file(digest, file)
    return digest.hexdigest()


def _sources(root: Path) -> Iterator[Path]:
    return (file for file in sorted(root.rglob("*")) if file.is_file() and "__pycache__" not in file.parts)


def machine() -> dict[str, str]:
    """What decides how numbers are computed and which engine is built, beside software."""
    driver = _DRIVER / "version"
    gpus = sorted(entry.name for entry in (_DRIVER / "gpus").iterdir()) if (_DRIVER / "gpus").is_dir() else []
    return {
        "processor": f"{processor_name()} {all_cpu_flags()}",
        "driver": driver.read_text(encoding="utf-8") if driver.is_file() else "",
        "gpus": " ".join(gpus),
    }

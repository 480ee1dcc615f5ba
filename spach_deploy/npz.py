"""Arrays of an npz, judged by its directory and their headers before any of them is read."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.small_files import check_regular

_ENCRYPTED = 1
_WRITTEN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""How NumPy stores arrays."""


def read_npz(path: Path, most_bytes: Mapping[str, int]) -> dict[str, npt.NDArray[Any]]:
    """The arrays named in `most_bytes`, each of at most so many bytes. ValueError, in a few words, for others."""
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            for name, most in most_bytes.items():
                _check(archive, name, most)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in most_bytes}
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except Exception as error:  # zipfile, zlib and NumPy raise what they like for damaged files
        raise ValueError(str(error) or type(error).__name__) from error


def _check(archive: zipfile.ZipFile, name: str, most_bytes: int) -> None:
    member = f"{name}.npy"
    if member not in archive.namelist():
        raise ValueError(f"it has no array '{name}'")
    info = archive.getinfo(member)
    if info.flag_bits & _ENCRYPTED or info.compress_type not in _WRITTEN:
        raise ValueError(f"'{name}' is encrypted or compressed as NumPy does not write it")
    with archive.open(info) as file:
        is_first = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if dtype.hasobject or info.file_size != file.tell() + size:
            raise ValueError(f"'{name}' is not what its header says")
    if size > most_bytes:
        raise ValueError(f"'{name}' is {dtype} {shape}, {size:,} bytes; {most_bytes:,} are read at most")

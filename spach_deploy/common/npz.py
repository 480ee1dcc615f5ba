"""Reading npz files safely: sizes and dtypes are checked from the headers, without NumPy, before any array is read."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.common.files import check_regular

if TYPE_CHECKING:
    import numpy.typing as npt

_ENCRYPTED = 1
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Those that NumPy writes."""

_LENGTH_BYTES = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4, b"\x93NUMPY\x03\x00": 4}
_LONGEST_HEADER = 10_000
"""Characters; NumPy's own limit."""

_DTYPE = re.compile(r"[<>|=]?([biufcSU])(\d{1,9})")


@dataclasses.dataclass(frozen=True)
class Header:
    """Header of an array: dtype as NumPy writes it (`<f4`), and shape."""

    descr: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """NumPy's name of a little-endian float (`float32`); other dtypes as they are written."""
        return f"float{int(self.descr[2:]) * 8}" if re.fullmatch(r"<f\d", self.descr) else self.descr


def read_npz(path: Path, most_bytes: Mapping[str, int]) -> dict[str, npt.NDArray[Any]]:
    """The arrays named in `most_bytes`, each of at most that many bytes. ValueError with a short reason otherwise."""
    import numpy as np

    npz_headers(path, most_bytes)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in most_bytes}
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds for damaged files
        raise ValueError(str(error) or type(error).__name__) from error


def npz_headers(path: Path, most_bytes: Mapping[str, int]) -> dict[str, Header]:
    """The headers of these arrays. ValueError as for `read_npz`; damaged data behind a header is not noticed."""
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            return {name: _header(archive, name, most) for name, most in most_bytes.items()}
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except Exception as error:  # as above
        raise ValueError(str(error) or type(error).__name__) from error


def npz_names(path: Path) -> list[str]:
    """The names of a file's arrays, in order. ValueError as for `read_npz`."""
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except Exception as error:  # as above
        raise ValueError(str(error) or type(error).__name__) from error


def _header(archive: zipfile.ZipFile, name: str, most_bytes: int) -> Header:
    member = f"{name}.npy"
    if member not in archive.namelist():
        raise ValueError(f"it has no array '{name}'")
    info = archive.getinfo(member)
    if info.flag_bits & _ENCRYPTED or info.compress_type not in _COMPRESSIONS:
        raise ValueError(f"'{name}' is encrypted or compressed as NumPy does not write it")
    with archive.open(info) as file:
        length_bytes = _LENGTH_BYTES.get(file.read(8), 0)
        length = int.from_bytes(file.read(length_bytes), "little")
        content = ast.literal_eval(file.read(length).decode()) if 0 < length <= _LONGEST_HEADER else {}
        header, begin = Header(str(content.get("descr")), tuple(content.get("shape", ()))), file.tell()
    size = math.prod(header.shape) * _item_bytes(header.descr)
    if not size >= 0 or info.file_size != begin + size or not _DTYPE.fullmatch(header.descr):
        raise ValueError(f"'{name}' is not what its header says")
    if size > most_bytes:
        shown = f"{header.dtype} {header.shape}, {size:,} bytes"
        raise ValueError(f"'{name}' is {shown}; {most_bytes:,} are read at most")
    return header


def _item_bytes(descr: str) -> int:
    """Bytes of one element; 0 for a dtype that is neither a number nor text."""
    match = _DTYPE.fullmatch(descr)
    return int(match[2]) * (4 if match[1] == "U" else 1) if match else 0

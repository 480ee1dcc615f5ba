"""The plain data that may stand beside tensors in a checkpoint: a short fixed list.

`torch.load(weights_only=True)` builds tensors, numbers, strings and containers itself and refuses every other
name in a pickle. Training code also saves its command line: an argparse.Namespace of numbers, strings, paths,
and what NumPy computed. Each name below stands for a class or function *here or in the standard library* that
only holds values, so nothing that a file asks for acts: NumPy's own functions are not called (a hostile dtype
can crash them), and paths become pure ones, which never touch a disk and can be of another system.
"""

from __future__ import annotations

import argparse
import pathlib
import re
from typing import Any

import numpy as np


class NumpyDtype:
    """What a pickled NumPy dtype says: its code, such as `f8`, and its byte order."""

    def __init__(self, code: str, *_flags: bool) -> None:
        if not (isinstance(code, str) and re.fullmatch(r"[biufSU]\d{1,9}", code)):
            raise ValueError(f"a NumPy dtype {code!r} that is neither number nor string")
        self.code = code
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def __repr__(self) -> str:
        return f"NumpyDtype({self.order}{self.code})"


def numpy_scalar(dtype: NumpyDtype, data: bytes) -> Any:
    """The number or string that a pickled NumPy scalar of `dtype` with the bytes `data` is."""
    if not (isinstance(dtype, NumpyDtype) and isinstance(data, bytes)):
        raise ValueError("a NumPy scalar that is not made of a dtype and bytes")
    if dtype.code[0] == "S":
        return data
    if dtype.code[0] == "U":
        return data.decode("utf-32-be" if dtype.order == ">" else "utf-32-le").rstrip("\0")
    return np.frombuffer(data, np.dtype(dtype.order + dtype.code), count=1)[0].item()


# (what is called, the name that asks for it). NumPy 1 and 2 differ in the module, as Python 3.13 does for
# paths.
PLAIN_DATA: tuple[tuple[Any, str], ...] = (
    (argparse.Namespace, "argparse.Namespace"),
    (NumpyDtype, "numpy.dtype"),
    (numpy_scalar, "numpy.core.multiarray.scalar"),
    (numpy_scalar, "numpy._core.multiarray.scalar"),
    *(
        (pure, f"{module}.{name}")
        for pure, name in (
            (pathlib.PurePosixPath, "PosixPath"),
            (pathlib.PurePosixPath, "PurePosixPath"),
            (pathlib.PureWindowsPath, "WindowsPath"),
            (pathlib.PureWindowsPath, "PureWindowsPath"),
        )
        for module in ("pathlib", "pathlib._local")
    ),
)

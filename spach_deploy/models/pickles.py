"""Safe pickles in checkpoints: refuse those that would take too much memory or time, and allow a short list of names.

`torch.load(weights_only=True)` runs no code from a pickle, but a few bytes can make it build `bytearray(10**11)`, a
text that is encoded as hexadecimal forty times, a tensor of uninitialized memory, or a tuple of tuples that takes years
to hash. `check_pickle` interprets the instructions with sizes in the place of values, and refuses such a file before it
is loaded.

`torch.load(weights_only=True)` builds tensors, numbers, strings and containers, and refuses all other names. Training
code also saves its command line, an argparse.Namespace of numbers, strings, paths and NumPy scalars. `PLAIN_DATA` maps
these names to classes and functions of this module or the standard library that only hold values. NumPy's own functions
are not called, because a hostile dtype can crash them; paths become pure paths, which never touch a disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import pathlib
import pickletools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spach_deploy.common.errors import CheckpointError

PICKLE_BYTES = 32_000_000
"""Largest pickle or header, in bytes. Usual are some hundred for each tensor, and records of the training."""

_INSTRUCTIONS = 1_000_000
"""Most instructions of a pickle. Usual are some twenty for each tensor; Python interprets them, also in torch.load."""

_WORK = 10 * PICKLE_BYTES
"""Largest size of all values of a pickle together; a shared value counts wherever it is used."""

_SAVE_WEIGHTS = "Where it was made, save the weights alone: torch.save(model.state_dict(), 'weights.pth')."


@dataclasses.dataclass
class _Value:
    """Stands for a value: its size, the items of a tuple, the text of a string or a name."""

    size: int = 1
    items: tuple[_Value, ...] = ()
    text: str = ""


def check_pickle(path: Path, content: bytes, count: int) -> None:
    """CheckpointError where one of the first `count` pickles in `content` is damaged or would build too much.

    Fewer pickles than `count` are no error, more bytes than `PICKLE_BYTES` are.
    """
    stream = io.BytesIO(content[:PICKLE_BYTES])
    try:
        for _ in range(count):
            if stream.tell() == len(content):
                return  # torch.load will say what is missing
            _Reader().follow(pickletools.genops(stream))
    except _TooLargeError as error:
        reason = f"{error}, and only tensors and plain data are read"
        raise CheckpointError(f"Checkpoint {path} was refused: it {reason}.", _SAVE_WEIGHTS) from None
    except Exception as error:  # also for instructions that only newer versions of torch.load know
        reason = "cut short, damaged, or a pickle that torch.save did not write"
        raise CheckpointError(
            f"Checkpoint {path} cannot be read: it is {reason} ({error}).", "Copy or download it again."
        ) from error


class _TooLargeError(Exception):
    """The pickle would build too much; the message says what."""


class _Reader:
    """Interprets the instructions that torch.load knows; the first other one raises any exception."""

    def __init__(self) -> None:
        self._stack: list[_Value] = []
        self._marked: list[list[_Value]] = []
        self._memo: dict[int, _Value] = {}
        self._work = 0

    def follow(self, instructions: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> None:
        """Interpret the instructions of one pickle."""
        for number, (instruction, argument, _) in enumerate(instructions):
            if number == _INSTRUCTIONS:
                raise _TooLargeError(f"has more than {_INSTRUCTIONS:,} instructions")
            name = instruction.name
            if name in ("BINPUT", "LONG_BINPUT"):
                self._memo[argument] = self._stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[argument])
            elif name == "GLOBAL":
                self._stack.append(_Value(text=argument.replace(" ", ".")))
            elif name == "MARK":
                self._marked.append(self._stack)
                self._stack = []
            elif name in _TAKES:
                self._take(name, _TAKES[name])
            else:
                self._push(name, argument)

    def _push(self, name: str, argument: Any) -> None:
        if name in ("PROTO", "STOP"):
            return
        if name not in _PUSHES:
            raise ValueError(f"unsupported instruction {name}")
        text = argument if isinstance(argument, str) else ""
        self._stack.append(_Value(size=1 + len(text), text=text))

    def _take(self, name: str, count: int | None) -> None:
        """Interpret an instruction that takes `count` values from the stack; with None all since the mark."""
        if count is None:
            items, self._stack = self._stack, self._marked.pop()
        else:
            items = [self._stack.pop() for _ in range(count)][::-1]
        size = sum(item.size for item in items)
        self._work += size
        if self._work > _WORK:
            raise _TooLargeError("refers to the same values over and over, which makes it very large")
        if name.startswith("TUPLE"):
            self._stack.append(_Value(1 + size, tuple(items)))
        elif name in ("REDUCE", "NEWOBJ"):
            self._work += sum(item.size for item in items[1].items)  # a list may have grown since it was put there
            self._stack.append(_called(*items))
        elif name == "BINPERSID":
            self._stack.append(_Value())
        else:
            self._stack[-1].size += size


def _called(function: _Value, arguments: _Value) -> _Value:
    """The result of a call. Refuses calls whose result can be large though their arguments are small."""
    items, name = arguments.items, function.text.rpartition(".")[2]
    texts = [item.text for item in items]
    if name == "_rebuild_from_type_v2" and len(items) > 2:  # calls its first argument with its third
        return _called(items[0], items[2])
    if name == "encode":  # pickles store bytes as text that is encoded
        if texts[1:] != ["latin1"]:
            raise _TooLargeError(f"asks for {function.text} into another form than bytes")
        return _Value(items[0].size, text="bytes")
    if name == "bytearray" and not all(texts):
        raise _TooLargeError("asks for a bytearray of some size")
    if name.endswith(("Tensor", "Storage")):
        raise _TooLargeError(f"asks for {function.text} by a call, whose values are not in the file")
    return _Value()


_TAKES: dict[str, int | None] = {
    **{"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None},
    **{"REDUCE": 2, "NEWOBJ": 2, "BINPERSID": 1, "BUILD": 1},
    **{"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None},
}
"""By instruction: how many values it takes from the stack; None for all since the mark."""

_PUSHES = {
    *("NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"),
    *("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"),
}


class NumpyDtype:
    """Stands for a pickled NumPy dtype: its code, such as `f8`, and its byte order."""

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
    """The number or string of a pickled NumPy scalar of `dtype` with the bytes `data`."""
    if not (isinstance(dtype, NumpyDtype) and isinstance(data, bytes)):
        raise ValueError("a NumPy scalar that is not made of a dtype and bytes")
    if dtype.code[0] == "S":
        return data
    if dtype.code[0] == "U":
        return data.decode("utf-32-be" if dtype.order == ">" else "utf-32-le").rstrip("\0")
    import numpy as np

    return np.frombuffer(data, np.dtype(dtype.order + dtype.code), count=1)[0].item()


# (function or class, its name in pickles). NumPy 1 and 2 differ in the module, as Python 3.13 does for
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

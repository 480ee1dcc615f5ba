"""Tensors in Triton's words: data types, dims, sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
}
"""Triton's data types by NumPy's names."""

_BITS = {"BOOL": 8, "BF16": 16}


def byte_size(data_type: str, dims: Sequence[int]) -> int | None:
    """Bytes of a tensor with fixed dims; None for TYPE_STRING, whose elements have no fixed size."""
    if data_type not in DATA_TYPES.values():
        return None
    name = data_type.removeprefix("TYPE_")
    bits = _BITS.get(name) or int("".join(filter(str.isdigit, name)))
    return bits // 8 * math.prod(dims)


def shown(dims: Sequence[int]) -> str:
    """Dims as config.pbtxt writes them."""
    return f"[{', '.join(str(size) for size in dims)}]"

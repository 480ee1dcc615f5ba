"""golden.bin: the golden pack in a form that C++ reads with a few bounds checks.

    8 bytes   SPACHGLD
    u32       version, 1
    u32       images N
    N times   u32 length, then the image's name in UTF-8
    input     N x input, in the input's dtype
    outputs   one after another, in the manifest's order: N x float32 for floats, N x int64 for integers

Little-endian. Shapes and dtypes are model.txt's.
"""

from __future__ import annotations

import struct

import numpy as np

from spach_deploy.bundle import GOLDEN
from spach_deploy.deployment.cpp.facts import PackagedModel
from spach_deploy.errors import BundleError
from spach_deploy.validation.reference import Golden, expected_outputs

MAGIC = b"SPACHGLD"
VERSION = 1


def golden_bytes(model: PackagedModel) -> bytes:
    """The content of golden.bin. BundleError for a golden pack that is not this model's."""
    golden = Golden.load(model.bundle.file(GOLDEN))
    _check(golden, model)
    expected = expected_outputs(golden.logits, model.facts.outputs)
    if missing := [output.name for output in model.outputs if output.name not in expected]:
        raise BundleError(f"There is no reference for the output {missing[0]}.", "Export the bundle again.")
    names = [name.encode() for name in golden.names]
    parts = [
        MAGIC,
        struct.pack("<II", VERSION, len(names)),
        *(struct.pack("<I", len(name)) + name for name in names),
        np.ascontiguousarray(golden.input).tobytes(),
    ]
    for output in model.outputs:
        dtype = "<i8" if output.dtype == "int64" else "<f4"
        parts.append(np.ascontiguousarray(expected[output.name]).astype(dtype).tobytes())
    return b"".join(parts)


def _check(golden: Golden, model: PackagedModel) -> None:
    path = model.bundle.path / GOLDEN
    if golden.input.shape[1:] != model.input.shape[1:] or golden.input.dtype != model.input.dtype:
        raise BundleError(f"{path} holds inputs of another model.", "Export the bundle again.")
    if golden.logits.shape[1] != model.classes or not np.isfinite(golden.logits).all():
        raise BundleError(f"{path} holds answers of another model.", "Export the bundle again.")

"""The golden pack of a bundle: a few inputs with the FP32 reference logits, and the expected outputs that follow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.store import GOLDEN_BYTES, golden_problem
from spach_deploy.common.errors import BundleError, printable
from spach_deploy.common.npz import read_npz
from spach_deploy.options.specs import IODtype, OutputSpec

INPUT, LOGITS, PROBABILITIES = "input", "logits", "probabilities"
TOP_VALUES, TOP_INDICES = "top_values", "top_indices"

Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]

_EXPORT_AGAIN = "Export the bundle again."


@dataclasses.dataclass(frozen=True)
class Golden:
    """N inputs in the engine's input format, the reference logits (N, classes) for them, and the images' names."""

    input: Array
    logits: Float32Array
    names: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write an npz with `input`, `logits` and `names`."""
        np.savez(path, input=self.input, logits=self.logits, names=np.array(self.names, dtype=np.str_))

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read what `save` wrote; BundleError for anything else."""
        if problem := golden_problem(path):
            raise BundleError(f"{path} {problem}.", _EXPORT_AGAIN)
        try:
            arrays = read_npz(path, GOLDEN_BYTES)
        except ValueError as error:
            raise BundleError(f"{path} cannot be read as a golden pack ({error}).", _EXPORT_AGAIN) from None
        names = tuple(printable(str(name)) for name in np.atleast_1d(arrays["names"]))
        return cls(arrays["input"], arrays["logits"], names)


def expected_outputs(logits: Float32Array, outputs: OutputSpec) -> dict[str, Array]:
    """The expected value of every output that `outputs` names, from the reference logits (N, classes).

    logits, probabilities: float32 (N, classes); top_values: float32 (N, K); top_indices: int64 (N, K). Among equal
    logits the lower index comes first, as in ONNX's TopK.
    """
    expected: dict[str, Array] = {LOGITS: logits}
    if outputs.softmax:
        shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        expected[PROBABILITIES] = (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
    if outputs.top_k is not None:
        indices = np.argsort(-logits, axis=1, kind="stable")[:, : outputs.top_k].astype(np.int64)
        expected[TOP_VALUES] = np.take_along_axis(logits, indices, axis=1)
        expected[TOP_INDICES] = indices
    return expected


def promised_dtypes(outputs: OutputSpec) -> dict[str, str]:
    """The dtype of each output of the engine, as NumPy names it."""
    floats = "float16" if outputs.io_dtype is IODtype.FP16 else "float32"
    names = [LOGITS, *([PROBABILITIES] if outputs.softmax else []), *([TOP_VALUES] if outputs.top_k else [])]
    return dict.fromkeys(names, floats) | ({TOP_INDICES: "int64"} if outputs.top_k else {})

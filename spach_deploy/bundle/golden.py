"""The golden pack of a bundle: a few inputs with the reference's outputs in FP32."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.outputs import model_outputs
from spach_deploy.bundle.store import GOLDEN, Bundle, golden_problem, golden_sizes
from spach_deploy.common.errors import BundleError, printable
from spach_deploy.common.files import read_npz

Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]

_EXPORT_AGAIN = "Export the bundle again."


@dataclasses.dataclass(frozen=True)
class Golden:
    """N inputs in the engine's input format, the images' names, and what the reference computes of them.

    `outputs`: float32 (N, ...) by name, those that the model computes; others follow (`bundle.outputs`).
    """

    input: Array
    outputs: Mapping[str, Float32Array]
    names: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write an npz with `input`, the outputs under their names, and `names`."""
        arrays = {"input": self.input, **self.outputs, "names": np.array(self.names, dtype=np.str_)}
        np.savez(path, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read what `save` wrote; BundleError for anything else."""
        if problem := golden_problem(path):
            raise BundleError(f"{path} {problem}.", _EXPORT_AGAIN)
        try:
            arrays = read_npz(path, golden_sizes(path))
        except ValueError as error:
            raise BundleError(f"{path} cannot be read as a golden pack ({error}).", _EXPORT_AGAIN) from None
        names = tuple(printable(str(name)) for name in np.atleast_1d(arrays["names"]))
        outputs = {name: array for name, array in arrays.items() if name not in ("input", "names")}
        return cls(arrays["input"], outputs, names)

    def check(self, bundle: Bundle) -> None:
        """BundleError where these are not inputs and outputs of the bundle's graph, or not finite."""
        manifest, path = bundle.manifest, bundle.path / GOLDEN
        wanted = [(tensor.shape[1:], tensor.dtype) for tensor in manifest.inputs]
        if wanted != [(self.input.shape[1:], str(self.input.dtype))]:
            raise BundleError(f"{path} holds inputs of another model.", _EXPORT_AGAIN)
        for tensor in model_outputs(manifest.outputs):
            values = self.outputs.get(tensor.name)
            if values is None:
                raise BundleError(f"There is no reference for the output {tensor.name}.", _EXPORT_AGAIN)
            if values.shape[1:] != tensor.shape[1:] or not np.isfinite(values).all():
                raise BundleError(f"{path} holds answers of another model.", _EXPORT_AGAIN)

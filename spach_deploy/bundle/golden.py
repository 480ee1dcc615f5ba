"""The golden pack of a bundle: a few inputs with the reference's outputs in FP32."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.inputs import Batch, Inputs, image_names, image_of
from spach_deploy.bundle.outputs import model_outputs
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.bundle.store import GOLDEN, OTHER_INPUT, Bundle, golden_problem, golden_sizes, is_other_input
from spach_deploy.common.errors import BundleError, printable
from spach_deploy.common.files import read_npz

Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]

_EXPORT_AGAIN = "Export the bundle again."


@dataclasses.dataclass(frozen=True)
class Golden:
    """N images in the engine's input format, their names, and what the reference computes of them.

    `outputs`: float32 (N, ...) by name, those that the model computes; others follow (`bundle.outputs`). `others`: the
    other inputs (N, ...) by name, where the graph has several.
    """

    input: Array
    outputs: Mapping[str, Float32Array]
    names: tuple[str, ...]
    others: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, outputs: Mapping[str, Float32Array], names: tuple[str, ...]) -> Golden:
        """Of a batch of inputs."""
        others = batch.arrays if isinstance(batch, Inputs) else {}
        images = batch.image if isinstance(batch, Inputs) else ""
        return cls(image_of(batch), outputs, names, {name: a for name, a in others.items() if name != images})

    def batch(self, inputs: Sequence[TensorInfo]) -> Batch:
        """The inputs of a graph that has `inputs`."""
        if len(inputs) < 2:
            return self.input
        images = image_names(inputs)[0]
        arrays = {name: self.input if name == images else self.others[name] for name in (t.name for t in inputs)}
        return Inputs(arrays, images)

    def save(self, path: Path) -> None:
        """Write an npz with `input`, other inputs as `input.NAME`, the outputs under their names, and `names`."""
        others = {f"{OTHER_INPUT}{name}": array for name, array in self.others.items()}
        names = np.array(self.names, dtype=np.str_)
        arrays = {"input": self.input, **others, **self.outputs, "names": names}
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
        given, others = arrays.pop("input"), {name: arrays.pop(name) for name in [*arrays] if is_other_input(name)}
        outputs = {name: array for name, array in arrays.items() if name != "names"}
        return cls(given, outputs, names, {name.removeprefix(OTHER_INPUT): a for name, a in others.items()})

    def check(self, bundle: Bundle) -> None:
        """BundleError where these are not inputs and outputs of the bundle's graph, or not finite."""
        manifest, path = bundle.manifest, bundle.path / GOLDEN
        wanted = {tensor.name: (tensor.shape[1:], tensor.dtype) for tensor in manifest.inputs}
        images = image_names(manifest.inputs)[:1]
        given = {**dict.fromkeys(images, self.input), **self.others}
        if wanted != {name: (array.shape[1:], str(array.dtype)) for name, array in given.items()}:
            raise BundleError(f"{path} holds inputs of another model.", _EXPORT_AGAIN)
        for tensor in model_outputs(manifest.outputs):
            values = self.outputs.get(tensor.name)
            if values is None:
                raise BundleError(f"There is no reference for the output {tensor.name}.", _EXPORT_AGAIN)
            if values.shape[1:] != tensor.shape[1:] or not np.isfinite(values).all():
                raise BundleError(f"{path} holds answers of another model.", _EXPORT_AGAIN)

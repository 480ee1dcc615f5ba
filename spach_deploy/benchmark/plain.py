"""The plain ways: the reference model as a user deploys it without spach-deploy, to compare with.

    plain_openvino   openvino.convert_model of the PyTorch model
    plain_onnx       torch.onnx.export of the PyTorch model, which ONNX Runtime then optimizes by itself
    quantize_plain   nncf.quantize of the first, calibrated on the user's images

All have the bundle's own inputs and outputs, so that a bundle can hold the result in place of its graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spach_deploy.bundle.outputs import of_role
from spach_deploy.bundle.schema import Manifest, TensorInfo
from spach_deploy.data.images import batches
from spach_deploy.data.preprocess import normalize
from spach_deploy.data.readers import open_images
from spach_deploy.graph.export import quiet_exporter
from spach_deploy.options.specs import IODtype, Preprocessing, Role

Array = npt.NDArray[Any]

_BATCH = 2
"""Images of the example that is traced: with one, a tracer takes the batch size for a constant."""

_SUBSET = 128
"""Images that NNCF calibrates on at most."""


class PlainModel(nn.Module):
    """The reference with the inputs and outputs of a bundle's graph.

    Takes float32 (B, C, H, W), float16 (B, C, H, W) or uint8 (B, H, W, C), and gives the outputs in the manifest's
    order.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, reference: nn.Module, manifest: Manifest) -> None:
        super().__init__()
        self.reference = reference
        self.tensors: Sequence[TensorInfo] = manifest.outputs
        self.takes_pixels = manifest.output_options.io_dtype is IODtype.UINT8
        offset, scale = _normalization(manifest.preprocessing)
        self.register_buffer("offset", offset)
        self.register_buffer("scale", scale)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in order."""
        if self.takes_pixels:
            images = ((images.float() - self.offset) * self.scale).permute(0, 3, 1, 2)
        made = self.reference(images.float())
        values = list(made) if isinstance(made, tuple) else [made]
        values += self._derived(values)
        return tuple(value.to(getattr(torch, tensor.dtype)) for value, tensor in zip(values, self.tensors, strict=True))

    def _derived(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Probabilities and the best classes, where the bundle's graph gives them: behind what the model computes."""
        logits, best = of_role(self.tensors, Role.LOGITS), of_role(self.tensors, Role.TOP_VALUES)
        made: list[Tensor] = []
        if of_role(self.tensors, Role.PROBABILITIES) is not None and logits is not None:
            made.append(torch.softmax(values[self.tensors.index(logits)], -1))
        if best is not None and logits is not None:
            made += torch.topk(values[self.tensors.index(logits)], best.shape[-1] or 1, dim=-1)
        return made


def _normalization(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """(C,) offset and scale with which pixels 0 to 255 become what the model takes."""
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    return torch.tensor(255.0 * mean).float(), torch.tensor(1.0 / (255.0 * std)).float()


def example_of(tensor: TensorInfo) -> Tensor:
    """Zeros of an input's shape and dtype, at the batch that is traced."""
    return torch.zeros([_BATCH, *(extent or 1 for extent in tensor.shape[1:])], dtype=getattr(torch, tensor.dtype))


def plain_openvino(model: PlainModel, manifest: Manifest) -> Any:
    """The model as OpenVINO converts it: an openvino.Model whose batch is free, inputs and outputs named."""
    import openvino

    with quiet_exporter():
        converted = openvino.convert_model(model, example_input=example_of(manifest.inputs[0]))
    for ports, tensors in ((converted.inputs, manifest.inputs), (converted.outputs, manifest.outputs)):
        for port, tensor in zip(ports, tensors, strict=True):
            port.get_tensor().set_names({tensor.name})
    converted.reshape([-1, *(extent or 1 for extent in manifest.inputs[0].shape[1:])])
    return converted


def save_openvino(converted: Any, path: Path) -> None:
    """Write an openvino.Model as `path` (XML) and its weights beside it (BIN), in FP32."""
    import openvino

    openvino.save_model(converted, path, compress_to_fp16=False)


def plain_onnx(model: PlainModel, manifest: Manifest, path: Path) -> None:
    """Write the model as torch.onnx exports it, with a free batch."""
    with quiet_exporter():
        program = torch.onnx.export(
            model,
            (example_of(manifest.inputs[0]),),
            input_names=[manifest.inputs[0].name],
            output_names=[tensor.name for tensor in manifest.outputs],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
        )
    assert program is not None
    program.save(path)


def calibration_inputs(calibration: Path, manifest: Manifest) -> Array:
    """At most 128 of the user's images as the bundle's graph takes them, (N, ...)."""
    source = open_images(calibration).limit(_SUBSET)
    pixels = np.concatenate([part.pixels for part in batches(source, manifest.preprocessing, _BATCH)])
    dtype = manifest.inputs[0].dtype
    return pixels if dtype == "uint8" else normalize(pixels, manifest.preprocessing).astype(dtype)


def quantize_plain(converted: Any, images: Array) -> Any:
    """An openvino.Model in INT8 by NNCF's preset for transformers, calibrated on engine inputs (N, ...)."""
    nncf = importlib.import_module("nncf")
    items = [image[None] for image in images]
    return nncf.quantize(converted, nncf.Dataset(items), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(items))

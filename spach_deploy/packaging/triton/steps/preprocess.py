"""Triton step of spach-deploy: the bytes of a picture's file -> the model's input.

The model's evaluation transform: resized until the picture just covers a size, centre crop, scaled to 0..1 and
normalized by channel; or the cropped pixels as they are, where the model takes uint8. It gives what spach-deploy gives
for the same picture, to the last bit. EXIF orientation and colour profiles are not applied, transparency is dropped.

Needs NumPy and Pillow in the server's Python: `pip install numpy pillow`.
"""

from __future__ import annotations

import importlib
import io
import json
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2 * 89_478_485
MAX_ASPECT = 200
_WIDE_MODES = ("I", "F")
_DEFAULT = "bicubic, antialiased"


class PictureError(ValueError):
    """Bytes that are no usable picture. The client gets the sentence."""


class Transform:
    """The transform, from the JSON that stands in config.pbtxt.

    Sizes in pixels, a square's side or [height, width]; mean and std in 0..1 for each of three channels or one, grey.
    """

    def __init__(self, settings: str) -> None:
        content = json.loads(settings)
        self.image_size = _sides(content["image_size"])
        self.resize_size = _sides(content["resize_size"])
        self.interpolation = str(content.get("interpolation", _DEFAULT)).split(",")[0]
        self.mean = np.asarray(content["mean"], np.float32)
        self.std = np.asarray(content["std"], np.float32)
        self.dtype = np.dtype(content["dtype"])

    def __call__(self, data: bytes) -> npt.NDArray[Any]:
        """Bytes of a file -> (C, H, W) float, or (H, W, C) uint8. PictureError where they are no picture."""
        pixels = self.pixels(data)
        if self.dtype == np.uint8:
            return pixels
        scaled = (pixels.astype(np.float32) / np.float32(255) - self.mean) / self.std
        return np.ascontiguousarray(scaled.transpose(2, 0, 1)).astype(self.dtype)  # (H, W, C) -> (C, H, W)

    def pixels(self, data: bytes) -> npt.NDArray[np.uint8]:
        """Bytes of a file -> uint8 (H, W, C), RGB or grey."""
        from PIL import Image

        image = _decoded(data)
        if len(self.mean) == 1:
            image = image.convert("L")
        resized = image.resize(self._resized(image.width, image.height), Image.Resampling[self.interpolation.upper()])
        height, width = self.image_size
        left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
        cropped = resized.crop((left, top, left + width, top + height))
        return np.array(cropped, dtype=np.uint8).reshape(height, width, -1)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        to_height, to_width = self.resize_size
        if width * to_height <= height * to_width:
            return to_width, int(to_width * height / width)
        return int(to_height * width / height), to_height


def _sides(size: Any) -> tuple[int, int]:
    """(height, width) of a size in the settings."""
    height, width = size if isinstance(size, list) else (size, size)
    return int(height), int(width)


def _decoded(data: bytes) -> Any:
    """RGB image of a file's bytes."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata and palettes
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check(image)
            return image.convert("RGB")
    except PictureError:
        raise
    except Exception as error:  # Pillow's decoders raise what they like for damaged files
        reason = str(error) if len(str(error)) < 200 else type(error).__name__
        raise PictureError(f"The bytes are no picture that can be read ({reason}).") from error


def _check(image: Any) -> None:
    """By its header alone: neither too large, nor too elongated, nor of more than 8 bits."""
    width, height = image.size
    if not 1 <= width * height <= MAX_PIXELS:
        raise PictureError(f"The picture has {width} x {height} pixels; from 1 to {MAX_PIXELS:,} are accepted.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise PictureError(f"The picture is too elongated ({width} x {height}).")
    if image.mode.startswith(_WIDE_MODES):
        raise PictureError(f"The picture has over 8 bits per channel (mode {image.mode}); convert it to 8 bits.")


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the transform from the model's configuration."""
        importlib.import_module("PIL.Image")  # an image without Pillow fails when the model is loaded
        self._triton: Any = importlib.import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        self._transform = Transform(config["parameters"]["preprocessing"]["string_value"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request; a picture that cannot be read fails its own request only."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        pictures = self._triton.get_input_tensor_by_name(request, self._input).as_numpy().reshape(-1)
        try:
            batch = np.stack([self._transform(bytes(picture)) for picture in pictures])
        except PictureError as error:
            return self._triton.InferenceResponse(error=self._triton.TritonError(str(error)))
        return self._triton.InferenceResponse([self._triton.Tensor(self._output, batch)])

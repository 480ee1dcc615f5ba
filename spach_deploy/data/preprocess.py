"""The published evaluation transform, with Pillow and NumPy: resize, centre crop, normalize.

The shorter side is resized with antialiased bicubic, the centre cropped, pixels scaled to 0..1 and normalized by
channel. The result is that of torchvision's `Resize`, `CenterCrop`, `ToTensor` and `Normalize` on pictures that its
`ImageFolder` loads, with which the published accuracies were measured. As in that loader:

- EXIF orientation is not applied: a photograph that a viewer turns upright is evaluated as stored;
- transparency is dropped, not composited: transparent pixels have the colour that the file stores;
- colour profiles are not applied.

Grayscale, palette, CMYK and YCbCr pictures become RGB by Pillow's conversion. One thing differs: 16-bit, 32-bit and
float grayscale is refused, because Pillow clips it at 255, which makes such pictures white.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.options.specs import IODtype, Preprocessing

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float16]

MAX_PIXELS = 2 * 89_478_485
"""Pixels of the largest picture that is read, about 179 million: Pillow's limit against decompression bombs."""

MAX_ASPECT = 200
"""Largest ratio of sides. The resized picture grows with the ratio, whatever the size of the file."""

_FILTERS = {"bicubic, antialiased": Image.Resampling.BICUBIC}
_WIDE_MODES = ("I", "F")


def check_size(width: int, height: int) -> None:
    """ImageError for a picture of this size (pixels) that would need too much memory, before it is decoded."""
    if min(width, height) < 1:
        raise ImageError(f"The picture has no pixels ({width} x {height}).")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"The picture has {width} x {height} pixels; more than {MAX_PIXELS:,} are refused.",
            "Scale it down.",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"The picture is too elongated ({width} x {height}); the sides may differ {MAX_ASPECT} times.",
            "Crop it.",
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` as RGB with 8 bits per channel. Raises ImageError when its values have no 8-bit meaning."""
    check_size(*image.size)
    if image.mode == "RGB":
        return image
    if image.mode.startswith(_WIDE_MODES):
        raise ImageError(
            f"The picture has over 8 bits per channel (mode {image.mode}); which value is white is unknown.",
            "Convert it to 8 bits.",
        )
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"Colour mode {image.mode} cannot be converted to RGB.", "Save it as RGB.") from error


def resized_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """(width, height) in pixels after the shorter side became `shorter`; the other is rounded down,
    as in torchvision.
    """
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def pixels(image: Image.Image, preprocessing: Preprocessing) -> UInt8Array:
    """Resize and centre-crop `image` -> uint8 RGB (S, S, 3), S = preprocessing.image_size.

    Raises ImageError for a picture that cannot be used, UsageError for a transform of another kind.
    """
    _check_transform(preprocessing)
    rgb = to_rgb(image)
    size = resized_size(rgb.width, rgb.height, preprocessing.resize_size)
    resized = rgb.resize(size, _FILTERS[preprocessing.interpolation])
    return np.array(_centre_crop(resized, preprocessing.image_size), dtype=np.uint8)  # (S, S, 3)


def normalize(pixels: UInt8Array, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """uint8 RGB (N, S, S, 3) -> float32 (N, 3, S, S), contiguous: (x / 255 - mean) / std per channel."""
    _check_pixels(pixels)
    mean = np.asarray(preprocessing.mean, np.float32)
    std = np.asarray(preprocessing.std, np.float32)
    scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))  # (N, S, S, 3) -> (N, 3, S, S)


def to_input(
    pixels: UInt8Array, preprocessing: Preprocessing, io_dtype: IODtype = IODtype.FP32
) -> UInt8Array | FloatArray:
    """uint8 RGB (N, S, S, 3) -> the input of a graph with `io_dtype`.

    fp32, fp16: normalized (N, 3, S, S) in that dtype. uint8: the pixels unchanged, (N, S, S, 3).
    """
    if io_dtype is IODtype.UINT8:
        _check_pixels(pixels)
        return np.ascontiguousarray(pixels)
    normalized = normalize(pixels, preprocessing)
    return normalized.astype(np.float16) if io_dtype is IODtype.FP16 else normalized


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    # Python's round(), as in torchvision: 79.5 becomes 80, and 78.5 becomes 78.
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _check_transform(preprocessing: Preprocessing) -> None:
    if preprocessing.interpolation not in _FILTERS:
        raise UsageError(
            f"Interpolation {preprocessing.interpolation!r} is not implemented.",
            f"Known: {', '.join(_FILTERS)}.",
        )
    if not 1 <= preprocessing.image_size <= preprocessing.resize_size:
        raise UsageError(
            f"A crop of {preprocessing.image_size} does not fit into {preprocessing.resize_size}.",
            "Use Preprocessing.for_size(image_size).",
        )


def _check_pixels(pixels: UInt8Array) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"pixels must be uint8 (N, S, S, 3), not {pixels.dtype} {pixels.shape}")

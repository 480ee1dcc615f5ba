"""The evaluation transform, with Pillow and NumPy: resize, centre crop, normalize. It is computed here and nowhere
else.

By default the published one: the shorter side is resized with antialiased bicubic, the centre cropped, pixels scaled to
0..1 and normalized by channel. The result is that of torchvision's `Resize`, `CenterCrop`, `ToTensor` and `Normalize`
on pictures that its `ImageFolder` loads, with which the published accuracies were measured. As in that loader:

- EXIF orientation is not applied: a photograph that a viewer turns upright is evaluated as stored;
- transparency is dropped, not composited: transparent pixels have the colour that the file stores;
- colour profiles are not applied.

Grayscale, palette, CMYK and YCbCr pictures become RGB by Pillow's conversion. One thing differs: 16-bit, 32-bit and
float grayscale is refused, because Pillow clips it at 255, which makes such pictures white.

For another size than a square, the picture keeps its shape and is resized until it just covers the transform's
`resize_size`. For models of one channel, RGB becomes grey by Pillow's conversion to "L", before it is resized. Images
of other numbers of channels are arrays (H, W, C); each channel is resized by itself, as Pillow resizes those of RGB.
Arrays of floats hold 0..1 and are neither rounded nor scaled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.options.specs import (
    INTERPOLATIONS,
    ImageSize,
    IODtype,
    Preprocessing,
    interpolation_text,
    sides,
    size_in_words,
)

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float16]
Pixels = npt.NDArray[Any]
"""Pixels with channels last: uint8 levels 0..255, or float32 in 0..1."""

Decoded = Image.Image | Pixels
"""An image before the transform: an RGB picture, or pixels (H, W, C)."""

MAX_PIXELS = 2 * 89_478_485
"""Pixels of the largest picture that is read, about 179 million: Pillow's limit against decompression bombs."""

MAX_ASPECT = 200
"""Largest ratio of sides. The resized picture grows with the ratio, whatever the size of the file."""

_FILTERS = {interpolation_text(name): Image.Resampling[name.upper()] for name in INTERPOLATIONS}
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


def resized_size(width: int, height: int, size: ImageSize) -> tuple[int, int]:
    """(width, height) in pixels of a picture that was resized, in its shape, until it just covers `size`.

    One side becomes that of `size`, for a square the shorter one; the other is rounded down, as in torchvision.
    """
    to_height, to_width = sides(size)
    if width * to_height <= height * to_width:
        return to_width, int(to_width * height / width)
    return int(to_height * width / height), to_height


def pixels(image: Decoded, preprocessing: Preprocessing) -> Pixels:
    """Resize and centre-crop `image` -> (H, W, C) as `preprocessing.pixel_shape`, uint8, or float32 for float pixels.

    Raises ImageError for an image that cannot be used, UsageError for a transform of another kind.
    """
    _check_transform(preprocessing)
    bands = _bands(image, preprocessing)
    size = resized_size(*bands[0].size, preprocessing.resize_size)
    resized = [band.resize(size, _FILTERS[preprocessing.interpolation]) for band in bands]
    cropped = [np.asarray(_centre_crop(band, *sides(preprocessing.image_size))) for band in resized]
    return np.ascontiguousarray(np.stack(cropped, axis=-1) if cropped[0].ndim == 2 else cropped[0])  # (H, W, C)


def _bands(image: Decoded, preprocessing: Preprocessing) -> list[Image.Image]:
    """The image as Pillow resizes it: one RGB image, or one for each channel."""
    channels = preprocessing.channels
    if isinstance(image, Image.Image):
        if channels not in (1, 3):
            raise ImageError(
                f"The model takes images of {channels} channels, and a picture has 3, or 1 if it is grey.",
                f"Give an npz with images (N, H, W, {channels}).",
            )
        rgb = to_rgb(image)
        return [rgb.convert("L") if channels == 1 else rgb]
    if image.shape[-1] != channels:
        raise ImageError(
            f"The model takes images of {channels} channels, and these have {image.shape[-1]}.",
            f"Give images (N, H, W, {channels}).",
        )
    if image.dtype != np.uint8:
        _check_levels(image, preprocessing)
    return [Image.fromarray(np.ascontiguousarray(image[..., channel])) for channel in range(channels)]


def _check_levels(image: Pixels, preprocessing: Preprocessing) -> None:
    """ImageError for floats outside 0..1, unless the transform leaves them as they are: mean 0 and deviation 1."""
    low, high = float(image.min()), float(image.max())
    is_expected = preprocessing.takes_normalized or (low >= 0 and high <= 1)
    if not (is_expected and np.isfinite([low, high]).all()):
        raise ImageError(
            f"Its pixels are floats from {low:g} to {high:g}; floats are expected in 0..1.",
            "Divide them, or give --mean 0 --std 1 for images that are normalized already.",
        )


def normalize(pixels: Pixels, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Pixels (N, H, W, C) -> float32 (N, C, H, W), contiguous: (x / 255 - mean) / std by channel; floats as they are
    instead of x / 255.
    """
    _check_pixels(pixels, preprocessing)
    mean = np.asarray(preprocessing.mean, np.float32)
    std = np.asarray(preprocessing.std, np.float32)
    levels = pixels.astype(np.float32) / np.float32(255) if pixels.dtype == np.uint8 else pixels
    scaled = (levels - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))  # (N, H, W, C) -> (N, C, H, W)


def to_input(pixels: Pixels, preprocessing: Preprocessing, io_dtype: IODtype = IODtype.FP32) -> UInt8Array | FloatArray:
    """Pixels (N, H, W, C) -> the input of a graph with `io_dtype`.

    fp32, fp16: normalized (N, C, H, W) in that dtype. uint8: the pixels unchanged, (N, H, W, C); ImageError for floats.
    """
    if io_dtype is IODtype.UINT8:
        _check_pixels(pixels, preprocessing)
        if pixels.dtype != np.uint8:
            raise ImageError("The graph takes uint8 pixels, and these are floats.", "Give images of uint8.")
        return np.ascontiguousarray(pixels)
    normalized = normalize(pixels, preprocessing)
    return normalized.astype(np.float16) if io_dtype is IODtype.FP16 else normalized


def _centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    # Python's round(), as in torchvision: 79.5 becomes 80, and 78.5 becomes 78.
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _check_transform(preprocessing: Preprocessing) -> None:
    if preprocessing.interpolation not in _FILTERS:
        raise UsageError(
            f"Interpolation {preprocessing.interpolation!r} is not implemented.",
            f"Known: {', '.join(_FILTERS)}.",
        )
    size, resized = preprocessing.image_size, preprocessing.resize_size
    if not all(1 <= side <= limit for side, limit in zip(sides(size), sides(resized), strict=True)):
        raise UsageError(
            f"A crop of {size_in_words(size)} does not fit into {size_in_words(resized)}.",
            "Use Preprocessing.for_size(image_size).",
        )


def _check_pixels(pixels: Pixels, preprocessing: Preprocessing) -> None:
    channels = preprocessing.channels
    if pixels.dtype not in (np.uint8, np.float32) or pixels.ndim != 4 or pixels.shape[-1] != channels:
        raise ValueError(f"pixels must be uint8 (N, H, W, {channels}), not {pixels.dtype} {pixels.shape}")

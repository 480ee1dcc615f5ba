"""Pictures of what the model saw, small enough to stand in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.report.content import Json

SIDE = 176
"""Pixels at most: twice what the page gives a picture, for dense screens."""

_QUALITY = 80

Inputs = Callable[[int, int], npt.NDArray[Any]]


def pictures_of(inputs: Inputs, preprocessing: Json, images: Iterable[int]) -> dict[int, str]:
    """Data URIs (JPEG) of images by index.

    `inputs(start, stop)`: as the engine's caller sends them, uint8 (n, S, S, 3) or normalized floats (n, 3, S, S) by
    the `mean` and `std` of `preprocessing`.
    """
    return {index: _data_uri(pixels_of(inputs(index, index + 1)[0], preprocessing)) for index in images}


def pixels_of(image: npt.NDArray[Any], preprocessing: Json) -> npt.NDArray[np.uint8]:
    """uint8 (S, S, 3) of one input."""
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    mean, std = (np.asarray(preprocessing[name], np.float32)[:, None, None] for name in ("mean", "std"))
    scaled = (image.astype(np.float32) * std + mean) * 255
    return np.ascontiguousarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8).transpose(1, 2, 0))  # CHW -> HWC


def _data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"

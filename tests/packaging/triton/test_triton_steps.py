"""The steps of an ensemble, without a server: they give what spach-deploy gives for the same picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from spach_deploy.common.errors import ImageError
from spach_deploy.data import preprocess
from spach_deploy.data.images import FORMATS, decode
from spach_deploy.options.specs import INTERPOLATIONS, IODtype, OutputSpec, Preprocessing, channel_statistics
from spach_deploy.packaging.triton.steps import preprocess as step
from spach_deploy.packaging.triton.steps.top_k import top_k
from tests.outputs import of_logits

PROBES = sorted((Path(preprocess.__file__).parent / "probes").glob("*.jpg"))
DTYPES = {IODtype.FP32: "float32", IODtype.FP16: "float16", IODtype.UINT8: "uint8"}


def transform(preprocessing: Preprocessing, io_dtype: IODtype = IODtype.FP32) -> step.Transform:
    settings: dict[str, Any] = {"image_size": preprocessing.image_size, "resize_size": preprocessing.resize_size}
    settings |= {"mean": preprocessing.mean, "std": preprocessing.std, "dtype": DTYPES[io_dtype]}
    if preprocessing.interpolation != Preprocessing.interpolation:
        settings["interpolation"] = preprocessing.interpolation
    return step.Transform(json.dumps(settings))


def ours(data: bytes, preprocessing: Preprocessing, io_dtype: IODtype = IODtype.FP32) -> npt.NDArray[Any]:
    pixels = preprocess.pixels(decode(io.BytesIO(data)), preprocessing)
    inputs: npt.NDArray[Any] = preprocess.to_input(pixels[None], preprocessing, io_dtype)
    return np.asarray(inputs[0])


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze() if channels == 1 else pixels)


@pytest.mark.parametrize("io_dtype", IODtype)
@pytest.mark.parametrize("size", [32, 224])
def test_photographs_come_out_equal_to_the_last_bit(io_dtype: IODtype, size: int) -> None:
    preprocessing = Preprocessing.for_size(size)
    assert len(PROBES) == 8
    for probe in PROBES:
        data = probe.read_bytes()
        result = transform(preprocessing, io_dtype)(data)
        expected = ours(data, preprocessing, io_dtype)
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        assert result.tobytes() == expected.tobytes()


_TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
PICTURES = {
    "wide": file(noise(97, 41)),
    "tall": file(noise(41, 97)),
    "one pixel": file(noise(1, 1)),
    "gray": file(noise(50, 40, 1)),
    "gray with alpha": file(noise(50, 40, 2)),
    "with alpha": file(noise(50, 40, 4)),
    "palette": file(noise(50, 40).quantize(16)),
    "palette with a transparent colour": file(noise(50, 40).quantize(16), transparency=3),
    "black and white": file(noise(50, 40, 1).convert("1")),
    "CMYK": file(noise(50, 40).convert("CMYK"), "JPEG"),
    "progressive": file(noise(50, 40), "JPEG", progressive=True),
    "BMP": file(noise(50, 40), "BMP"),
    "GIF": file(noise(50, 40), "GIF"),
    "PPM": file(noise(50, 40), "PPM"),
    "TIFF": file(noise(50, 40), "TIFF"),
    "WEBP": file(noise(50, 40), "WEBP"),
    "turned by EXIF": file(
        noise(60, 40), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_comes_out_equal(name: str) -> None:
    preprocessing = Preprocessing(29, 33)
    result = transform(preprocessing)(PICTURES[name])
    assert result.tobytes() == ours(PICTURES[name], preprocessing).tobytes()


@pytest.mark.parametrize("io_dtype", IODtype)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_other_transforms_come_out_equal(interpolation: str, channels: int, io_dtype: IODtype) -> None:
    preprocessing = Preprocessing.for_size(
        (29, 41), *channel_statistics(channels), crop=0.9, interpolation=interpolation
    )
    for name in ("wide", "tall", "one pixel", "gray with alpha", "palette", "CMYK", "WEBP"):
        result, expected = (
            transform(preprocessing, io_dtype)(PICTURES[name]),
            ours(PICTURES[name], preprocessing, io_dtype),
        )
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        assert result.tobytes() == expected.tobytes(), name


UNUSABLE = {
    "nothing": b"",
    "text": b"hello",
    "cut": PROBES[0].read_bytes()[:2000],
    "of 16 bits": file(Image.fromarray(np.zeros((9, 9), np.uint16))),
    "elongated": file(noise(402, 2)),
    "PostScript, which would be run": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_refused_here_is_refused_there(name: str) -> None:
    preprocessing = Preprocessing(29, 33)
    with pytest.raises(ImageError):
        ours(UNUSABLE[name], preprocessing)
    with pytest.raises(step.PictureError):
        transform(preprocessing)(UNUSABLE[name])


def test_a_huge_picture_is_refused_by_its_header() -> None:
    header = file(noise(4, 4))
    at = header.index(b"IHDR") + 4
    huge = header[:at] + (60_000).to_bytes(4, "big") * 2 + header[at + 8 :]
    with pytest.raises(step.PictureError):
        transform(Preprocessing(29, 33))(huge)


def test_both_know_the_same_limits_and_formats() -> None:
    assert step.FORMATS == FORMATS
    assert (step.MAX_PIXELS, step.MAX_ASPECT) == (preprocess.MAX_PIXELS, preprocess.MAX_ASPECT)


@pytest.mark.parametrize("k", [1, 3, 11])
def test_the_best_classes_are_those_of_a_bundle(k: int) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, 11)).astype(np.float32)
    logits[2] = 1.0  # equal ones: the lower index comes first
    indices, probabilities = top_k(logits, k)
    expected = of_logits(logits, OutputSpec(top_k=k, softmax=True))
    np.testing.assert_array_equal(indices, expected["top_indices"])
    np.testing.assert_array_equal(probabilities, np.take_along_axis(expected["probabilities"], indices, axis=1))

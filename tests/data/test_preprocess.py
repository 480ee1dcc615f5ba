"""The evaluation transform against the published one's pixels, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.data import preprocess
from spach_deploy.options.specs import INTERPOLATIONS, IODtype, Preprocessing, channel_statistics

GOLDEN = np.load(Path(__file__).parent / "golden_preprocess.npz")


def picture(name: str) -> Image.Image:
    """A picture that the scikit-image or scikit-learn wheel carries."""
    skimage, sklearn = pytest.importorskip("skimage"), pytest.importorskip("sklearn")
    folders = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"
    return Image.open(next(folder / name for folder in folders if (folder / name).exists()))


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)[..., None] + np.array([0, 50, 100])
    return Image.fromarray((values % 256).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("key", GOLDEN.files)
def test_pixels_equal_the_published_transform(key: str) -> None:
    name, size = key.split("@")
    ours = preprocess.pixels(picture(name), Preprocessing.for_size(int(size)))
    difference = np.abs(ours.astype(int) - GOLDEN[key].astype(int))
    assert ours.shape == GOLDEN[key].shape
    assert difference.max() <= 1


def test_golden_file_holds_pictures() -> None:
    assert len(GOLDEN.files) == 5


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(640, 427, (383, 256)), (427, 640, (256, 383)), (300, 300, (256, 256)), (3, 2, (384, 256))],
)
def test_longer_side_is_rounded_down(width: int, height: int, expected: tuple[int, int]) -> None:
    assert preprocess.resized_size(width, height, 256) == expected


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (640, 480, (292, 219)),
        (640, 427, (328, 219)),
        (427, 640, (292, 437)),
        (292, 219, (292, 219)),
        (3, 2, (328, 219)),
    ],
)
def test_a_rectangle_is_just_covered(width: int, height: int, expected: tuple[int, int]) -> None:
    assert preprocess.resized_size(width, height, (219, 292)) == expected


def test_published_sizes_are_those_of_an_eighth_more() -> None:
    """The crop is a part of the resized picture, as timm's crop_pct; the published evaluation keeps 0.875."""
    assert all(Preprocessing.for_size(s).resize_size == int(s * 256 / 224) for s in range(1, 2049))
    assert Preprocessing.for_size(224, crop=0.95).resize_size == 235
    assert Preprocessing.for_size(224, crop=1).resize_size == 224
    assert Preprocessing.for_size((192, 256)).resize_size == (219, 292)
    assert Preprocessing.for_size((64, 64)) == Preprocessing.for_size(64)


@pytest.mark.parametrize("name", INTERPOLATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_rectangles_and_interpolations_are_pillows(name: str, channels: int) -> None:
    transform = Preprocessing.for_size((48, 80), *channel_statistics(channels), crop=0.9, interpolation=name)
    for width, height in [(500, 300), (300, 500), (10, 7), (90, 54)]:
        image = gradient(width, height).convert("L" if channels == 1 else "RGB")
        to_width, to_height = preprocess.resized_size(width, height, (53, 88))
        resized = image.resize((to_width, to_height), Image.Resampling[name.upper()])
        left, top = round((to_width - 80) / 2), round((to_height - 48) / 2)
        wanted = np.asarray(resized.crop((left, top, left + 80, top + 48))).reshape(48, 80, channels)
        assert (preprocess.pixels(image, transform) == wanted).all()


def test_grey_is_pillows_and_colour_becomes_grey() -> None:
    one = Preprocessing.for_size(32, *channel_statistics(1))
    grey = preprocess.pixels(gradient(60, 50).convert("L"), one)
    assert grey.shape == (32, 32, 1)
    assert (preprocess.pixels(gradient(60, 50), one) == grey).all()
    assert (one.mean, one.std) == ((0.449,), (0.226,))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_each_channel_of_an_array_is_resized_by_itself(dtype: Any) -> None:
    five = Preprocessing.for_size((24, 32), *channel_statistics(5))
    image = (np.random.default_rng(0).random((50, 70, 5)) * (255 if dtype is np.uint8 else 1)).astype(dtype)
    taken = preprocess.pixels(image, five)
    assert (taken.shape, taken.dtype) == ((24, 32, 5), dtype)
    alone = dataclasses.replace(five, mean=five.mean[:1], std=five.std[:1])
    assert all((taken[..., [c]] == preprocess.pixels(image[..., [c]], alone)).all() for c in range(5))
    normalized = preprocess.normalize(taken[None], five)
    assert normalized.shape == (1, 5, 24, 32)
    scale = 255 if dtype is np.uint8 else 1
    expected = (taken.astype(np.float64) / scale - 0.449) / 0.226
    assert np.abs(normalized[0] - expected.transpose(2, 0, 1)).max() < 1e-5


def test_three_channels_as_an_array_are_those_of_a_picture() -> None:
    picture, transform = gradient(60, 50), Preprocessing.for_size((24, 32))
    assert (preprocess.pixels(np.asarray(picture), transform) == preprocess.pixels(picture, transform)).all()


def test_floats_are_taken_in_0_to_1_or_as_they_are() -> None:
    image = np.random.default_rng(0).normal(0, 1, (40, 40, 3)).astype(np.float32)
    with pytest.raises(ImageError, match=r"floats from .*; floats are expected in 0\.\.1"):
        preprocess.pixels(image, Preprocessing.for_size(32))
    as_they_are = Preprocessing.for_size(40, (0.0,) * 3, (1.0,) * 3, crop=1)
    assert (
        preprocess.normalize(preprocess.pixels(image, as_they_are)[None], as_they_are)[0] == image.T.swapaxes(1, 2)
    ).all()
    image[0, 0, 0] = np.nan
    with pytest.raises(ImageError, match="floats from nan"):
        preprocess.pixels(image, as_they_are)
    with pytest.raises(ImageError, match="takes uint8 pixels"):
        preprocess.to_input(np.zeros((1, 8, 8, 3), np.float32), Preprocessing(), IODtype.UINT8)


def test_crop_is_central_and_offsets_round_half_to_even() -> None:
    # 383 wide: the offset 79.5 becomes 80, as torchvision rounds; 256 high: 16.
    image = Image.fromarray(np.arange(256 * 383, dtype=np.uint32).view(np.uint8).reshape(256, 383, 4)[..., :3])
    cropped = preprocess.pixels(image, Preprocessing())
    assert (cropped == np.asarray(image)[16:240, 80:304]).all()


@pytest.mark.parametrize("size", [32, 224, 384])
@pytest.mark.parametrize(("width", "height"), [(500, 300), (300, 500), (10, 7), (1, 1), (1000, 6)])
def test_any_shape_gives_the_image_size(size: int, width: int, height: int) -> None:
    cropped = preprocess.pixels(gradient(width, height), Preprocessing.for_size(size))
    assert cropped.shape == (size, size, 3)
    assert cropped.dtype == np.uint8


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_colour_modes_become_rgb_as_pillow_converts_them(mode: str) -> None:
    image = gradient(60, 50, mode)
    expected = preprocess.pixels(image.convert("RGB"), Preprocessing())
    assert (preprocess.pixels(image, Preprocessing()) == expected).all()


def test_transparency_is_dropped_not_composited() -> None:
    opaque = gradient(60, 50)
    transparent = opaque.copy()
    transparent.putalpha(0)
    assert (preprocess.pixels(transparent, Preprocessing()) == preprocess.pixels(opaque, Preprocessing())).all()


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    gradient(60, 50).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert turned.getexif()[0x0112] == 6
        ours = preprocess.pixels(turned, Preprocessing())
    assert (ours == preprocess.pixels(gradient(60, 50), Preprocessing())).all()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.full((4, 4), 4096, np.uint16)), "8 bits per channel"),
        (Image.new("I", (4, 4)), "8 bits per channel"),
        (Image.new("F", (4, 4)), "8 bits per channel"),
        (Image.new("La", (4, 4)), "La cannot be converted"),
        (Image.new("RGB", (1, 201)), "too elongated"),
        (Image.new("RGB", (0, 5)), "no pixels"),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_unusable_pictures_are_refused_with_the_reason(image: Image.Image, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        preprocess.pixels(image, Preprocessing())


def test_too_many_pixels_are_refused_by_size_alone() -> None:
    with pytest.raises(ImageError, match="are refused"):
        preprocess.check_size(20_000, 20_000)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(interpolation="lanczos"),
        Preprocessing(image_size=300, resize_size=256),
        Preprocessing(image_size=(200, 300), resize_size=256),
    ],
)
def test_other_transforms_are_refused(preprocessing: Preprocessing) -> None:
    with pytest.raises(UsageError):
        preprocess.pixels(gradient(60, 50), preprocessing)


def test_normalize_against_float64_and_by_hand() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    ours = preprocess.normalize(pixels, Preprocessing())
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((pixels / 255.0 - mean) / std).transpose(0, 3, 1, 2)
    assert ours.shape == (2, 3, 8, 8)
    assert ours.dtype == np.float32
    assert ours.flags["C_CONTIGUOUS"]
    assert np.abs(ours - expected).max() < 1e-6
    red = preprocess.normalize(np.array([[[[255, 0, 0]]]], np.uint8), Preprocessing())
    assert red.ravel() == pytest.approx([2.2489083, -2.0357143, -1.8044444], rel=1e-6)


def test_input_of_each_dtype() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    full = preprocess.to_input(pixels, Preprocessing())
    half = preprocess.to_input(pixels, Preprocessing(), IODtype.FP16)
    raw = preprocess.to_input(pixels, Preprocessing(), IODtype.UINT8)
    assert (full == preprocess.normalize(pixels, Preprocessing())).all()
    assert half.dtype == np.float16
    assert half.shape == (2, 3, 8, 8)
    assert (half == full.astype(np.float16)).all()
    assert raw.dtype == np.uint8
    assert (raw == pixels).all()


@pytest.mark.parametrize("dtype", list(IODtype))
def test_normalized_images_are_not_taken_for_pixels(dtype: IODtype) -> None:
    normalized: Any = np.zeros((1, 3, 8, 8), np.float32)
    with pytest.raises(ValueError, match="must be uint8"):
        preprocess.to_input(normalized, Preprocessing(), dtype)

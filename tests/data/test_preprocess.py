"""The evaluation transform against the published one's pixels, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.data import preprocess
from spach_deploy.options.specs import IODtype, Preprocessing

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
    "preprocessing", [Preprocessing(interpolation="nearest"), Preprocessing(image_size=300, resize_size=256)]
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
    normalized: Any = np.zeros((1, 8, 8, 3), np.float32)
    with pytest.raises(ValueError, match="must be uint8"):
        preprocess.to_input(normalized, Preprocessing(), dtype)

"""Preprocessing in C++ against spach_deploy.data.preprocess: the same pixels, not nearly the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spach_deploy.data import images as probes
from spach_deploy.data.preprocess import MAX_ASPECT, MAX_PIXELS, UInt8Array, pixels, resized_size, to_input
from spach_deploy.options.specs import INTERPOLATIONS, IODtype, OutputSpec, Preprocessing, channel_statistics
from spach_deploy.packaging.cpp.folder import sizes
from tests.packaging.cpp import models
from tests.packaging.cpp.builds import Build

pytestmark = pytest.mark.cpp

LARGER, SMALLER = Preprocessing(64, 73), Preprocessing(8, 9)
SIZES = [
    *((224, 224), (256, 256), (64, 64), (73, 73), (8, 8), (9, 9), (73, 100), (100, 73)),
    *((1, 1), (2, 3), (1, 40), (40, 1), (5, 7), (33, 32), (74, 75), (75, 74), (500, 375), (375, 500), (601, 402)),
    *((1023, 511), (20, 3000), (3000, 20), (97, 96), (96, 97), (145, 144), (147, 73), (73, 146), (1600, 1200)),
]


def picture(width: int, height: int, seed: int = 0) -> UInt8Array:
    """Noise in the left half, where every weight matters, and hard edges in the right, where filters overshoot."""
    random = np.random.default_rng([seed, width, height])
    content = random.integers(0, 256, (height, width, 3), np.uint8)
    content[:, width // 2 :] = random.integers(0, 2, (height, width - width // 2, 3), np.uint8) * 255
    return content


def written_model(folder: Path, transform: Preprocessing, io_dtype: IODtype = IODtype.FP32) -> Path:
    """A model folder, its text changed to the transform; no engine is needed to preprocess."""
    tiny = dataclasses.replace(models.EVERY, outputs=OutputSpec(io_dtype))
    model = models.model(folder, tiny)
    text = (model / "model.txt").read_text()
    height, width, channels = transform.pixel_shape
    filter_ = transform.interpolation.split(",")[0]
    entries = {
        "resize 9 8": f"resize {' '.join(map(str, sizes(transform)))}\ninterpolation {filter_}",
        " 3 3 8 8\n": f" 3 {channels} {height} {width}\n",
        " 3 8 8 3\n": f" 3 {height} {width} {channels}\n",
        "mean 0.485 0.456 0.406": f"mean {' '.join(map(repr, transform.mean))}",
        "std 0.229 0.224 0.225": f"std {' '.join(map(repr, transform.std))}",
    }
    for old, new in entries.items():
        text = text.replace(old, new)
    (model / "model.txt").write_text(text)
    return model


def in_cpp(build: Build, model: Path, image: UInt8Array, folder: Path, *, padding: int = 0) -> tuple[bytes, bytes]:
    """(pixels, input) of `image`, whose rows lie `padding` bytes apart."""
    height, width, channels = image.shape
    rows = np.full((height, channels * width + padding), 77, np.uint8)
    rows[:, : channels * width] = image.reshape(height, -1)
    (folder / "rgb").write_bytes(rows.tobytes())
    stride = channels * width + padding if padding else 0
    asked = (model, folder / "rgb", width, height, stride, folder / "out", channels)
    result = build.run("probe", "preprocess", *asked)
    assert result.returncode == 0, result.stdout + result.stderr
    return (folder / "out.pixels").read_bytes(), (folder / "out.input").read_bytes()


@pytest.mark.parametrize("transform", [LARGER, SMALLER])
def test_pixels_are_pillows_at_every_size(plain: Build, tmp_path: Path, transform: Preprocessing) -> None:
    model = written_model(tmp_path, transform)
    for width, height in SIZES:
        image = picture(width, height)
        got, _ = in_cpp(plain, model, image, tmp_path)
        wanted = pixels(Image.fromarray(image), transform)
        difference = np.abs(np.frombuffer(got, np.uint8).astype(int) - wanted.reshape(-1))
        assert difference.max() == 0, f"{width} x {height}: up to {difference.max()} levels"


TRANSFORMS = [(name, channels) for name in INTERPOLATIONS for channels in (1, 3)] + [("bilinear", 2), ("bicubic", 7)]


@pytest.mark.parametrize(("interpolation", "channels"), TRANSFORMS)
def test_other_transforms_are_pillows_too(
    plain: Build, asan: Build, tmp_path: Path, interpolation: str, channels: int
) -> None:
    """A rectangle, other filters and channels: from pixels of that many channels, and grey from RGB."""
    transform = Preprocessing.for_size((24, 40), *channel_statistics(channels), crop=0.9, interpolation=interpolation)
    model = written_model(tmp_path, transform)
    for width, height in SIZES[::2]:
        image = picture(width, height)
        image = image if channels in (1, 3) else np.resize(image, (height, width, channels))
        wanted = pixels(Image.fromarray(image) if channels in (1, 3) else image, transform)
        got, inputs = in_cpp(plain, model, image, tmp_path)
        assert got == wanted.tobytes(), f"{width} x {height}"
        assert inputs == to_input(wanted[None], transform).tobytes()
    image = np.asarray(Image.fromarray(picture(50, 40)).convert("L"))[..., None] if channels == 1 else image
    assert in_cpp(asan, model, image, tmp_path, padding=5)[0] == pixels(image, transform).tobytes()


def test_pixels_of_other_channels_are_refused(plain: Build, tmp_path: Path) -> None:
    model = written_model(tmp_path, LARGER)
    (tmp_path / "rgb").write_bytes(bytes(300))
    result = plain.run("probe", "preprocess", model, tmp_path / "rgb", 5, 5, 0, tmp_path / "out", 4)
    assert result.stdout == "bad argument: The picture has 4 channels, and the model takes 3.\n"


def test_a_bundle_of_an_older_pillow_gets_that_ones_order_of_passes(plain: Build, tmp_path: Path) -> None:
    """Before 13, Pillow always resized rows first; 13 begins with columns where the height shrinks far more."""
    model = written_model(tmp_path, SMALLER)
    text = (model / "model.txt").read_text().splitlines()
    (model / "model.txt").write_text("\n".join("pillow 12" if line.startswith("pillow ") else line for line in text))
    for width, height in [*SIZES[::3], (20, 300), (375, 900)]:
        image = picture(width, height)
        to_width, to_height = resized_size(width, height, SMALLER.resize_size)
        bicubic = Image.Resampling.BICUBIC
        resized = Image.fromarray(image).resize((to_width, height), bicubic).resize((to_width, to_height), bicubic)
        left, top = round((to_width - 8) / 2), round((to_height - 8) / 2)
        wanted = resized.crop((left, top, left + 8, top + 8)).tobytes()
        assert in_cpp(plain, model, image, tmp_path)[0] == wanted, f"{width} x {height}"


@pytest.mark.parametrize("io_dtype", list(IODtype))
def test_inputs_are_those_of_python_bit_by_bit(plain: Build, tmp_path: Path, io_dtype: IODtype) -> None:
    transform = Preprocessing.for_size(224)
    model = written_model(tmp_path, transform, io_dtype)
    for item in probes.probe_source():
        image = item.image
        rgb = np.asarray(image)
        _, got = in_cpp(plain, model, rgb, tmp_path)
        assert got == to_input(pixels(image, transform)[None], transform, io_dtype).tobytes()


def test_several_threads_write_the_same_bytes(plain: Build, asan: Build, tsan: Build, tmp_path: Path) -> None:
    """And the error is the first picture's that has one, whoever meets it."""
    model = written_model(tmp_path, LARGER)
    images = [picture(50, 40, seed) for seed in range(9)]
    (tmp_path / "all").write_bytes(b"".join(image.tobytes() for image in images))
    wanted = b"".join(in_cpp(plain, model, image, tmp_path)[1] for image in images)
    for build, threads in ((plain, 1), (plain, 2), (plain, 5), (asan, 4), (tsan, 4), (plain, 64)):
        asked = ("pictures", model, tmp_path / "all", 50, 40, len(images), threads, tmp_path / "out")
        assert build.run("probe", *asked).returncode == 0
        assert (tmp_path / "out").read_bytes() == wanted, threads
        lacking = build.run("probe", *asked[:5], len(images) + 3, *asked[6:])
        assert (lacking.returncode, lacking.stdout) == (1, "bad argument: The picture is a null pointer.\n")
    refused = plain.run("probe", "pictures", model, tmp_path / "all", 50, 40, 9, 0, tmp_path / "out")
    assert refused.stdout == "bad argument: Pictures are preprocessed on at least one thread, not on 0.\n"


def test_rows_may_lie_apart(plain: Build, asan: Build, tmp_path: Path) -> None:
    model = written_model(tmp_path, LARGER)
    image = picture(50, 40)
    packed = in_cpp(plain, model, image, tmp_path)
    for build in (plain, asan):
        assert in_cpp(build, model, image, tmp_path, padding=13) == packed


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 40), (40, 1), (64, 64), (73, 200), (301, 199)])
def test_no_pixel_outside_the_picture_is_read(asan: Build, tmp_path: Path, size: tuple[int, int]) -> None:
    """AddressSanitizer watches the very end of the buffer."""
    in_cpp(asan, written_model(tmp_path, LARGER), picture(*size), tmp_path)


@pytest.mark.parametrize(
    ("width", "height", "stride", "reason"),
    [
        (0, 5, 0, "The picture has no pixels (0 x 5)."),
        (5, -1, 0, "The picture has no pixels (5 x -1)."),
        (MAX_ASPECT + 1, 1, 0, "The picture is too elongated (201 x 1)."),
        (MAX_PIXELS // 10_000 + 1, 10_001, 0, "The picture is too large (17896 x 10001 pixels)."),
        (10, 5, 29, "The picture's rows overlap: the stride is too small."),
    ],
)
def test_a_picture_that_cannot_be_used_is_refused(
    plain: Build, tmp_path: Path, width: int, height: int, stride: int, reason: str
) -> None:
    model = written_model(tmp_path, LARGER)
    (tmp_path / "rgb").write_bytes(bytes(300))
    result = plain.run("probe", "preprocess", model, tmp_path / "rgb", width, height, stride, tmp_path / "out")
    assert (result.returncode, result.stdout) == (1, f"bad argument: {reason}\n")

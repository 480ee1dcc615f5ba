"""Photographs that come in the wheels of scikit-image and scikit-learn, cropped to many: to calibrate on, to judge on.

The two sets are of different photographs. `python -m benchmarks.photographs DIR` writes both as npz files.
"""

from __future__ import annotations

import argparse
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8Array = npt.NDArray[np.uint8]

CALIBRATION = "calibration.npz"
SIDE = 256
_TO_CALIBRATE = (
    *("astronaut.png", "brick.png", "chelsea.png", "coins.png", "grass.png", "hubble_deep_field.jpg", "ihc.png"),
    *("motorcycle_left.png", "moon.png", "page.png", "flower.jpg"),
)
_TO_JUDGE = ("camera.png", "coffee.png", "gravel.png", "retina.jpg", "rocket.jpg", "color.png", "china.jpg")


def calibration_photographs(count: int = 64) -> UInt8Array:
    """uint8 RGB (count, SIDE, SIDE, 3)."""
    return _crops(_TO_CALIBRATE, count, seed=0)


def held_out_photographs(count: int = 28) -> UInt8Array:
    """The same of photographs that no calibration saw."""
    return _crops(_TO_JUDGE, count, seed=1)


def _crops(names: Sequence[str], count: int, seed: int) -> UInt8Array:
    pictures = [_picture(name) for name in names]
    generator = np.random.default_rng(seed)
    return np.stack([_crop(pictures[index % len(pictures)], generator) for index in range(count)])


def _picture(name: str) -> Image.Image:
    package = "sklearn.datasets.images" if name in ("china.jpg", "flower.jpg") else "skimage.data"
    with (importlib.resources.files(package) / name).open("rb") as file:
        return Image.open(file).convert("RGB")


def _crop(picture: Image.Image, generator: np.random.Generator) -> UInt8Array:
    width, height = picture.size
    side = int(min(width, height) * generator.uniform(0.5, 1.0))
    left, top = int(generator.integers(0, width - side + 1)), int(generator.integers(0, height - side + 1))
    crop = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = np.asarray(crop)
    return pixels[:, ::-1] if generator.random() < 0.5 else pixels


def write(folder: Path) -> tuple[Path, Path]:
    """calibration.npz and held_out.npz in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / CALIBRATION, folder / "held_out.npz"
    np.savez(files[0], images=calibration_photographs())
    np.savez(files[1], images=held_out_photographs())
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    for file in write(parser.parse_args().folder):
        print(file)


if __name__ == "__main__":
    main()

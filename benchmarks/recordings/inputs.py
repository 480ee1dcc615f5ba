"""The files that recorded commands read, the same every time."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.recordings.cases import CHECKPOINT, GRAPH, LABELLED, PHOTOS

PROBES = Path(__file__).parents[2] / "spach_deploy" / "data" / "probes"
CROP, COUNT = 160, 16


def make_inputs(folder: Path) -> None:
    """Pictures, labels, recipes and files that are none, in an empty folder."""
    np.savez(folder / PHOTOS, images=_pictures())
    np.savez(folder / LABELLED, images=_pictures(), labels=np.arange(COUNT) % 7)
    (folder / "notes.txt").write_text("Nothing that a command can read.\n")
    (folder / "recipe.toml").write_text(
        'model = "ms_trans_xxs"\nimage_size = 64\nprecision = "fp16"\nengine = "none"\ntop_k = 3\n'
    )
    (folder / "unknown.toml").write_text('model = "ms_trans_xxs"\nflying = true\n')
    (folder / "mine").mkdir()
    (folder / "mine" / "file").write_text("mine\n")


def make_checkpoint(folder: Path, python: Path) -> None:
    """Weights drawn from a seed, under the names that the version of `python` gives them."""
    subprocess.run([python, Path(__file__).with_name("weights.py"), CHECKPOINT], cwd=folder, check=True)


def make_changed_bundle(folder: Path) -> None:
    """A copy of a bundle with one byte of its graph changed, once there is such a bundle."""
    bundle, changed = folder / "build" / GRAPH, folder / "changed"
    if bundle.is_dir() and not changed.exists():
        shutil.copytree(bundle, changed)
        content = bytearray((changed / "model.onnx").read_bytes())
        content[-1] ^= 1
        (changed / "model.onnx").write_bytes(content)


def _pictures() -> NDArray[np.uint8]:
    """Two crops of every built-in photograph, uint8 (COUNT, CROP, CROP, 3)."""
    files = sorted(PROBES.glob("*.jpg"))
    return np.stack([_crop(file, corner) for corner in (1, 2) for file in files])[:COUNT]


def _crop(file: Path, corner: int) -> NDArray[np.uint8]:
    pixels = np.asarray(Image.open(file).convert("RGB"))
    top, left = ((37 * corner) % (pixels.shape[0] - CROP), (53 * corner) % (pixels.shape[1] - CROP))
    return pixels[top : top + CROP, left : left + CROP]

"""Pictures: damaged files in folders and archives, odd arrays, folders with things in them that are no files."""

from __future__ import annotations

import os
import shutil
from random import Random
from typing import Any

import numpy as np

from benchmarks.robustness.box import Box
from benchmarks.robustness.case import Case, Kind, Maker
from benchmarks.robustness.damage import damaged, hostile_texts
from benchmarks.robustness.kinds.commands import EXPORT, export
from benchmarks.robustness.seeds import MODEL, npz_bytes, seeds


def reading_images(box: Box, chance: Random, path: str) -> tuple[str, ...]:
    """Export, validation and prediction on them, or calibration with them."""
    way = chance.random()
    if way < 0.35:
        return export(box, chance, "--images", path)
    if way < 0.5:
        box.bring(seeds().path("fp32"), "bundle")
        return ("spach-predict", "bundle", path)
    if way < 0.8:
        box.bring(seeds().path("fp32"), "bundle")
        box.bring(seeds().path("weights.pth"), "weights.pth")
        labels = ("--labels", path) if chance.random() < 0.3 else ()
        return ("spach-validate", "bundle", "--images", path, "--checkpoint", "weights.pth", *labels)
    if way < 0.9:
        return ("spach-calibrate", *MODEL, "--calibration", path, "-o", "out/scales.json")
    return (*EXPORT, "--images", path, "--checkpoint", path)


def _folder(box: Box, chance: Random) -> Case:
    """Some pictures of a folder are damaged."""
    folder = box.bring(seeds().path("photos"), "input/photos")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    said = []
    for path in chance.sample(files, chance.choice((1, 3, len(files)))):
        content, what = damaged(path.read_bytes(), chance)
        path.write_bytes(content)
        said.append(f"{path.name} {what}")
    return Case(f"photos: {'; '.join(said)}"[:300], reading_images(box, chance, "input/photos"))


def _odd_folder(box: Box, chance: Random) -> Case:
    """Links in a circle, pipes, folders named like pictures, names that terminals obey."""
    folder = box.bring(seeds().path("photos"), "input/photos")
    kind = chance.choice(
        ("loop", "pipe", "folder", "name", "bytes", "dangling", "device", "secret", "deep", "only pipes")
    )
    if kind == "loop":
        (folder / "again").symlink_to(folder, target_is_directory=True)
    elif kind == "pipe":
        os.mkfifo(folder / "class0" / "pipe.png")
    elif kind == "only pipes":
        shutil.rmtree(folder)
        folder.mkdir()
        os.mkfifo(folder / "pipe.png")
    elif kind == "folder":
        (folder / "class1" / "folder.jpg").mkdir()
    elif kind == "name":
        text = chance.choice(hostile_texts(str(box.outside))).replace("/", "_").replace("\0", "")[:100]
        shutil.copyfile(folder / "class0/0.png", folder / "class0" / f"{text}.png")
        (folder / f"c{text}").mkdir()
    elif kind == "bytes":
        shutil.copyfile(folder / "class0/0.png", os.fsencode(folder) + b"/class0/\xff\xfe\x1b[31m.png")
    elif kind == "dangling":
        (folder / "class0" / "gone.png").symlink_to("nowhere")
    elif kind == "device":
        (folder / "class0" / "zero.png").symlink_to("/dev/zero")
    elif kind == "secret":
        (folder / "class0" / "secret.png").symlink_to(box.outside / "kept.txt")
    else:
        deep = folder
        for _ in range(60):
            deep = deep / "d"
        deep.mkdir(parents=True)
        shutil.copyfile(folder / "class0/0.png", deep / "0.png")
    return Case(f"a folder with {kind}", reading_images(box, chance, "input/photos"))


def _archive(file: str) -> Maker:
    def make(box: Box, chance: Random) -> Case:
        content, what = damaged(seeds().read(file), chance)
        suffix = chance.choice((file.partition(".")[2],) * 3 + ("npz", "tar", "png"))
        return Case(f"{file}: {what}", reading_images(box, chance, box.put(f"input/photos.{suffix}", content)))

    return make


def _arrays(box: Box, chance: Random) -> Case:
    """Arrays that are no pictures, and labels that are no classes."""
    shape = (4, 40, 40, 3)
    pixels = np.random.default_rng(chance.randrange(1000)).integers(0, 256, shape, np.uint8)
    odd: dict[str, dict[str, Any]] = {
        "floats": {"images": pixels / 255.0},
        "channels first": {"images": pixels.transpose(0, 3, 1, 2)},
        "Fortran's order": {"images": np.asfortranarray(pixels)},
        "no image": {"images": pixels[:0]},
        "no pixel": {"images": pixels[:, :0]},
        "one row": {"images": pixels[:, :1]},
        "one pixel": {"images": pixels[:, :1, :1]},
        "a strip": {"images": pixels[:, :1].repeat(400, 2)},
        "greys": {"images": pixels[..., 0]},
        "with alpha": {"images": np.concatenate([pixels, pixels[..., :1]], -1)},
        "two arrays": {"a": pixels, "b": pixels},
        "a name that climbs": {"../../../outside/pwned": pixels},
        "too few labels": {"images": pixels, "labels": np.arange(2)},
        "labels below zero": {"images": pixels, "labels": np.full(4, -1)},
        "labels beyond the classes": {"images": pixels, "labels": np.full(4, 10**6)},
        "huge labels": {"images": pixels, "labels": np.full(4, 2**64 - 1, np.uint64)},
        "labels of text": {"images": pixels, "labels": np.array(["a"] * 4)},
        "black": {"images": pixels * 0},
        "noise": {"images": pixels},
        "the same four times": {"images": pixels[:1].repeat(4, 0)},
        "a scalar": {"images": np.uint8(3)},
        "a structure": {"images": np.zeros((2, 8, 8), [("r", "u1"), ("g", "u1"), ("b", "u1")])},
    }
    what = chance.choice(sorted(odd))
    name = box.put("input/photos.npz", npz_bytes(**odd[what]))
    return Case(f"an npz: {what}", reading_images(box, chance, name))


KINDS = (
    Kind("images, folder", 35, _folder),
    Kind("images, odd folder", 20, _odd_folder),
    Kind("images, tar", 20, _archive("photos.tar")),
    Kind("images, tar.gz", 10, _archive("photos.tar.gz")),
    Kind("images, npz", 25, _archive("photos.npz")),
    Kind("images, packed npz", 10, _archive("packed.npz")),
    Kind("images, odd arrays", 25, _arrays),
)

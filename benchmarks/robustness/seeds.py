"""Whole inputs that are damaged: made once, copied into the box of each case."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NAME, SIZE, CLASSES = "small_robust", 32, 11
MODEL = ("--model", NAME, "--image-size", str(SIZE), "--num-classes", str(CLASSES))


def register() -> None:
    """Let the registry know a model that is exported in a second."""
    from spach_deploy.models.published import ARCHITECTURES
    from spach_deploy.options.architecture import Architecture

    ARCHITECTURES[NAME] = Architecture(
        width=16, patch_size=8, channel_ratio=2, stages=((("conv", 1), ("trans", 1)),), heads=2
    )


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Where they lie, relative to `folder`: made by `spach-export` and `spach-package` themselves."""

    folder: Path

    def path(self, name: str) -> Path:
        """One of them."""
        return self.folder / name

    def read(self, name: str) -> bytes:
        """Its bytes."""
        return (self.folder / name).read_bytes()

    @property
    def has_engine(self) -> bool:
        """Whether there is a bundle with an engine that TensorRT for RTX built."""
        return (self.folder / "rtx").is_dir()


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Made when it is needed, and gone when this process ends."""
    return tempfile.TemporaryDirectory(prefix="spach-seeds-")


@functools.cache
def seeds() -> Seeds:
    """All of them; half a minute."""
    register()
    folder = Path(_folder().name)
    _pictures(folder)
    _checkpoints(folder)
    _bundles(folder)
    _packages(folder)
    return Seeds(folder)


def pictures(count: int, side: int = 48, seed: int = 0) -> NDArray[np.uint8]:
    """Crops of the built-in photographs, uint8 (count, side, side, 3); those of another seed are others."""
    from spach_deploy.data.images import probe_source

    photographs = [np.asarray(item.image) for item in probe_source()]
    chance = np.random.default_rng(seed)
    crops = []
    for index in range(count):
        pixels = photographs[index % len(photographs)]
        top, left = (int(chance.integers(0, extent - 3 * side)) for extent in pixels.shape[:2])
        crops.append(pixels[top : top + 3 * side : 3, left : left + 3 * side : 3])
    return np.stack(crops)


def _pictures(folder: Path) -> None:
    """A folder of class folders, the same as a tar, npz files with and without labels, and an array to calibrate on."""
    shown = pictures(8)
    for index, pixels in enumerate(shown):
        path = folder / "photos" / f"class{index % 2}" / f"{index}.{('png', 'jpg', 'bmp', 'webp')[index % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    with tarfile.open(folder / "photos.tar", "w") as tar:
        tar.add(folder / "photos", "photos")
    with tarfile.open(folder / "photos.tar.gz", "w:gz") as tar:
        tar.add(folder / "photos", "photos")
    np.savez(folder / "photos.npz", images=shown, labels=np.arange(8) % CLASSES)
    np.savez_compressed(folder / "packed.npz", images=shown)
    np.savez(folder / "calibration.npz", images=pictures(16, seed=1))


def _checkpoints(folder: Path) -> None:
    import argparse

    import safetensors.torch
    import torch

    from spach_deploy.models.checkpoint import load_model
    from spach_deploy.options.specs import ModelSpec

    state = load_model(ModelSpec(NAME, image_size=SIZE, num_classes=CLASSES)).model.state_dict()
    training = {"model": state, "model_ema": state, "epoch": 3, "args": argparse.Namespace(model=NAME, input_size=SIZE)}
    torch.save(training, folder / "weights.pth")
    torch.save(training, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, folder / "weights.safetensors")


def _bundles(folder: Path) -> None:
    from tests import small_bundles

    checkpoint, calibration = str(folder / "weights.pth"), str(folder / "calibration.npz")
    none, scales = ("--engine", "none"), ("--calibration", str(folder / "scales.json"))
    run("spach-export", *MODEL, "--checkpoint", checkpoint, "--fp32", *none, "-o", folder / "fp32")
    run("spach-export", *MODEL, "--fp16", "--top-k", "3", "--softmax", *none, "-o", folder / "fp16")
    run("spach-export", *MODEL, "--fp16", "--io-dtype", "uint8", *none, "-o", folder / "uint8")
    run("spach-calibrate", *MODEL, "--calibration", calibration, "-o", folder / "scales.json")
    run("spach-export", *MODEL, "--int8", *scales, *none, "-o", folder / "int8")
    if importlib.util.find_spec("tensorrt_rtx"):
        run("spach-export", *MODEL, "--fp16", "--engine", "tensorrt-rtx", "--gpu", "sm89", "-o", folder / "rtx")
    small_bundles.give_plan(folder / "fp16")


def _packages(folder: Path) -> None:
    """Repositories for Triton."""
    package = ("spach-package", "triton")
    run(*package, folder / "uint8", "-o", folder / "repository", "--ensemble")
    run(*package, folder / "fp16", "-o", folder / "plans", "--backend", "tensorrt", "--force")


def run(*command: object) -> None:
    """A command that must succeed, in this process."""
    import importlib

    from click.testing import CliRunner

    from tests.commands import entry_points

    program, *arguments = map(str, command)
    module, _, function = entry_points()[program].partition(":")
    result = CliRunner().invoke(getattr(importlib.import_module(module), function), arguments)
    assert result.exit_code == 0, (command, result.output)


def manifest_with(folder: Path, **sha256: str) -> None:
    """Put other hashes into a bundle's manifest, as whoever forges a bundle would. Names have `_` for `.`."""
    path = folder / "manifest.json"
    content: dict[str, Any] = json.loads(path.read_text())
    for name, digest in sha256.items():
        content["files"][name.replace("_", ".")]["sha256"] = digest
    path.write_text(json.dumps(content))


def npz_bytes(**arrays: Any) -> bytes:
    """An npz as numpy writes it, pickles included."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()

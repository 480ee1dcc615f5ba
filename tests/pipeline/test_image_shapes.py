"""Exports of images that are no 224 x 224 RGB: rectangles, other numbers of channels; and few and many classes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spach_deploy import Session
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import ImageError, ModelError, UsageError
from spach_deploy.data.images import batches, probe_source
from spach_deploy.data.preprocess import normalize, pixels
from spach_deploy.models import load_model
from spach_deploy.models import published as configs
from spach_deploy.options.specs import (
    EngineTarget,
    ExportOptions,
    Flavour,
    Hyperparameters,
    ImageSize,
    IODtype,
    ModelSpec,
    OutputSpec,
    Precision,
    Preprocessing,
    QuantizationSpec,
    sides,
)
from spach_deploy.pipeline.export import export
from spach_deploy.quantization.calibration import CalibrationKey
from spach_deploy.validation.target import ValidationRequest, validate_target
from tests import static_models

NAME = "shaped"


@contextlib.contextmanager
def registered(channels: int = 3, kind: str = "hybrid") -> Iterator[None]:
    """Let the registry know a small model of images with so many channels, for as long as the block lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.ARCHITECTURES, NAME, static_models.ARCHITECTURES[kind].replace(channels=channels))
        yield


def exported(folder: Path, model: ModelSpec, channels: int = 3, kind: str = "hybrid", **options: Any) -> Bundle:
    """A bundle without an engine."""
    target = EngineTarget(Flavour.NONE)
    with registered(channels, kind):
        return export(ExportOptions(model, engine=target, output=folder / "bundle", **options)).bundle


def images(channels: int, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    """Four images (4, 40, 56, C) with structure: built-in photographs, moved from channel to channel."""
    batch = next(batches(probe_source(), Preprocessing.for_size((40, 56)), 4))
    cut = batch.pixels[..., :1]
    moved = np.concatenate([np.roll(cut, 5 * channel, axis=2) for channel in range(channels)], axis=-1)
    return moved if dtype is np.uint8 else (moved / 255).astype(dtype)


CASES: list[tuple[str, ImageSize, int, IODtype]] = [
    ("hybrid", (32, 48), 3, IODtype.UINT8),
    ("hybrid", (48, 32), 1, IODtype.FP32),
    ("mlp", (32, 56), 3, IODtype.FP16),
    ("trans", 32, 1, IODtype.UINT8),
    ("hybrid_stem", (64, 32), 5, IODtype.UINT8),
    ("conv", 32, 2, IODtype.FP32),
]


@pytest.mark.parametrize(("kind", "size", "channels", "io_dtype"), CASES)
def test_any_shape_is_exported_and_answers_as_pytorch_does(
    tmp_path: Path, kind: str, size: ImageSize, channels: int, io_dtype: IODtype
) -> None:
    model = ModelSpec(NAME, image_size=size, num_classes=7, hyperparameters=Hyperparameters(crop=1, std=(0.3,)))
    bundle = exported(tmp_path, model, channels, kind, outputs=OutputSpec(io_dtype))
    manifest = bundle.manifest
    height, width = sides(size)
    is_uint8 = io_dtype is IODtype.UINT8
    assert manifest.model.image_size == manifest.preprocessing.image_size == manifest.preprocessing.resize_size == size
    assert manifest.preprocessing.std == (0.3,) * channels
    assert manifest.inputs[0].shape[1:] == ((height, width, channels) if is_uint8 else (channels, height, width))

    given = images(channels)
    prepared = np.stack([pixels(image, manifest.preprocessing) for image in given])
    with registered(channels, kind):
        reference = load_model(model).model(torch.from_numpy(normalize(prepared, manifest.preprocessing)))
    wanted = torch.softmax(reference.double(), dim=1).numpy()
    with Session(bundle) as session:
        found = session.predict(given, top_k=7)
    for prediction, row in zip(found, wanted, strict=True):
        answer = {best.index: best.probability for best in prediction.classes}
        assert np.abs(np.array([answer[index] for index in range(7)]) - row).max() < 2e-3


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_five_channels_are_calibrated_quantized_and_validated_from_an_npz(tmp_path: Path, dtype: Any) -> None:
    np.savez(tmp_path / "images.npz", images=images(5, dtype), labels=np.arange(4))
    np.savez(tmp_path / "others.npz", images=images(5, dtype)[:, ::-1].copy())
    model = ModelSpec(NAME, image_size=(32, 40), num_classes=7)
    quantization = QuantizationSpec(calibration=tmp_path / "others.npz", rest=Precision.FP32)
    options: dict[str, Any] = {
        "precision": Precision.INT8,
        "quantization": quantization,
        "images": tmp_path / "images.npz",
    }
    bundle = exported(tmp_path, model, 5, **options)
    assert bundle.manifest.quantization is not None
    assert len(bundle.manifest.quantization.calibration.survey["channel_mean"]) == 5
    with registered(5):
        request = ValidationRequest(bundle.path, images=tmp_path / "images.npz")
        result = validate_target(request, lambda _: None)
    assert result.passed


def test_pictures_and_arrays_that_do_not_fit_the_channels_are_one_sentence(tmp_path: Path) -> None:
    np.savez(tmp_path / "four.npz", images=images(4))
    np.savez(tmp_path / "floats.npz", images=images(5, np.float32))
    model = ModelSpec(NAME, image_size=32)
    with pytest.raises(ImageError, match=r"The model takes images of 5 channels, and these have 4\."):
        exported(tmp_path, model, 5, images=tmp_path / "four.npz")
    with pytest.raises(ImageError, match=r"takes levels 0\.\.255, and the images are floats"):
        exported(tmp_path, model, 5, images=tmp_path / "floats.npz", outputs=OutputSpec(IODtype.UINT8))
    bundle = exported(tmp_path, model, 5)
    assert "in grey, 5 times" in bundle.manifest.validation.images
    probe = Path(configs.__file__).parents[1] / "data" / "probes" / "coffee.jpg"
    with Session(bundle) as session, pytest.raises(ImageError, match="a picture has 3, or 1 if it is grey"):
        session.predict(probe)


def test_means_for_other_channels_are_refused_in_one_sentence() -> None:
    spec = ModelSpec(NAME, hyperparameters=Hyperparameters(mean=(0.5, 0.5)))
    with registered(5), pytest.raises(ModelError, match="mean has 2 numbers, and the model takes images of 5 channels"):
        load_model(spec)
    with registered(1):
        loaded = load_model(ModelSpec(NAME))
    assert (loaded.preprocessing.mean, loaded.preprocessing.std) == ((0.449,), (0.226,))
    assert "pixel mean 0.449 (ImageNet's over its channels)" in map(str, loaded.settings)


@pytest.mark.parametrize("size", [(16, 64), (64, 16), 8])
def test_a_size_too_small_for_the_stages_is_refused(size: ImageSize) -> None:
    with registered(), pytest.raises(ModelError, match="too small: mixing needs a grid of 2 by 2 tokens"):
        load_model(ModelSpec(NAME, image_size=size))


@pytest.mark.parametrize("classes", [1, 2, 100_000])
def test_any_number_of_classes_is_exported_and_answers_with_labels(tmp_path: Path, classes: int) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"kind {index}\n" for index in range(classes)))
    outputs = OutputSpec(top_k=min(classes, 3), softmax=classes > 1)
    bundle = exported(tmp_path, ModelSpec(NAME, image_size=32, num_classes=classes), kind="conv", outputs=outputs)
    assert bundle.manifest.outputs[0].shape == (None, classes)
    with Session(bundle, labels=labels if classes > 1 else None) as session:
        (prediction,) = session.predict(images(3)[0])
    assert len(prediction.classes) == (0 if classes == 1 else min(classes, 5))  # the only class has a score, no rank
    assert [best.label for best in prediction.classes] == [f"kind {best.index}" for best in prediction.classes]
    np.savez(tmp_path / "labelled.npz", images=images(3), labels=np.arange(4) % classes)
    with registered(3, "conv"):
        result = validate_target(ValidationRequest(bundle.path, images=tmp_path / "labelled.npz"), lambda _: None)
    assert result.passed


def test_more_best_classes_than_classes_are_refused(tmp_path: Path) -> None:
    spec = ModelSpec(NAME, image_size=32, num_classes=2)
    with pytest.raises(UsageError, match="--top-k 3 of 2 classes does not exist"):
        exported(tmp_path, spec, outputs=OutputSpec(top_k=3))
    with pytest.raises(UsageError, match="the softmax of one class is 1 for every image"):
        exported(tmp_path, ModelSpec(NAME, image_size=32, num_classes=1), outputs=OutputSpec(softmax=True))


def test_a_calibration_of_another_shape_is_named() -> None:
    entries: dict[str, Any] = {"weights_sha256": "", "model": "m", "format": "int8", "method": "max", "half": False}
    key = CalibrationKey(image_size=(192, 256), sites="", preprocessing="", **entries)
    read_again = {**vars(key), "image_size": [192, 256]}
    assert key.difference(read_again) == ""
    assert key.difference({**read_again, "image_size": 224}) == "another image size: 224 there, 192x256 now"

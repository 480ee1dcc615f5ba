"""--max-rel-l2 and --max-drop as they are typed: layers are left in float until the bound holds, and it is said why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spach_deploy.bundle.store import Bundle
from spach_deploy.data.preprocess import normalize, pixels
from spach_deploy.models import load_model
from spach_deploy.options.specs import ModelSpec, Preprocessing
from spach_deploy.quantization.plan import read_plan
from tests import small_bundles
from tests.commands import export, refusal
from tests.quantization.small_quantized import calibration_images, pictures

SMALL = ("--model", small_bundles.NAME, "--image-size", small_bundles.SIZE, "--num-classes", small_bundles.CLASSES)
INT8 = ("--int8", "--engine", "none", "--calibration")


def test_the_bound_is_kept_by_measurement_and_the_cost_of_each_layer_is_told(tmp_path: Path) -> None:
    with small_bundles.registered():
        result = export(*SMALL, *INT8, calibration_images(), "--max-rel-l2", 0.006, "-o", tmp_path / "bound")
    assert result.exit_code == 0, result.stderr
    bundle = Bundle.open(tmp_path / "bound")
    told = bundle.manifest.content()["quantization"]["sensitivity"]
    assert told["measured"] <= told["bound"] == 0.006 < told["all_quantized"]
    kept = {layer["module"] for layer in told["layers"] if layer["kept_float"]}
    plan = read_plan(bundle.file("quantization.json"))
    assert kept
    assert kept == {entry.module for entry in plan.kept if entry.reason.startswith("cost:")}
    assert not kept & {site.module for site in plan.sites}
    assert "left in float" in result.stderr
    assert (bundle.path / "sensitivity.svg").read_text().startswith("<?xml")


def labelled(folder: Path) -> tuple[Path, Path]:
    """Pictures, and the classes that the model itself sees in them."""
    images = pictures(24, first=7)
    preprocessing = Preprocessing.for_size(small_bundles.SIZE)
    from PIL import Image

    prepared = normalize(np.stack([pixels(Image.fromarray(image), preprocessing) for image in images]), preprocessing)
    with small_bundles.registered():
        spec = ModelSpec(small_bundles.NAME, image_size=small_bundles.SIZE, num_classes=small_bundles.CLASSES)
        model = load_model(spec)
    with torch.inference_mode():
        classes = model.model(torch.from_numpy(prepared)).argmax(dim=1).numpy()
    file = folder / "labelled.npz"
    np.savez(file, images=images, labels=classes.astype(np.int64))
    return file, file


def test_a_bound_on_the_drop_is_kept(tmp_path: Path) -> None:
    images, labels = labelled(tmp_path)
    with small_bundles.registered():
        result = export(
            *(*SMALL, *INT8, calibration_images(), "--images", images, "--labels", labels),
            *("--max-drop", 0, "-o", tmp_path / "bundle"),
        )
    assert result.exit_code == 0, result.stderr
    told = Bundle.open(tmp_path / "bundle").manifest.content()["quantization"]["sensitivity"]
    assert told["measure"] == "points of top-1"
    assert told["measured"] <= 0


def test_a_bound_that_nothing_keeps_is_exit_1(tmp_path: Path) -> None:
    with small_bundles.registered():
        result = export(*SMALL, *INT8, calibration_images(), "--max-rel-l2", 0, "-o", tmp_path / "bundle")
    assert "Even with every layer in float" in refusal(result, 1)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--max-drop", 0.3), "--max-drop needs labelled images"),
        (("--max-drop", 0.3, "--max-rel-l2", 0.1), "two bounds"),
        (("--max-rel-l2", "nan"), "is no bound"),
        (("--labels", "x"), "--labels is for --max-drop here"),
    ],
)
def test_contradictory_bounds_are_refused(arguments: tuple[object, ...], reason: str, tmp_path: Path) -> None:
    with small_bundles.registered():
        result = export(*SMALL, *INT8, calibration_images(), *arguments, "-o", tmp_path / "bundle")
    assert reason in refusal(result)

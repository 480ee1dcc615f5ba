"""spach-export --int8 and --fp8, and spach-calibrate, as their users call them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from spach_deploy.cli.calibrate import main as calibrate_command
from spach_deploy.data.images import probe_source
from spach_deploy.models import published as configs
from spach_deploy.options import quantization as options
from spach_deploy.options.specs import Flavour
from spach_deploy.pipeline.steps import graph as stages
from spach_deploy.quantization.plan import read_plan
from spach_deploy.runtime.devices import is_installed
from tests import static_models
from tests.commands import contents, export, refusal
from tests.quantization.small_models import canonical
from tests.quantization.small_quantized import calibration_images, pictures

needs_rtx = pytest.mark.skipif(not is_installed(Flavour.TENSORRT_RTX), reason="tensorrt-rtx is not installed")

NAME = "small_conv"
MODEL = ("--model", NAME, "--image-size", static_models.IMAGE_SIZE, "--num-classes", static_models.CLASSES)
NO_ENGINE = ("--engine", "none")


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny model by name, whose graph is exported once: every command compares it with PyTorch all the same."""

    def exported(*arguments: Any) -> ir.Model:
        return ir.from_proto(canonical("conv"))

    monkeypatch.setitem(configs.ARCHITECTURES, NAME, static_models.ARCHITECTURES["conv"])
    monkeypatch.setattr(stages, "export_canonical", exported)
    monkeypatch.chdir(tmp_path)


def int8(*arguments: object) -> Result:
    return export(*MODEL, *NO_ENGINE, "--int8", *arguments)


def calibrate(*arguments: object) -> Result:
    given = [str(argument) for argument in (*MODEL, *arguments)]
    return CliRunner().invoke(calibrate_command, given, prog_name="spach-calibrate")


def refused(result: Result) -> str:
    """The sentence; and nothing was written."""
    sentence = refusal(result)
    assert not Path("build").exists()
    return sentence


def npz(path: Path, images: NDArray[np.uint8]) -> Path:
    np.savez(path, images=images)
    return path


# Refused, with exit 2 and one sentence


def test_no_images() -> None:
    assert "--int8 needs images to calibrate on, and none are ever made up" in refused(int8())
    assert "--fp8 needs images" in refused(export(*MODEL, *NO_ENGINE, "--fp8"))


def test_images_that_are_not_there() -> None:
    assert "nowhere does not exist" in refused(int8("--calibration", "nowhere"))
    assert "nowhere.json does not exist" in refused(int8("--calibration", "nowhere.json"))


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(int8("--calibration", "empty"))


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    (tmp_path / "texts" / "b.png").write_text("no picture either")
    assert "texts" in refused(int8("--calibration", "texts"))


def test_constant_images(tmp_path: Path) -> None:
    grey = np.stack([np.full((48, 48, 3), 10 * level, np.uint8) for level in range(1, 9)])
    assert "All 8 images" in (sentence := refused(int8("--calibration", npz(tmp_path / "grey.npz", grey))))
    assert "ranges taken from them would fit no real picture" in sentence


def test_images_of_noise(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    assert "ranges taken from them would fit no real picture" in refused(
        int8("--calibration", npz(tmp_path / "noise.npz", noise))
    )


def photographs(folder: Path) -> Path:
    """The built-in photographs, which an export without --images is judged on, as a user's files."""
    folder.mkdir()
    for item in probe_source():
        assert isinstance(item.image, Image.Image)
        item.image.save((folder / item.name).with_suffix(".png"))
    return folder


def test_calibration_images_that_validate_too_unless_insisted(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photographs")
    sentence = refused(int8("--calibration", folder))
    assert "8 of 8 validation images are calibration images too" in sentence
    assert sentence.endswith("--allow-overlap.")
    result = int8("--calibration", folder, "--allow-overlap", "-o", tmp_path / "bundle")
    assert result.exit_code == 0, result.stderr
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert any("the result would look better than it is" in note for note in manifest["notes"])


@pytest.mark.parametrize("rest", ["int8", "fp8", "half"])
def test_a_rest_that_is_none(rest: str) -> None:
    assert "--rest" in refusal_of_click(int8("--calibration", calibration_images(), "--rest", rest))


def refusal_of_click(result: Result) -> str:
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize(
    "option",
    [
        ("--calibration", "photos"),
        ("--calibration-cache", "c.json"),
        ("--method", "mse"),
        ("--rest", "fp32"),
        ("--keep-float", "*"),
        ("--quantize", "head"),
        ("--per-tensor", "*"),
        ("--no-equalize",),
        ("--allow-overlap",),
        ("--vnni",),
        ("--max-rel-l2", "0.1"),
        ("--max-drop", "0.3"),
        ("--labels", "labels"),
    ],
    ids=lambda option: option[0],
)
@pytest.mark.parametrize("precision", ["--fp16", "--fp32"])
def test_quantization_options_without_quantization(precision: str, option: tuple[str, ...]) -> None:
    sentence = refused(export(*MODEL, *NO_ENGINE, precision, *option))
    assert f"{option[0]} is for quantized exports" in sentence


@pytest.mark.parametrize(
    "others",
    [("--int8", "--rest", "fp16", *NO_ENGINE), ("--fp8", "--rest", "fp32", *NO_ENGINE), ("--int8", "--rest", "fp32")],
    ids=["half", "fp8", "engine"],
)
def test_vnni_for_what_is_not_eight_bits_on_a_cpu(others: tuple[str, ...]) -> None:
    sentence = refused(export(*MODEL, *others, "--calibration", calibration_images(), "--vnni"))
    assert "--vnni is for eight bits on a CPU. Give --int8 --rest fp32 --engine none" in sentence


def test_vnni_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "has_vnni", lambda: False)
    sentence = refused(int8("--rest", "fp32", "--calibration", calibration_images(), "--vnni"))
    assert "this one has none. Leave it out, or export where the model will run." in sentence


@needs_rtx
def test_fp8_for_gpus_that_have_none() -> None:
    sentence = refused(export(*MODEL, "--fp8", "--gpu", "sm86", "--calibration", calibration_images()))
    assert "fp8" in sentence.lower()
    assert "sm86" in sentence


@pytest.mark.parametrize("option", ["--keep-float", "--quantize", "--per-tensor"])
def test_patterns_that_match_no_layer(option: str) -> None:
    sentence = refused(int8("--calibration", calibration_images(), option, "layer9.*"))
    assert f"{option} 'layer9.*' matches no" in sentence


def test_fp8_convolutions() -> None:
    sentence = refused(
        export(*MODEL, *NO_ENGINE, "--fp8", "--calibration", calibration_images(), "--quantize", "stem*")
    )
    assert "stem.proj is a convolution, and TensorRT runs FP8 convolutions in half" in sentence


# spach-calibrate


@functools.cache
def calibration_file() -> bytes:
    """What spach-calibrate writes, made once."""
    made = calibrate("--calibration", calibration_images(), "-o", "made.json")
    assert made.exit_code == 0, made.stderr
    return Path("made.json").read_bytes()


def test_a_calibration_file_gives_the_plan_that_images_give(tmp_path: Path) -> None:
    images = calibration_images()
    result = calibrate("--calibration", images, "-o", "c.json")
    assert result.exit_code == 0, result.stderr
    assert "images       16" in result.stdout
    for calibration, target in ((images, "a"), ("c.json", "b")):
        exported = int8("--calibration", calibration, "-o", target)
        assert exported.exit_code == 0, exported.stderr
    plans = [read_plan(tmp_path / target / "quantization.json") for target in "ab"]
    assert plans[0] == plans[1]
    sections = [json.loads((tmp_path / target / "manifest.json").read_text())["quantization"] for target in "ab"]
    assert sections[0] == sections[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--int8", "--method", "mse"), "another method: max there, mse now"),
        (("--fp8",), "another format: int8 there, fp8 now"),
        (("--int8", "--rest", "fp32"), "other types around the layers"),
        (("--int8", "--keep-float", "blocks.1.*"), "other quantized layers"),
        (("--int8", "--no-equalize"), "other quantized layers"),
        (("--int8", "--per-tensor", "blocks.1.*"), "other quantized layers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_calibration_that_does_not_fit_is_refused_by_name(arguments: tuple[str, ...], sentence: str) -> None:
    Path("c.json").write_bytes(calibration_file())
    found = refused(export(*MODEL, *NO_ENGINE, *arguments, "--calibration", "c.json"))
    assert "The calibration c.json does not fit this export" in found
    assert sentence in found


def test_a_cache_is_reused_for_the_same_images_and_refused_for_others(tmp_path: Path) -> None:
    cached = ("--calibration-cache", "c.json")
    first = int8("--calibration", calibration_images(), *cached, "-o", "a")
    assert first.exit_code == 0, first.stderr
    before = contents(tmp_path)["c.json"]
    again = int8("--calibration", calibration_images(), *cached, "-o", "b", "-v")
    assert again.exit_code == 0, again.stderr
    assert "same weights, layers, method and images" in again.stderr
    others = npz(tmp_path / "others.npz", pictures(8, first=5))
    sentence = refused(int8("--calibration", others, *cached, "-o", "c"))
    assert "was made on other images than" in sentence
    assert contents(tmp_path)["c.json"] == before


def test_an_interrupted_calibration_leaves_what_the_next_goes_on_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from spach_deploy.cli.reporting import ProgressDisplay
    from spach_deploy.quantization import calibration as module

    monkeypatch.setattr(module, "_STATE_EVERY_S", -1.0)
    with monkeypatch.context() as patch:

        def interrupt(self: Any, progress: module.CalibrationProgress) -> None:
            if progress.done == 6:
                raise KeyboardInterrupt

        patch.setattr(ProgressDisplay, "calibrating", interrupt)
        result = calibrate("--calibration", calibration_images(), "-o", "c.json")
    assert result.exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["c.json.unfinished"]
    result = calibrate("--calibration", calibration_images(), "-o", "c.json", "-v")
    assert result.exit_code == 0, result.stderr
    assert "went on after 6 images" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    interrupted = json.loads(Path("c.json").read_text())
    assert calibrate("--calibration", calibration_images(), "-o", "d.json").exit_code == 0
    whole = json.loads(Path("d.json").read_text())
    assert {**interrupted, "seconds": 0} == {**whole, "seconds": 0}


def test_calibrating_without_images_or_into_no_json_is_refused() -> None:
    assert "needs images to calibrate on" in refused(calibrate("-o", "c.json"))
    assert "c.txt does not end with .json" in refused(calibrate("--calibration", calibration_images(), "-o", "c.txt"))
    assert "no does not exist" in refused(calibrate("--calibration", calibration_images(), "-o", "no/c.json"))


def test_pictures_of_one_colour_among_others_are_warned_of(tmp_path: Path) -> None:
    images = pictures(16).copy()
    images[3] = 7
    result = calibrate("--calibration", npz(tmp_path / "mixed.npz", images), "-o", "c.json", "-v")
    assert result.exit_code == 0, result.stderr
    assert "Only 16 images to calibrate with: give 64 or more" in result.stderr
    assert "1 of 16 images is of one colour" in result.stderr


def test_a_picture_that_is_broken_is_skipped_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for index, picture in enumerate(pictures(8)):
        Image.fromarray(picture).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    result = calibrate("--calibration", folder, "-o", "c.json", "-v")
    assert result.exit_code == 0, result.stderr
    assert "Skipped broken.png" in result.stderr
    assert json.loads(Path("c.json").read_text())["images"] == 8

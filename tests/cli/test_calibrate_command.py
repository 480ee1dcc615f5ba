"""spach-calibrate as it is typed: the file, what it refuses, how it goes on, and the export that takes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from spach_deploy.bundle.store import Bundle
from spach_deploy.cli.calibrate import main
from spach_deploy.graph.precision.ranges import Arrays
from spach_deploy.quantization import calibration as module
from spach_deploy.quantization.plan import read_plan
from spach_deploy.quantization.statistics import Collector
from tests import small_bundles
from tests.commands import export, refusal
from tests.quantization.small_quantized import calibration_images, pictures

SMALL = ("--model", small_bundles.NAME, "--image-size", small_bundles.SIZE, "--num-classes", small_bundles.CLASSES)


def calibrate(*arguments: object) -> Result:
    with small_bundles.registered():
        return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("calibration") / "small.json"
    result = calibrate(*SMALL, "--calibration", calibration_images(), "-o", file)
    assert result.exit_code == 0, result.stderr
    assert "images       16: npz" in result.stdout
    assert "pixels       mean" in result.stdout
    assert "Only 16 images to calibrate with: give 64 or more." in result.stderr
    return file


def test_the_file_is_small_and_readable(made: Path) -> None:
    content = json.loads(made.read_text())
    assert made.stat().st_size < 1_000_000
    assert content["images"] == 16
    assert content["key"]["method"] == "max"
    assert made.read_text().count("\n") > len(content["plan"]["sites"])


def exported(calibration: Path, target: Path, *arguments: object) -> Result:
    with small_bundles.registered():
        return export(*SMALL, "--int8", *arguments, "--calibration", calibration, "--engine", "none", "-o", target)


def test_an_export_takes_it_and_has_its_scales(made: Path, tmp_path: Path) -> None:
    result = exported(made, tmp_path / "bundle", "--keep-float", "head")  # it is in float by itself
    assert result.exit_code == 0, result.stderr
    bundle = Bundle.open(tmp_path / "bundle")
    scales = [site.weight_scales for site in read_plan(bundle.file("quantization.json")).sites]
    assert scales == [tuple(site["weight_scales"]) for site in json.loads(made.read_text())["plan"]["sites"]]


def test_an_export_with_other_rewrites_refuses_it(made: Path, tmp_path: Path) -> None:
    """tests/quantization/test_quantized_commands.py has the other options that make it another calibration."""
    result = exported(made, tmp_path / "bundle", "--no-rewrite", "fold_qkv_bias")
    assert "other quantized layers" in refusal(result)


def test_the_same_again_keeps_the_file(made: Path) -> None:
    before = made.read_bytes()
    result = calibrate(*SMALL, "--calibration", calibration_images(), "-o", made)
    assert result.exit_code == 0
    assert "same weights, layers, method and images" in result.stderr
    assert made.read_bytes() == before


def test_other_images_are_refused_unless_it_may_be_replaced(made: Path, tmp_path: Path) -> None:
    others, copy = tmp_path / "others.npz", tmp_path / "copy.json"
    np.savez(others, images=pictures(8, first=5))
    copy.write_bytes(made.read_bytes())
    assert "was made on other images" in refusal(calibrate(*SMALL, "--calibration", others, "-o", copy))
    assert copy.read_bytes() == made.read_bytes()
    assert calibrate(*SMALL, "--calibration", others, "-o", copy, "--overwrite").exit_code == 0
    assert json.loads(copy.read_text())["images"] == 8


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("nowhere/x.json", "nowhere does not exist, so"),
        ("file/x.json", "file is not a directory, so"),
        ("folder.json", "folder.json cannot be written (Is a directory)"),
        ("/proc/x.json", "/proc/x.json cannot be written ("),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_first_image(
    output: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr("spach_deploy.data.readers.open_images", pytest.fail)
    assert reason in refusal(calibrate(*SMALL, "--calibration", calibration_images(), "-o", output))
    with small_bundles.registered():
        cached = export(*SMALL, "--int8", "--calibration", calibration_images(), "--calibration-cache", output)
    assert reason in refusal(cached)


def test_a_file_that_is_no_calibration_is_left_alone_with_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    result = calibrate(*SMALL, "--calibration", calibration_images(), "-o", tmp_path / "mine.json")
    assert result.exit_code == 2
    said = result.stderr.splitlines()[-1]
    assert said.endswith("mine.json is no calibration file. " + said.partition("file. ")[2])
    assert "or give another file" in said
    assert "spach-calibrate" not in said  # it is what was typed
    assert (tmp_path / "mine.json").read_text() == "{}"


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STATE_EVERY_S", 0.0)
    file = tmp_path / "small.json"
    run, seen = Collector.run, 0

    def killed(self: Collector, feeds: Arrays) -> None:
        nonlocal seen
        seen += 1
        if seen == 11:
            raise KeyboardInterrupt
        run(self, feeds)

    monkeypatch.setattr(Collector, "run", killed)
    calibrate(*SMALL, "--calibration", calibration_images(), "-o", file)
    assert [path.name for path in tmp_path.iterdir()] == ["small.json.unfinished"]
    result = calibrate(*SMALL, "--calibration", calibration_images(), "-o", file)
    assert "went on after 10 images" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["small.json"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "needs images to calibrate on"),
        (("--calibration", "nowhere"), "nowhere does not exist"),
        (("--calibration", "{images}", "-o", "x.txt"), "does not end with .json"),
        (("--calibration", "{images}", "-o", "nowhere/x.json"), "nowhere does not exist, so"),
        (("--calibration", "{images}", "--per-tensor", "zzz"), "matches no quantized layer"),
    ],
)
def test_bad_usage_is_one_sentence(arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    given = [argument.format(images=calibration_images()) for argument in arguments]
    output = () if "-o" in given else ("-o", tmp_path / "x.json")
    assert reason in refusal(calibrate(*SMALL, *output, *given))

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import spach_deploy
from spach_deploy.cli.predict import main
from tests import small_bundles
from tests.commands import console_script, refusal

pytest.importorskip("onnxruntime")


def predict(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="spach-predict")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, one that is none, and one with a name that is not UTF-8."""
    folder = tmp_path_factory.mktemp("predict") / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png", os.fsdecode(b"caf\xe9.png")):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (50, 60, 3), np.uint8)
        with (folder / name).open("wb") as file:
            Image.fromarray(pixels).save(file, "PNG")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_a_folder_is_answered_and_what_cannot_be_read_is_named(photos: Path) -> None:
    done = predict(small_bundles.bundle(), photos, "--top-k", 2)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        f"{photos}/{name}" for name in ("a.png", "b.png", r"caf\xe9.png")
    ]
    assert len(lines) == 9
    assert lines[1].split()[0].endswith("%")
    said = done.stderr.splitlines()
    assert said[0] == "Runs in ONNX Runtime (CPU)."
    assert said[1].startswith("The engine does not run here: ")
    assert said[-2] == f"Skipped {photos}/broken.png: It is not a picture in a known format."
    assert said[-1].startswith("3 pictures in ")
    assert said[-1].endswith("images/s in ONNX Runtime (CPU).")


def test_json_is_a_line_for_each_picture(photos: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"thing {index}\n" for index in range(small_bundles.CLASSES)))
    done = predict(small_bundles.bundle(), photos / "b.png", photos / "a.png", "--json", "--labels", labels)
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [entry["image"] for entry in found] == [f"{photos}/b.png", f"{photos}/a.png"]
    with spach_deploy.Bundle.open(small_bundles.bundle()).session() as session:
        best = session.predict(photos / "b.png")[0].classes[0]
    first = found[0]["classes"][0]
    assert first == {"index": best.index, "probability": best.probability, "label": f"thing {best.index}"}
    assert "label" not in predict(small_bundles.bundle(), photos / "a.png", "--json").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ((), 2, "Missing argument 'IMAGE...'"),
        (("nowhere.png",), 2, "There is no nowhere.png."),
        (("{photos}/broken.png",), 2, "None of the 1 images"),
        (("{photos}", "--top-k", "1000"), 2, "classes, not 1000"),
        (("{photos}", "--batch", "33"), 2, "A batch of 33 is not in the bundle's profile. Give 1 to 32."),
        (("{photos}", "--labels", "{photos}/a.png"), 2, "--labels"),
        (("{photos}", "--runtime", "fastest"), 2, "fastest"),
        (("{photos}", "--runtime", "engine"), 3, "The engine cannot run here"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(arguments: tuple[str, ...], code: int, reason: str, photos: Path) -> None:
    result = predict(small_bundles.bundle(), *(word.format(photos=photos) for word in arguments))
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert reason in last


def test_a_bundle_that_was_changed_is_exit_code_1(photos: Path, tmp_path: Path) -> None:
    bundle = small_bundles.copy(small_bundles.bundle(), tmp_path / "bundle")
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert "model.onnx was changed" in refusal(predict(bundle, photos), 1)
    assert "so it is no bundle" in refusal(predict(photos, photos), 2)


def test_ctrl_c_says_how_many_were_answered(tmp_path: Path) -> None:
    np.savez(tmp_path / "many.npz", images=np.zeros((20_000, 32, 32, 3), np.uint8))
    script = console_script("spach-predict", tmp_path)
    call = [str(script), str(small_bundles.bundle()), str(tmp_path / "many.npz"), "--json"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["image"].endswith("many.npz/image 0")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"Interrupted\. \d+ pictures were answered\.", said.splitlines()[-1])
    assert "Traceback" not in said

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
from spach_deploy.options.specs import Precision
from tests import small_bundles
from tests.commands import console_script, export, refusal
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny

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


@pytest.mark.usefixtures("small_model_registered")
def test_the_score_of_the_only_class_is_a_number(photos: Path, tmp_path: Path) -> None:
    """Its softmax is 1 for every picture."""
    given = ("--model", small_bundles.NAME, "--image-size", small_bundles.SIZE, "--num-classes", 1, "--engine", "none")
    done = export(*given, "-o", tmp_path / "bundle")
    assert done.exit_code == 0, done.output
    assert "1 class\n" in done.stdout
    told = predict(tmp_path / "bundle", photos / "a.png")
    assert told.exit_code == 0, told.output
    name, score = told.stdout.splitlines()[1].split()
    assert (name, float(score)) == ("logits", float(f"{float(score):.6g}"))
    found = json.loads(predict(tmp_path / "bundle", photos / "a.png", "--json").stdout)
    assert found["logits"] == [pytest.approx(float(score), rel=1e-5)]
    assert "classes" not in found
    assert "logits of one class alone" in refusal(predict(tmp_path / "bundle", photos / "a.png", "--top-k", 1))


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
        (("",), 2, "Invalid value for 'IMAGE...': The path is empty."),
        (("{photos}", "--labels", ""), 2, "Invalid value for '--labels': The path is empty."),
        (("{photos}", "--threads", "1025"), 2, "1025 is not in the range 1<=x<=1024."),
        (("{photos}", "--top-kk", "2"), 2, "Did you mean '--top-k'? See spach-predict --help."),
        (("{photos}/broken.png",), 2, "The image in"),
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


def test_json_has_names_as_they_are_and_text_has_them_escaped(tmp_path: Path) -> None:
    picture = tmp_path / "a\nb\x1b.png"
    Image.new("RGB", (40, 40)).save(picture)
    for given in (picture, tmp_path):
        line = predict(small_bundles.bundle(), given, "--json").stdout
        assert json.loads(line)["image"] == str(picture)
        assert line.isprintable() or line[:-1].isprintable()
        assert predict(small_bundles.bundle(), given).stdout.splitlines()[0] == rf"{tmp_path}/a\nb\x1b.png"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More pictures than are answered in the time of a test."""
    path = tmp_path_factory.mktemp("many") / "many.npz"
    np.savez(path, images=np.zeros((20_000, 32, 32, 3), np.uint8))
    return path


@pytest.mark.parametrize(
    ("into", "code", "written", "said"),
    [
        ("> /dev/full", 2, 0, "(No space left on device); 0 pictures were written."),
        (">&-", 2, 0, "(Bad file descriptor); 0 pictures were written."),
        ("| head -1", 0, 1, None),
    ],
)
def test_without_a_reader_or_space_for_the_answers_it_stops(
    into: str, code: int, written: int, said: str | None, many: Path, tmp_path: Path
) -> None:
    call = f"{console_script('spach-predict', tmp_path)} {small_bundles.bundle()} {many} --json"
    line = f"{call} {into}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert (done.returncode, len(done.stdout.splitlines())) == (code, written), done.stderr
    told = done.stderr.splitlines()
    assert not any("images/s" in line for line in told)  # it did not go on to the end
    assert [line.partition("cannot be written ")[2] for line in told if "written" in line] == (
        [] if said is None else [f"{said} Send it to where there is space."]
    )


def test_a_bundle_that_was_changed_is_exit_code_1(photos: Path, tmp_path: Path) -> None:
    bundle = small_bundles.copy(small_bundles.bundle(), tmp_path / "bundle")
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert "model.onnx was changed" in refusal(predict(bundle, photos), 1)
    assert "so it is no bundle" in refusal(predict(photos, photos), 2)


def test_ctrl_c_says_how_many_were_answered(many: Path, tmp_path: Path) -> None:
    script = console_script("spach-predict", tmp_path)
    call = [str(script), str(small_bundles.bundle()), str(many), "--json"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["image"].endswith("many.npz/image 0")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"Interrupted\. \d+ pictures were answered\.", said.splitlines()[-1])
    assert "Traceback" not in said


def test_a_graph_that_onnx_runtime_has_no_kernels_for_names_the_runtime_that_has(photos: Path, tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "b", Tiny(engine="none", precision=Precision.BF16))
    done = predict(bundle, photos, "--runtime", "onnxruntime")
    assert done.exit_code == 3
    assert "Run it with --runtime openvino, or leave --runtime out to take what runs it." in done.stderr
    assert "NOT_IMPLEMENTED" not in done.stderr

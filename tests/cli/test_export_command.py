"""spach-export and everything it refuses: one sentence, an exit code, and nothing touched."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.models.registry import create_model
from tests.bundle.test_bundle import write
from tests.commands import ROOT, console_script, contents, export, refusal

CHEAP = ("--model", "conv_xxs", "--image-size", "32")
RTX = ("--engine", "tensorrt-rtx")

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test stands in a directory of its own, which holds a bundle called `old`."""
    write(tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments: object, code: int = 2) -> str:
    """Refused in one sentence, before any export work, with every file left alone; the sentence."""
    before = contents(Path.cwd())
    result = export(*arguments, "-v", "-o", "old", "--overwrite")
    sentence = refusal(result, code)
    assert contents(Path.cwd()) == before
    assert "rewrite the model" not in result.stderr  # the first phase of work
    return sentence


# What is refused before torch is loaded

EARLY: list[tuple[tuple[str, ...], int, str, str]] = [
    (("--model", "ms_hybird_s"), 2, "no model 'ms_hybird_s'", "Near it: ms_hybrid_s"),
    (("--model", "MS-Hybrid-S"), 2, "no model 'MS-Hybrid-S'", "It is spelled ms_hybrid_s."),
    (("--model", "resnet50"), 2, "no model 'resnet50'", "--list shows all"),
    (("--fp16",), 2, "No model was named", "--model NAME, --checkpoint FILE"),
    (("--model", "conv_xxs", "--weights", "ema"), 2, "--weights ema", "Give --checkpoint FILE"),
    (("--model", "conv_xxs", "--image-size", "31"), 2, "31 is too small", "Take 32 or more"),
    (("--model", "ms_mlp_xxs", "--image-size", "32"), 2, "a grid of 2 by 2 tokens", "Take 64 or more"),
    (("--model", "conv_xxs", "--image-size", "0"), 2, "'--image-size': 0", "See spach-export --help"),
    (("--model", "conv_xxs", "--image-size", "3200000"), 2, "'--image-size': 3200000", "See spach-export --help"),
    ((*CHEAP, "--num-classes", "9" * 20), 2, "not in the range 0<=x<=1000000", "See spach-export --help"),
    ((*CHEAP, "--mean", "123.675,116.28,103.53"), 2, "--mean 123.675 is not in 0..1", "Divide values of 0 to 255"),
    ((*CHEAP, "--std", "1,inf,1"), 2, "--std inf is not in (0, 1]", "Divide values of 0 to 255"),
    ((*CHEAP, "--std", "0"), 2, "--std 0 is not in (0, 1]", "Divide values of 0 to 255"),
    ((*CHEAP, "--fp16", "--bf16"), 2, "--fp16 and --bf16 exclude each other", "Give one of them"),
    ((*CHEAP, "--bf16", "--fp32", "--fp16"), 2, "--bf16 and --fp32 and --fp16 exclude", "Give one of them"),
    ((*CHEAP, "--batch", "0"), 2, "0:0:0 is not 1 <= MIN", "Give --batch 1:8:32, or one number"),
    ((*CHEAP, "--batch", "8:4:2"), 2, "8:4:2 is not 1 <= MIN", "Give --batch 1:8:32, or one number"),
    ((*CHEAP, "--batch", "a:b"), 2, "'a:b' is not a batch profile", "Give --batch 1:8:32, or one number"),
    ((*CHEAP, "--batch", "-1"), 2, "'-1' is not a batch profile", "Give --batch 1:8:32, or one number"),
    ((*CHEAP, "--gpu", "sm33"), 2, "sm33 is not a compute capability", "Take one of sm75, sm80"),
    ((*CHEAP, "--gpu", "rtx9090"), 2, "'rtx9090' is no GPU known here", "Near it: rtx5090"),
    ((*CHEAP, "--gpu", ","), 2, "names no GPU", "Give --gpu sm86,sm89"),
    ((*CHEAP, "--top-k", "0"), 2, "'--top-k': 0", "See spach-export --help"),
    ((*CHEAP, "--workspace", "plenty"), 2, "'plenty' is not a size", "Give 512M, 2G"),
    ((*CHEAP, "--workspace", "0"), 2, "'0' is not a size", "Give 512M, 2G"),
    ((*CHEAP, "--workspace", "99999999999999G"), 2, "is not a size", "Give 512M, 2G"),
    ((*CHEAP, "--engine", "none", "--gpu", "sm89"), 2, "builds no engine, so --gpu can", "Leave that out"),
    ((*CHEAP, "--engine", "none", "--opt-level", "0"), 2, "so --opt-level can", "Leave that out"),
    ((*CHEAP, "--engine", "cuda"), 2, "'cuda' is not one of", "See spach-export --help"),
    ((*CHEAP, "--no-such-option"), 2, "No such option '--no-such-option'", "See spach-export --help"),
    ((*CHEAP, "stray"), 2, "unexpected extra argument (stray)", "See spach-export --help"),
]

EARLY_RTX: list[tuple[tuple[str, ...], int, str, str]] = [
    ((*CHEAP, "--gpu", "sm90"), 3, "does not compile for sm90", "Take --engine tensorrt"),
    ((*CHEAP, "--gpu", "h100,sm89"), 3, "does not compile for sm90", "Take --engine tensorrt"),
    ((*CHEAP, "--fp16", "--gpu", "sm75,sm89"), 2, "every newer GPU runs Turing's", "Export twice"),
    ((*CHEAP, "--bf16", "--gpu", "sm75"), 2, "--bf16 cannot be built for sm75", "Take --fp16"),
    ((*CHEAP, "--timing-cache", "cache"), 2, "--timing-cache does nothing", "Leave it out"),
    ((*CHEAP, "--hardware-compatible"), 2, "--hardware-compatible is not for", "Leave it out"),
    ((*CHEAP, "--workspace", "1K"), 2, "--workspace of 1024 bytes is too small", "Leave it out, or give"),
]


def words(case: tuple[Any, ...]) -> str:
    return " ".join(case[0])


@pytest.mark.parametrize("case", EARLY, ids=words)
def test_a_wrong_option_is_refused_with_the_next_step(case: tuple[tuple[str, ...], int, str, str]) -> None:
    arguments, code, reason, step = case
    sentence = refused(*arguments, code=code)
    assert reason in sentence
    assert step in sentence


@needs_rtx
@pytest.mark.parametrize("case", EARLY_RTX, ids=words)
def test_what_tensorrt_for_rtx_cannot_honour_is_refused(case: tuple[tuple[str, ...], int, str, str]) -> None:
    arguments, code, reason, step = case
    sentence = refused(*arguments, *RTX, code=code)
    assert reason in sentence
    assert step in sentence


ALL_AT_ONCE = """
import contextlib, io, json, sys
from spach_deploy.cli.export import main

for arguments, code in json.loads(sys.argv[1]):
    sys.argv = ["spach-export", *arguments, "-o", "old", "--overwrite"]
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            assert end.code == code, arguments
print(json.dumps([name for name in ("torch", "numpy", "onnx", "rich") if name in sys.modules]))
"""


def test_wrong_options_are_answered_before_torch_is_loaded() -> None:
    cases = [(arguments, code) for arguments, code, *_ in EARLY]
    if importlib.util.find_spec("tensorrt_rtx"):
        cases += [((*arguments, *RTX), code) for arguments, code, *_ in EARLY_RTX]
    call = [sys.executable, "-c", ALL_AT_ONCE, json.dumps(cases)]
    done = subprocess.run(call, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_an_absent_tensorrt_is_exit_3_with_how_to_install_it() -> None:
    sentence = refused(*CHEAP, "--engine", "tensorrt", code=3)
    assert "tensorrt, which is not installed here" in sentence
    assert "pip install 'spach-deploy[gpu]'" in sentence


@pytest.mark.parametrize(
    ("absent", "reason", "step"),
    [
        (("tensorrt", "tensorrt_rtx"), "No engine can be built here.", "take --engine none"),
        (("onnxruntime",), "needs onnxruntime, which is not installed", "pip install 'spach-deploy[cpu]'"),
    ],
)
def test_absent_packages_are_exit_3(
    absent: tuple[str, ...], reason: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)  # how Python itself marks a module as not to be found
    sentence = refused(*CHEAP, code=3)
    assert reason in sentence
    assert step in sentence


# Where it should go


def test_a_taken_name_is_refused_without_overwrite(here: Path) -> None:
    before = contents(here)
    assert "holds a bundle already. Give --overwrite" in refusal(export(*CHEAP, "-o", "old"))
    assert contents(here) == before
    write(here / "build" / "conv_xxs-fp16")
    assert "build/conv_xxs-fp16 holds a bundle already" in refusal(export("--model", "conv_xxs", "--fp16"))


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("note.txt", "exists and is not a directory"),
        ("note.txt/bundle", "note.txt is not a directory"),
        ("photos", "holds something else than a bundle"),
        (".", "is the directory you are in"),
        ("/proc", "is a mount point"),
        ("/proc/bundle", "/proc is not writable"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_at_once(output: str, reason: str, here: Path) -> None:
    (here / "note.txt").write_text("text")
    (here / "photos").mkdir()
    (here / "photos" / "cat.jpg").write_bytes(b"cat")
    before = contents(here)
    result = export(*CHEAP, "-v", "-o", output, "--overwrite")
    sentence = refusal(result)
    assert reason in sentence
    assert "--output" in sentence
    assert result.stderr == f"{sentence}\n"
    assert contents(here) == before


@pytest.mark.parametrize("manifest", ['{"name": "My app", "icons": []}', "[]", "{", '{"kind": "cpp-library"}'])
def test_another_programs_manifest_makes_no_bundle_of_a_folder(manifest: str, here: Path) -> None:
    (here / "app").mkdir()
    (here / "app" / "manifest.json").write_text(manifest)
    before = contents(here)
    assert "holds something else than a bundle, which is left alone" in refusal(
        export(*CHEAP, "-o", "app", "--overwrite")
    )
    assert contents(here) == before


def test_a_read_only_directory_is_refused_where_it_binds(here: Path) -> None:
    """Root writes into it all the same; then there is nothing to refuse."""
    (here / "locked").mkdir(mode=0o500)
    if os.access(here / "locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "is not writable" in refusal(export(*CHEAP, "-o", "locked/bundle"))


# Checkpoints


class Malicious:
    """Creates the file PWNED when it is unpickled by anything that does what a pickle asks for."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch PWNED",)


def tensors(name: str = "conv_xxs", classes: int = 1000) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        state = create_model(name, image_size=64, num_classes=classes).state_dict()
    return {key: torch.full(tensor.shape, 0.5) for key, tensor in state.items()}


def truncated(path: Path) -> None:
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes()[:100_000])


def truncated_safetensors(path: Path) -> None:
    safetensors.torch.save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[:100_000])


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (Path.touch, "is empty. Copy or download it again."),
    "random": (
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
        "not a PyTorch or safetensors file",
    ),
    "truncated": (truncated, "is cut short or damaged"),
    "truncated safetensors": (truncated_safetensors, "is cut short or damaged"),
    "malicious pickle": (lambda path: path.write_bytes(pickle.dumps(Malicious(), 2)), "asks for posix.system"),
    "malicious": (lambda path: torch.save({"model": Malicious()}, path), "asks for posix.system"),
    "malicious beside weights": (
        lambda path: torch.save({"model": tensors(), "args": Malicious()}, path),
        "asks for posix.system, and only tensors and plain data are read, so that no code runs",
    ),
    "foreign": (lambda path: torch.save({"conv1.weight": torch.ones(64, 3, 7, 7)}, path), "not those of a SPACH model"),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), "holds no tensors"),
    "zip": (lambda path: zipfile.ZipFile(path, "w").close(), "not a PyTorch or safetensors file"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "is a web page"),
    "text": (lambda path: path.write_text("weights go here"), "not a PyTorch or safetensors file"),
    "directory": (Path.mkdir, "is a directory"),
    "missing": (lambda path: None, "There is no checkpoint"),
    "NaN": (
        lambda path: torch.save(tensors() | {"head.bias": torch.full((1000,), torch.nan)}, path),
        "NaN or infinite",
    ),
    "one tensor short": (
        lambda path: torch.save({k: v for k, v in tensors().items() if k != "head.bias"}, path),
        "nearest is conv_xxs: 1 missing (head.bias)",
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_is_none_is_refused_and_runs_nothing(kind: str, here: Path) -> None:
    make, reason = CHECKPOINTS[kind]
    make(here / "weights.pth")
    assert reason in refused("--checkpoint", "weights.pth")
    assert not (here / "PWNED").exists()


def test_the_malicious_pickle_is_one(here: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(), 2))
    assert (here / "PWNED").exists()


def test_a_checkpoint_of_another_model_is_refused_with_its_name(here: Path) -> None:
    torch.save({"model": tensors("ms_conv_xxs")}, here / "weights.pth")
    assert "It fits ms_conv_xxs: give --model ms_conv_xxs." in refused("--checkpoint", "weights.pth", *CHEAP)


def test_a_checkpoint_of_other_classes_is_refused(here: Path) -> None:
    torch.save(tensors(classes=10), here / "weights.pth")
    assert "head has 10 classes, but 1000" in refused("--checkpoint", "weights.pth", *CHEAP, "--num-classes", 1000)
    assert "--top-k 11 of 10 classes does not exist" in refused("--checkpoint", "weights.pth", "--top-k", 11)


# Images


def folder_of(name: str, content: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / name).write_bytes(content)

    return make


def tar_of_notes(path: Path) -> None:
    (path.parent / "note.txt").write_text("text")
    with tarfile.open(path, "w") as tar:
        tar.add(path.parent / "note.txt", "note.txt")


def floats(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, images=np.full((2, 8, 8, 3), 7, np.float32))


def whole_numbers(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, images=np.zeros((2, 8, 8, 3), np.int64))


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "There is no photos."),
    "empty folder": (Path.mkdir, "Folder photos holds no picture (0 other files)"),
    "folder of text": (folder_of("note.txt", b"text"), "Folder photos holds no picture (1 other files)"),
    "unreadable pictures": (folder_of("a.jpg", b"no picture"), "The image in folder photos cannot be used"),
    "empty file": (Path.touch, "photos is empty"),
    "random file": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "photos cannot be used"),
    "tar without pictures": (tar_of_notes, "Tar photos holds no picture"),
    "npz of floats": (floats, "image 0 does not fit. Its pixels are floats from 7 to 7; floats are expected in 0..1."),
    "npz of whole numbers": (whole_numbers, "images must be uint8 (N, H, W, C)"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_that_are_none_are_refused(kind: str, here: Path) -> None:
    make, reason = IMAGES[kind]
    make(here / "photos")
    assert reason in refused(*CHEAP, "--images", "photos")


def test_a_folder_that_may_not_be_read_is_refused(here: Path) -> None:
    (here / "photos").mkdir(mode=0o000)
    if os.access(here / "photos", os.R_OK):
        pytest.skip("this user may read everything")
    assert "cannot be read" in refused(*CHEAP, "--images", "photos")


# What only the model or the graph can tell


def test_an_unknown_rewrite_is_refused_with_the_known_ones() -> None:
    sentence = refused(*CHEAP, "--no-rewrite", "fold_everything")
    assert "no rewrite 'fold_everything'" in sentence
    assert "fold_layer_scale" in sentence
    assert "shift_depthwise" in sentence


def test_more_best_classes_than_there_are_is_refused() -> None:
    assert "--top-k 1001 of 1000 classes does not exist. Give a number from 1 to 1000." in refused(
        *CHEAP, "--top-k", 1001
    )


# The command itself


def test_the_console_script_answers_like_the_command(here: Path) -> None:
    script = console_script("spach-export", here)
    before = contents(here)
    done = subprocess.run([script, "--model", "ms_hybird_s"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: There is no model 'ms_hybird_s'. Near it: ms_hybrid_s")
    assert done.stderr.count("\n") == 1
    assert contents(here) == before


def test_debug_shows_where_a_refusal_comes_from() -> None:
    result = export(*CHEAP, "--batch", "0", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: Batch profile")


def test_the_list_shows_all_models() -> None:
    lines = export("--list").stdout.splitlines()
    names = [line.split()[0] for line in lines[1 : lines.index("")]]
    assert names == list(ARCHITECTURES)
    assert len(names) == 36
    listed = json.loads(export("--list", "--json").stdout)
    assert [model["name"] for model in listed] == names
    assert {"parameters", "macs", "stages", "published_top1"} <= set(listed[0])


def test_the_rewrites_are_listed() -> None:
    text = export("--list-rewrites").stdout
    assert "fold_layer_scale" in text
    assert "shift_depthwise" in text


def test_a_reader_that_goes_away_is_no_error(here: Path) -> None:
    script = console_script("spach-export", here)
    done = subprocess.run(
        f"{script} --list | head -n 1; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""

"""Names that are not UTF-8, as old archives and network drives have them, work everywhere and are shown escaped."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, GRAPH, MANIFEST, PAGE, REPORT
from spach_deploy.cli.doctor import main as doctor
from spach_deploy.cli.export import main as export
from spach_deploy.cli.package import main as package
from spach_deploy.cli.predict import main as predict
from spach_deploy.cli.validate import main as validate
from spach_deploy.common.files import sha256_of
from spach_deploy.models import published as configs
from spach_deploy.models.checkpoint_file import read_checkpoint
from spach_deploy.options.command_line import joined
from spach_deploy.pipeline.cache import content_digest
from spach_deploy.report.content import command as broken_command
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from tests import small_bundles, static_models

pytestmark = pytest.mark.skipif(
    sys.getfilesystemencoding() != "utf-8", reason="names are in another encoding here: LC_ALL=C.UTF-8 scripts/test"
)

NAME = "small_conv"
CAF = os.fsdecode(b"caf\xe9")


def run(command: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The smallest model has a name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.ARCHITECTURES, NAME, static_models.ARCHITECTURES["conv"])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, pictures in a tar, and the bundle that was exported from them."""
    folder = tmp_path_factory.mktemp("names") / CAF
    folder.mkdir()
    model = static_models.small_model("conv")
    with (folder / f"{CAF}.pth").open("wb") as file:
        torch.save(model.state_dict(), file)
    with tarfile.open(folder / f"{CAF}.tar", "w") as tar:
        for index in range(8):
            tar.addfile(*_member(f"{CAF}/{index}.png", index))
    options = f"--model {NAME} --image-size {static_models.IMAGE_SIZE} --fp32 --engine none".split()
    files = ("--checkpoint", folder / f"{CAF}.pth", "--images", folder / f"{CAF}.tar", "-o", folder / "bundle")
    done = run(export, *options, *files)
    assert done.exit_code == 0, done.output
    assert rf"{folder.parent.name}/caf\xe9/bundle" in done.stdout
    return folder


def _member(name: str, seed: int) -> tuple[tarfile.TarInfo, io.BytesIO]:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    member = tarfile.TarInfo(name)
    member.size = content.tell()
    content.seek(0)
    return member, content


def test_files_of_a_bundle_show_them_escaped(folder: Path) -> None:
    for name in (MANIFEST, REPORT, PAGE):
        text = (folder / "bundle" / name).read_text(encoding="utf-8")
        assert r"\xe9" in text
        assert r"\udce9" not in text
        assert "\udce9" not in text


def shell_words(line: str) -> list[str]:
    """What bash makes of a command's words."""
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    return [os.fsdecode(word) for word in printed.split(b"\0")[:-1]]


def test_commands_to_copy_have_the_very_names(folder: Path) -> None:
    manifest = json.loads((folder / "bundle" / MANIFEST).read_text())
    words = shell_words(manifest["command"])
    assert words[words.index("--checkpoint") + 1] == str(folder / f"{CAF}.pth")
    assert words[words.index("--images") + 1] == str(folder / f"{CAF}.tar")
    report = json.loads((folder / "bundle" / REPORT).read_text())
    assert shell_words(report["run"]["command"]) == ["spach-validate", str(folder / "bundle")]
    shown = run(doctor, folder / "bundle").stdout
    commands = [shell_words(line.strip()[2:]) for line in shown.splitlines() if line.strip().startswith("$ spach-")]
    assert ["spach-validate", str(folder / "bundle")] in commands
    assert any(str(folder / f"{CAF}.pth") in words for words in commands)


@pytest.mark.parametrize("words", [["a", "b c", CAF, "it's", "a\\'\x1b[2J\n\u202e", "caf\xe9", f"{CAF}1 '\\"]])
def test_any_word_is_quoted_for_a_shell_and_a_page(words: list[str]) -> None:
    line = joined(words)
    assert line.isprintable()
    assert shell_words(line) == words
    assert shell_words(broken_command(f"spach-export --images {line} --model x").replace("\\\n", "")) == [
        "spach-export",
        "--images",
        *words,
        "--model",
        "x",
    ]


def test_other_commands_read_and_write_them(folder: Path, tmp_path: Path) -> None:
    for arguments in (
        (validate, folder / "bundle", "--json", "--checkpoint", folder / f"{CAF}.pth"),
        (validate, folder / "bundle" / GRAPH, "--report", folder / f"{CAF}.json"),
        (predict, folder / "bundle", folder / f"{CAF}.tar"),
        (package, "polygraphy", folder / "bundle", "-o", tmp_path / CAF),
        (package, "triton", folder / "bundle", "-o", tmp_path / f"{CAF}2", "--json"),
        (package, "triton", "--check", tmp_path / f"{CAF}2"),
        (package, "kubernetes", folder / "bundle", "-o", tmp_path / f"{CAF}3", "--json"),
    ):
        done = run(*arguments)
        assert done.exit_code == 0, done.output
        assert "\udce9" not in done.output
        if "--json" in arguments:
            json.loads(done.stdout)
            assert "\\udce9" not in done.stdout
    assert r"\xe9" in (folder / f"{CAF}.html").read_text(encoding="utf-8")


def test_a_refusal_shows_it_escaped(folder: Path) -> None:
    done = run(validate, folder / f"{CAF}.nothing")
    assert done.exit_code == 2
    assert rf"{folder.parent}/caf\xe9/caf\xe9.nothing does not exist." in done.stderr


def test_safetensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / f"{CAF}.safetensors"
    save_file({"x": torch.ones(2)}, tmp_path / "x")
    (tmp_path / "x").rename(path)
    assert torch.equal(read_checkpoint(path)[0]["x"], torch.ones(2))


def test_a_graph_whose_own_name_is_not_utf8_runs(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{CAF}.onnx"
    shutil.copy(folder / "bundle" / GRAPH, path)
    with OnnxRuntimeRunner(path) as runner:
        assert runner.input_specs


def test_folders_with_them_are_hashed(tmp_path: Path) -> None:
    (tmp_path / CAF).write_bytes(b"x")
    first = content_digest(tmp_path)
    (tmp_path / CAF).rename(tmp_path / os.fsdecode(b"caf\xe8"))
    assert content_digest(tmp_path) != first


EVIL = "\x1b[2J\x9b31mred\x7f\r[/bold]\udce9"


def test_nothing_that_a_bundle_says_speaks_to_a_terminal(folder: Path, tmp_path: Path) -> None:
    evil = small_bundles.copy(folder / "bundle", tmp_path / "evil")
    with np.load(evil / GOLDEN) as golden:
        arrays = {**golden, "names": np.array([EVIL] * len(golden["names"]))}
    np.savez(evil / GOLDEN, **arrays)
    manifest = small_bundles.read_manifest(evil)
    manifest["model"]["name"] = manifest["precision"]["summary"] = manifest["validation"]["images"] = EVIL
    manifest["engine"]["reason"] = manifest["tools"]["torch"] = EVIL
    manifest["files"][GOLDEN] = {"sha256": sha256_of(evil / GOLDEN), "bytes": 1}
    small_bundles.write_manifest(evil, manifest)
    for arguments in (
        (validate, evil),
        (validate, evil, "--json"),
        (validate, evil, evil),
        (predict, evil, folder / f"{CAF}.tar", "--json"),
        (predict, evil, folder / f"{CAF}.tar", "--runtime", "engine"),
        (doctor, evil),
        (doctor, evil, "--json"),
        (package, "polygraphy", evil, "-o", tmp_path / "p"),
        (package, "kubernetes", evil, "-o", tmp_path / "k"),
    ):
        done = run(*arguments)
        assert done.exit_code in (0, 3), done.output
        assert done.output.replace("\n", "").isprintable()
    assert all(name.isprintable() for name in Golden.load(evil / GOLDEN).names)
    assert all(line.isprintable() for line in (evil / PAGE).read_text(encoding="utf-8").split("\n"))
    assert r"\x1b[2J" in (evil / PAGE).read_text(encoding="utf-8")

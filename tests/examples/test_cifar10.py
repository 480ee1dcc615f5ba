"""The story of examples/cifar10, command by command as its page shows it, and its training, on pictures made here.

No engine is built: the graph has the evidence, and building one is tested elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.photographs import calibration_photographs, held_out_photographs
from examples.cifar10 import train
from spach_deploy.common.machine import torch_threads
from spach_deploy.models import load_model
from spach_deploy.options.specs import ModelSpec
from tests.docs.pages import commands, forms, is_within
from tests.docs.test_docs import Shell

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

EXAMPLE = Path(train.__file__).parent
CLASSES = (EXAMPLE / "classes.txt").read_text().split()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page begins with: the example, and pictures in the place of CIFAR-10's."""
    for part, pictures in (("train", calibration_photographs(70)), ("test", held_out_photographs(20))):
        for number, picture in enumerate(pictures):
            path = tmp_path / "cifar10" / part / CLASSES[number % 10] / f"{number // 10:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).resize((32, 32)).save(path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "cifar10").symlink_to(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda page: True)
    return tmp_path


def is_shown(line: str) -> bool:
    """Whether a line that the page shows comes without an engine too, wherever its paragraph was broken."""
    return not line.startswith((" ", "engine", "here", "The engine", "The graph"))


def test_the_story_works_as_it_is_written(here: Path) -> None:
    shell, story = Shell(), list(commands(EXAMPLE / "README.md"))
    assert sum(shown.command.startswith("spach-") for shown in story) == 8
    for shown in story:
        without_engine = " --engine none" if shown.command.startswith("spach-export") else ""
        printed = shell.run(shown.command + without_engine)
        assert shell.code == 0, (shown.command, printed[-12:])
        wanted = forms([line for line in shown.output or () if is_shown(line)])
        assert is_within(wanted, forms(printed)), (shown.command, wanted, forms(printed))


def small_pictures() -> train.Pictures:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (24, 32, 32, 3), np.uint8)
    return train.Pictures(torch.from_numpy(pixels), torch.arange(24) % 10)


def trained(epochs: int, state: Path | None = None) -> train.Training:
    training = train.Training(train.Recipe(epochs=2, batch=8), small_pictures())
    if state is not None:
        training.resume(state)
    for _ in range(epochs):
        training.epoch()
    return training


def test_a_training_that_was_ended_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        whole = trained(2)
        trained(1).save(tmp_path / "model.state")
        resumed = trained(1, tmp_path / "model.state")
    assert resumed.progress == whole.progress == 1
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_what_a_training_writes_is_found_out_without_options(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train.py", "cifar10", "-o", "mine.pth", "--epochs", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        train.main()
    loaded = load_model(ModelSpec(checkpoint=Path("mine.pth")))
    assert loaded.architecture == train.ARCHITECTURE
    assert loaded.preprocessing == train.PREPROCESSING


def test_the_checkpoint_is_small_and_of_the_architecture_that_the_script_trains() -> None:
    path = EXAMPLE / "model.pth"
    assert path.stat().st_size <= 6_000_000
    assert {value.dtype for value in torch.load(path)["model"].values()} <= {torch.float16, torch.int64}
    train.read_checkpoint(path)

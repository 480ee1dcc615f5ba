"""--answers: what the user's own code computed decides what tensors do not show."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from spach_deploy.bundle.store import MANIFEST
from spach_deploy.cli.validate import main as validate
from spach_deploy.common.errors import MismatchError, UsageError
from spach_deploy.models import LoadedModel, load_model
from spach_deploy.models import published as configs
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.hyperparameters import Source, values_of
from spach_deploy.models.registry import create_model
from spach_deploy.models.spach import Spach
from spach_deploy.options.specs import Hyperparameters, ModelSpec
from spach_deploy.validation import user_answers as answers_file
from spach_deploy.validation.user_answers import hold_to_answers, read_answers
from tests import static_models
from tests.blocks.test_families import FAMILIES
from tests.commands import export, refusal

NAME, SIZE, CLASSES = "small_trans", static_models.IMAGE_SIZE, static_models.CLASSES
ARCHITECTURE = static_models.ARCHITECTURES["trans"]
MODEL = ("--model", NAME, "--image-size", SIZE, "--engine", "none")


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """The registry knows a small model with attention in every block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.ARCHITECTURES, NAME, ARCHITECTURE)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's weights alone."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(static_models.small_model("trans").state_dict(), path)
    return path


def answers_of(folder: Path, images: int = 3, **changed: Any) -> Path:
    """What code that has the small model with some values changed answers."""
    model = Spach(ARCHITECTURE.replace(image_size=SIZE, classes=CLASSES, **changed)).eval()
    model.load_state_dict(static_models.small_model("trans").state_dict())
    inputs = torch.randn(images, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = model(inputs)
    path = folder / "answers.npz"
    np.savez(path, input=inputs.numpy(), logits=logits.numpy())
    return path


def test_an_embedding_decides_as_logits_do(weights: Path, tmp_path: Path) -> None:
    model = Spach(ARCHITECTURE.replace(image_size=SIZE, classes=0, heads=4)).eval()
    model.load_state_dict(static_models.small_model("trans").state_dict(), strict=False)
    inputs = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        np.savez(tmp_path / "answers.npz", input=inputs.numpy(), embedding=model(inputs).numpy())
    own = loaded(weights)
    found, agreement = hold_to_answers(own, read_answers(tmp_path / "answers.npz"), lambda text: None)
    assert agreement.agrees
    assert values_of(found.settings).heads == 4
    assert [tensor.name for tensor in (*own.model.outputs, *found.model.outputs)] == ["logits", "logits"]


def loaded(weights: Path, **said: Any) -> LoadedModel:
    spec = ModelSpec(NAME, weights, image_size=SIZE, hyperparameters=Hyperparameters(**said))
    return load_model(spec)


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "heads": ({"heads": 4}, {"heads": 4}),
    "the tanh form of GELU": ({"activation": "gelu-tanh"}, {"activation": "gelu-tanh"}),
    "ReLU": ({"activation": "relu"}, {"activation": "relu"}),
    "SiLU": ({"activation": "silu"}, {"activation": "silu"}),
    "epsilon": ({"norm_eps": 1e-5}, {"norm_eps": 1e-5}),
    "no qk scale": ({"qk_scale": 1.0}, {"qk_scale": 1.0}),
    "any qk scale": ({"qk_scale": 0.05}, {"qk_scale": 0.05}),
    "heads and epsilon": ({"heads": 4, "norm_eps": 1e-5}, {"heads": 4, "norm_eps": 1e-5}),
    "any qk scale with other heads, activation and epsilon": (
        {"heads": 4, "qk_scale": 0.37, "activation": "relu", "norm_eps": 1e-3},
        {"heads": 4, "qk_scale": 0.37, "activation": "relu", "norm_eps": 1e-3},
    ),
    "any qk scale and any epsilon": ({"qk_scale": 0.21, "norm_eps": 0.004}, {"qk_scale": 0.21, "norm_eps": 0.004}),
    "two at once": ({"heads": 4, "activation": "relu"}, {"heads": 4, "activation": "relu"}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_values_that_were_assumed_are_found(tmp_path: Path, weights: Path, case: str) -> None:
    changed, expected = OTHERS[case]
    said: list[str] = []
    model, agreement = hold_to_answers(loaded(weights), read_answers(answers_of(tmp_path, **changed)), said.append)
    found = {setting.name: setting.value for setting in model.settings if setting.source is Source.ANSWERS}
    assert found == expected
    assert agreement.rel_l2 <= agreement.allowed < 1e-5
    assert "was assumed" in said[-1]


def test_answers_that_agree_change_nothing(tmp_path: Path, weights: Path) -> None:
    assumed = loaded(weights)
    said: list[str] = []
    model, agreement = hold_to_answers(assumed, read_answers(answers_of(tmp_path)), said.append)
    assert model.model is assumed.model
    assert {s.source for s in model.settings if s.name not in ("mean", "std")} == {Source.CONFIRMED}
    assert not said
    assert agreement.images == 3
    assert agreement.rel_l2 <= agreement.allowed == 4 * agreement.noise


def test_a_value_that_somebody_said_is_not_replaced_but_the_right_one_is_named(tmp_path: Path, weights: Path) -> None:
    given = read_answers(answers_of(tmp_path, heads=4))
    with pytest.raises(MismatchError) as caught:
        hold_to_answers(loaded(weights, heads=8), given, lambda text: None)
    assert "With 4 heads instead of 8 heads (as asked for) it does" in caught.value.message
    assert "--heads 4" in caught.value.hint


def test_other_weights_agree_with_nothing(tmp_path: Path, weights: Path) -> None:
    path = answers_of(tmp_path)
    with np.load(path) as arrays:
        np.savez(path, input=arrays["input"], logits=arrays["logits"] * 1.001)
    with pytest.raises(MismatchError, match=r"no (other )?heads, qk scale, activation or epsilon") as caught:
        hold_to_answers(loaded(weights), read_answers(path), lambda text: None)
    assert len(re.findall(r"\d\.\de-\d\d", caught.value.message)) == 2  # how far the nearest is, and what is allowed


@pytest.mark.parametrize("changed", [{"divisions": 8}, {"divisions": 6, "activation": "relu"}])
def test_the_divisions_of_a_shiftvit_are_found(tmp_path: Path, changed: dict[str, Any]) -> None:
    architecture = FAMILIES["shiftvit"]
    model = create_model(architecture.replace(**changed)).eval()
    load_demo_weights(model)
    inputs = torch.randn(2, 3, *architecture.image_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        np.savez(tmp_path / "answers.npz", input=inputs.numpy(), logits=model(inputs).numpy())
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assumed = load_model(ModelSpec(None, tmp_path / "weights.pth", image_size=architecture.image_size))
    found, agreement = hold_to_answers(assumed, read_answers(tmp_path / "answers.npz"), lambda text: None)
    assert agreement.agrees
    assert {setting.name: setting.value for setting in found.settings if setting.source is Source.ANSWERS} == changed
    assert found.architecture is not None
    assert found.architecture.divisions == changed["divisions"]


SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "no logits": (
        {"input": np.ones((1, 3, 32, 32), "f4"), "output": np.ones((1, 11), "f4")},
        "it has no array 'logits'",
    ),
    "half": ({"input": np.ones((1, 3, 32, 32), "f4"), "logits": np.ones((1, 11), "f2")}, "logits is float16"),
    "pixels": (
        {"input": np.ones((1, 32, 32, 3), "u1"), "logits": np.ones((1, 11), "f4")},
        "input is uint8, not float32.",
    ),
    "last": ({"input": np.ones((1, 32, 32, 3), "f4"), "logits": np.ones((1, 11), "f4")}, "channels last"),
    "one image": ({"input": np.ones((3, 32, 32), "f4"), "logits": np.ones((1, 11), "f4")}, "has shape (3, 32, 32)"),
    "numbers": ({"input": np.ones((2, 3, 32, 32), "f4"), "logits": np.ones((1, 11), "f4")}, "2 inputs and 1 answers"),
    "NaN": ({"input": np.ones((1, 3, 32, 32), "f4"), "logits": np.full((1, 11), np.nan, "f4")}, "not finite"),
    "softmax": ({"input": np.ones((1, 3, 32, 32), "f4"), "logits": np.full((1, 10), 0.1, "f4")}, "are probabilities"),
    "zeros": ({"input": np.ones((1, 3, 32, 32), "f4"), "logits": np.zeros((1, 11), "f4")}, "every answer is zero"),
    "objects": ({"input": np.array([None]), "logits": np.zeros((1, 11), "f4")}, "cannot be read"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_files_that_hold_no_answers_are_refused(tmp_path: Path, case: str) -> None:
    arrays, words = SPOILT[case]
    path = tmp_path / "answers.npz"
    np.savez(path, **arrays)
    with pytest.raises(UsageError) as caught:
        read_answers(path)
    assert words in caught.value.message
    assert ("16 bits" in caught.value.message) == (case == "half")
    assert "np.savez" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not quite", b"\x93NUMPY"])
def test_files_that_are_no_npz_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "answers.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read"):
        read_answers(path)


@pytest.mark.parametrize(
    ("inputs", "logits", "words"), [((1, 3, 16, 16), (1, 11), "16"), ((1, 3, 32, 32), (1, 7), "7")]
)
def test_answers_of_another_kind_of_model_are_refused(
    tmp_path: Path, weights: Path, inputs: tuple[int, ...], logits: tuple[int, ...], words: str
) -> None:
    path = tmp_path / "answers.npz"
    np.savez(path, input=np.ones(inputs, "f4"), logits=np.ones(logits, "f4"))
    with pytest.raises(UsageError, match=words):
        hold_to_answers(loaded(weights), read_answers(path), lambda text: None)


def test_answers_in_another_order_are_called_that(tmp_path: Path, weights: Path) -> None:
    path = answers_of(tmp_path)
    with np.load(path) as arrays:
        np.savez(path, input=arrays["input"], logits=arrays["logits"][::-1])
    with pytest.raises(UsageError, match="in another order than their inputs"):
        hold_to_answers(loaded(weights), read_answers(path), lambda text: None)


def test_a_search_ends_in_time_and_says_how_far_it_is(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = read_answers(answers_of(tmp_path, heads=4))
    said: list[str] = []
    monkeypatch.setattr(answers_file, "_SAY_EVERY_S", 0.0)
    hold_to_answers(loaded(weights), given, said.append)
    assert any("combinations tried, the nearest" in text for text in said)
    monkeypatch.setattr(answers_file, "SEARCH_SECONDS", 0.0)
    with pytest.raises(MismatchError):
        hold_to_answers(loaded(weights), given, said.append)


def test_answers_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    sentence = refusal(export(*MODEL, "--answers", answers_of(tmp_path), "-o", tmp_path / "bundle"))
    assert "demo weights are nobody's" in sentence


def test_an_export_says_what_the_answers_decided_and_later_commands_go_by_it(tmp_path: Path, weights: Path) -> None:
    given = answers_of(tmp_path, heads=4)
    done = export(*MODEL, "--checkpoint", weights, "--answers", given, "-o", tmp_path / "right")
    assert done.exit_code == 0, done.stderr
    assert "4 heads (your answers agree with no other)" in done.stdout
    assert "AGREED with PyTorch in FP32 and with your answers." in done.stdout
    assert "The reference agrees with your answers: 3 images of answers.npz" in done.stdout
    manifest = json.loads((tmp_path / "right" / MANIFEST).read_text())
    assert manifest["model"]["hyperparameters"]["heads"] == {"value": 4, "source": "answers"}
    assert manifest["validation"]["answers"]["images"] == 3
    page = (tmp_path / "right" / "report.html").read_text(encoding="utf-8")
    assert "Agrees with PyTorch in FP32 and with your answers" in page
    assert "The reference agrees with your answers" in page
    assert "4 heads (your answers agree with no other)" in page

    again = CliRunner().invoke(validate, [str(tmp_path / "right"), "--checkpoint", str(weights)])
    assert again.exit_code == 0, again.output
    assert "The reference agrees with your answers" in again.stdout


def test_validate_holds_a_bundle_to_answers(tmp_path: Path, weights: Path) -> None:
    done = export(*MODEL, "--checkpoint", weights, "-o", tmp_path / "bundle")
    assert done.exit_code == 0, done.stderr
    assert "assumed: as published, the file does not show it" in " ".join(done.stdout.split())
    assert "Not compared with answers of your own code" in done.stdout

    given = answers_of(tmp_path, heads=4)
    call = [str(tmp_path / "bundle"), "--answers", str(given)]
    assert "--checkpoint FILE" in CliRunner().invoke(validate, call).stderr
    wrong = CliRunner().invoke(validate, [*call, "--checkpoint", str(weights)])
    assert wrong.exit_code == 1
    assert "AGREED with PyTorch in FP32, but NOT WITH YOUR ANSWERS." in wrong.stdout
    assert "The reference does not agree with your answers" in " ".join(wrong.stdout.split())
    assert "instead of 2 heads (assumed:" in " ".join(wrong.stdout.split())
    assert "Export it again with --heads 4" in " ".join(wrong.stdout.split())

    answers_of(tmp_path)
    right = CliRunner().invoke(validate, [*call, "--checkpoint", str(weights)])
    assert right.exit_code == 0, right.output
    assert "The reference agrees with your answers" in right.stdout


def test_heads_that_do_not_divide_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    sentence = refusal(export(*MODEL, "--heads", "5", "-o", tmp_path / "x"))
    assert "5 heads do not divide the model's 16 channels" in sentence


def test_values_survive_a_rebuilt_model(weights: Path) -> None:
    said = Hyperparameters(heads=4, qk_scale=0.5, activation="silu", norm_eps=1e-3, mean=(0.5,) * 3, std=(0.5,) * 3)
    model = loaded(weights, **vars(said))
    assert values_of(model.settings) == said

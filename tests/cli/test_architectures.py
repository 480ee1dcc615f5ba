"""Architectures outside the table, through the commands: read from tensors or a file, and rebuilt from a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from spach_deploy.bundle.store import Bundle
from spach_deploy.cli.export import main as export_command
from spach_deploy.models import create_model, load_demo_weights
from spach_deploy.models.hyperparameters import Source
from spach_deploy.validation.live_reference import Weights, rebuild
from tests.models.golden_reference import golden_answers, golden_model_of, reference_batch
from tests.models.test_architecture import variant
from tests.static_models import ARCHITECTURES

BARE = ARCHITECTURES["bare"].replace(heads=4)


def export(*words: object) -> Result:
    return CliRunner().invoke(export_command, [*map(str, words), "--engine", "none"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a checkpoint, `run.pth`, and its bundle."""
    folder = tmp_path_factory.mktemp("architectures")
    model = create_model(BARE)
    load_demo_weights(model, seed=2)
    torch.save(model.state_dict(), folder / "run.pth")
    made = export(
        "--checkpoint", folder / "run.pth", "--image-size", 32, "--heads", 4, "--fp16", "-o", folder / "bundle"
    )
    assert made.exit_code == 0, made.output
    assert f"A {BARE.description}: inferred from the tensors' names and shapes." in made.stderr
    return folder


def test_the_bundle_holds_the_architecture(folder: Path) -> None:
    manifest = Bundle.open(folder / "bundle").manifest
    assert manifest.model.name == "spach"
    assert manifest.model.architecture is not None
    assert manifest.model.architecture.replace(mean=None, std=None) == BARE
    assert manifest.model.hyperparameters["heads"].source == Source.COMMAND_LINE.value
    assert "--model" not in manifest.command


def test_the_reference_is_rebuilt_without_a_name(folder: Path) -> None:
    manifest = Bundle.open(folder / "bundle").manifest
    section = manifest.model
    rebuilt = rebuild(section, Weights(folder / "run.pth"), manifest.outputs)
    assert rebuilt.architecture == section.architecture
    assert (rebuilt.name, rebuilt.weights_sha256) == ("spach", section.weights_sha256)


def test_a_checkpoint_agrees_with_what_the_published_code_answers(tmp_path: Path) -> None:
    """`benchmarks/variants.py` does it for all variants, in three precisions, with engines."""
    model = golden_model_of(variant("cifar hybrid"))
    torch.save(model.state_dict(), tmp_path / "run.pth")
    images, logits = reference_batch((2, 3, 32, 32))[:1], golden_answers("cifar hybrid")["logits"]
    np.savez(tmp_path / "answers.npz", input=images, logits=logits)
    words = ("--image-size", 32, "--heads", 3, "--fp16", "--answers", tmp_path / "answers.npz")
    made = export("--checkpoint", tmp_path / "run.pth", *words, "-o", tmp_path / "bundle")
    assert made.exit_code == 0, made.output
    agreement = Bundle.open(tmp_path / "bundle").manifest.validation.answers
    assert agreement is not None
    assert agreement.rel_l2 < 1e-6


def planned(*words: object) -> Result:
    return export(*words, "--dry-run")


def test_an_architecture_from_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text(BARE.to_toml())
    (tmp_path / "other.toml").write_text(BARE.replace(width=32).to_toml())
    made = planned("--arch", tmp_path / "model.toml", "--checkpoint", folder / "run.pth")
    assert made.exit_code == 0, made.output
    assert "4 heads" in made.output
    assert "assumed" not in made.output.replace("pixel", "")
    assert planned("--arch", tmp_path / "model.toml").exit_code == 0  # with demo weights
    other = planned("--arch", tmp_path / "other.toml", "--checkpoint", folder / "run.pth")
    assert other.exit_code == 2
    assert "stem.proj.weight is 16x3x4x4 instead of 32x3x4x4" in other.output


def test_what_contradicts_a_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text(BARE.to_toml())
    (tmp_path / "wrong.toml").write_text("widht = 3")
    cases = {
        ("--arch", tmp_path / "model.toml", "--model", "ms_conv_xxs"): "--model names an architecture, and --arch",
        ("--arch", tmp_path / "wrong.toml"): "unknown key 'widht'. Did you mean width?",
        ("--arch", tmp_path / "absent.toml"): "cannot be read",
        (
            "--arch",
            tmp_path / "model.toml",
            "--num-classes",
            3,
            "--checkpoint",
            folder / "run.pth",
        ): "Give --num-classes 11",
    }
    for words, sentence in cases.items():
        refused = planned(*words)
        assert refused.exit_code == 2, words
        assert sentence in " ".join(refused.output.split()), refused.output


def test_the_summary_says_the_architecture_where_there_is_no_name(folder: Path) -> None:
    model = Bundle.open(folder / "bundle").manifest.model
    assert model.title == BARE.description
    assert model.title == "spach 16 wide, patch 4, 1 conv, 1 trans | 2 trans"

"""spach-export --dry-run: the plan of work, what it takes, what is refused, and nothing done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spach_deploy.models.registry import create_model
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, ModelSpec, Precision, QuantizationSpec
from spach_deploy.pipeline.estimate import dry_run
from tests import small_bundles
from tests.commands import export


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*more: object) -> dict[str, object]:
    result = export("--model", "ms_hybrid_s", "--engine", "none", "--dry-run", "--json", *more)
    content: dict[str, object] = json.loads(result.stdout)
    assert content["exit_code"] == result.exit_code
    return content


def test_it_tells_the_stages_and_does_nothing(tmp_path: Path) -> None:
    result = export("--model", "ms_hybrid_s", "--fp16", "--engine", "none", "--dry-run")
    assert result.exit_code == 0, result.output
    for words in ("export the graph", "reference, bounds", "time  ", "memory  ", "disk  ", "an estimate"):
        assert words in result.stdout
    assert "calibrate" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_pytorch_is_not_loaded() -> None:
    code = (
        "import sys; from spach_deploy.cli.export import main;"
        "main(['--model', 'ms_hybrid_s', '--engine', 'none', '--dry-run'], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root, "SPACH_CACHE": "none"}, check=False)
    assert done.returncode == 0


def test_larger_models_and_more_images_take_more(tmp_path: Path) -> None:
    def seconds(name: str, calibration: Path | None = None) -> float:
        spec = QuantizationSpec(calibration=calibration)
        precision = Precision.FP16 if calibration is None else Precision.INT8
        options = ExportOptions(ModelSpec(name), precision, engine=EngineTarget(Flavour.NONE), quantization=spec)
        found = dry_run(options, is_cached=False)
        assert found.refusals == ()
        assert found.seconds is not None
        return found.seconds

    np.savez(tmp_path / "few.npz", images=np.zeros((64, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "many.npz", images=np.zeros((640, 8, 8, 3), np.uint8))
    assert seconds("ms_trans_xxs") < seconds("ms_hybrid_s") < seconds("ms_hybrid_s", tmp_path / "few.npz")
    assert seconds("ms_hybrid_s", tmp_path / "few.npz") < seconds("ms_hybrid_s", tmp_path / "many.npz")


def test_every_refusal_is_told_at_once_with_the_exports_own_code(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    content = run("-o", "out", "--int8")
    said = [entry["message"] for entry in content["refusals"]]  # type: ignore[attr-defined]
    assert len(said) == 2
    assert content["exit_code"] == 2
    real = export("--model", "ms_hybrid_s", "--engine", "none", "-o", "out", "--int8")
    assert real.exit_code == 2
    assert any(message in real.stderr for message in said)


def test_what_the_model_cannot_have_is_refused_without_costs(tmp_path: Path) -> None:
    refused = export("--model", "ms_hybrid_s", "--heads", 5, "--engine", "none", "-o", tmp_path / "x", "--dry-run")
    assert refused.exit_code == 2
    assert "5 heads do not divide the model's" in refused.stdout
    unknown = export("--model", "ms_hybrid_z", "--engine", "none", "-o", tmp_path / "x", "--dry-run")
    assert unknown.exit_code == 2
    assert "Time, memory and disk" not in unknown.stdout


def test_missing_images_are_refused() -> None:
    content = run("--images", "nowhere")
    assert content["exit_code"] == 2


@pytest.mark.usefixtures("small_model_registered")
def test_the_checkpoint_is_looked_at(tmp_path: Path) -> None:
    """What it tells is told; a missing or damaged one, or one of another model, is refused as an export would."""
    tensors = create_model(small_bundles.NAME, image_size=small_bundles.SIZE, num_classes=7).state_dict()
    torch.save({"net": tensors}, tmp_path / "run.pth")
    torch.save({"model": {**tensors, "aux.weight": torch.ones(3)}}, tmp_path / "aux.pth")
    (tmp_path / "text.pth").write_bytes(b"weights")
    size = ("--image-size", small_bundles.SIZE, "--engine", "none", "--dry-run")
    result = export("--checkpoint", "run.pth", *size)
    assert result.exit_code == 0, result.output
    name = small_bundles.NAME
    for words in (f"model       {name}", "Unwrapped net.", "7 classes", "memory  ", f"build/{name}-fp32"):
        assert words in result.stdout
    for file, words in (
        ("absent.pth", "There is no checkpoint"),
        ("text.pth", "is not a PyTorch or safetensors file"),
        ("aux.pth", "--ignore 'aux.*'"),
        (("run.pth", "--model", "conv_xxs"), f"It fits {name}"),
        (("run.pth", "--top-k", 8), "--top-k 8 of 7 classes"),
    ):
        result = export("--checkpoint", *([file] if isinstance(file, str) else file), *size)
        assert result.exit_code == 2
        assert "Refused:" in result.stdout
        assert words in result.stdout


@pytest.mark.usefixtures("small_model_registered")
def test_the_checkpoints_of_a_zoo_are_looked_at(tmp_path: Path) -> None:
    tensors = create_model(small_bundles.NAME, image_size=small_bundles.SIZE, num_classes=7).state_dict()
    del tensors["norm2.bias"]
    torch.save(tensors, tmp_path / f"{small_bundles.NAME}.pth")
    zoo = ("--zoo", small_bundles.NAME, "--checkpoint", ".", "--image-size", small_bundles.SIZE, "--engine", "none")
    result = export(*zoo, "--dry-run")
    assert result.exit_code == 2
    assert "1 missing (norm2.bias)" in result.stderr


@pytest.mark.usefixtures("small_model_registered")
def test_what_is_in_the_cache_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACH_CACHE", str(tmp_path / "cache"))
    size, classes = small_bundles.SIZE, small_bundles.CLASSES
    words = ("--model", small_bundles.NAME, "--image-size", size, "--num-classes", classes, "--engine", "none")
    assert export(*words, "-o", "out").exit_code == 0
    assert "would come from the cache" in export(*words, "-o", "out", "--overwrite", "--dry-run").stdout
    assert "would come from the cache" not in export(*words, "-o", "other", "--dry-run").stdout


def test_auto_is_several_exports() -> None:
    result = export("--model", "ms_hybrid_s", "--auto", "--dry-run", "--calibration", "photos")
    assert result.exit_code == 2
    assert "--auto" in result.stderr

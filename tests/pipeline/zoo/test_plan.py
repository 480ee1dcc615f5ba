"""Which bundles a zoo has, and what is refused before the first of them begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from spach_deploy.common.errors import CheckpointError, ModelError, UsageError
from spach_deploy.common.files import Destination
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, ModelSpec, Precision, QuantizationSpec
from spach_deploy.pipeline.zoo.plan import ZooEntry, build_matrix, checkpoint_of, choices, gpu_groups, models_matching


def options_of(choice: ZooEntry) -> ExportOptions:
    return ExportOptions(ModelSpec(choice.model), choice.precision, engine=EngineTarget(Flavour.NONE))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan looks whether it may write; not where the tests were started."""
    monkeypatch.chdir(tmp_path)


def test_the_product_has_a_directory_for_each() -> None:
    names = [choice.name for choice in choices("ms_conv_s,ms_mlp_s", ("fp16", "bf16"), "sm86,rtx4090")]
    assert names == [
        f"{m}-{p}-{g}" for m in ("ms_conv_s", "ms_mlp_s") for p in ("fp16", "bf16") for g in ("sm86", "sm89")
    ]


def test_a_plus_puts_gpus_into_one_bundle_and_none_gives_none() -> None:
    assert gpu_groups("sm89+sm86, sm120,8.6+l4") == ("sm86,sm89", "sm120")
    assert ZooEntry("ms_conv_s", Precision.FP16, "sm86,sm89").name == "ms_conv_s-fp16-sm86-sm89"
    assert [choice.name for choice in choices("ms_conv_s", ("fp16",), None)] == ["ms_conv_s-fp16"]


def test_patterns_find_registry_names_once_in_its_order() -> None:
    assert models_matching("*") == tuple(ARCHITECTURES)
    found = models_matching("ms_hybrid_s,ms_*_s, spach_ms_hybrid_s")
    assert found == tuple(name for name in ARCHITECTURES if name.startswith("ms_") and name.endswith("_s"))


@pytest.mark.parametrize(
    ("models", "precisions", "gpus", "words"),
    [
        ("resnet*", ("fp16",), None, "matches no model"),
        ("ms_hybrid_z", ("fp16",), None, "Near it"),
        (" , ", ("fp16",), None, "names no model"),
        ("ms_conv_s", ("fp17",), None, "'fp17' is unknown"),
        ("ms_conv_s", ("fp16",), "sm86,voodoo2", "no GPU known"),
        ("ms_conv_s", ("fp16",), ",", "names no GPU"),
    ],
)
def test_what_is_none_is_refused(models: str, precisions: tuple[str, ...], gpus: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choices(models, precisions, gpus)


def test_larger_models_are_expected_to_take_more() -> None:
    small, large = build_matrix(choices("ms_trans_xxs,ms_hybrid_s", ("fp16",), None), options_of)
    assert small.seconds < large.seconds
    assert small.memory_bytes < large.memory_bytes
    assert small.disk_bytes < large.disk_bytes


def test_int8_without_images_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"ms_conv_s-int8: --int8 needs images to calibrate on.*--calibration"):
        build_matrix(choices("ms_conv_s", ("fp16", "int8"), None), options_of)


def test_files_of_one_export_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text("{}")
    for spec in (QuantizationSpec(file), QuantizationSpec(tmp_path, cache=Destination.of(file))):
        with pytest.raises(UsageError, match=r"one model and precision|one export writes"):
            build_matrix(
                choices("ms_conv_s,ms_mlp_s", ("int8",), None),
                lambda choice, spec=spec: ExportOptions(  # type: ignore[misc]
                    ModelSpec(choice.model), Precision.INT8, engine=EngineTarget(Flavour.NONE), quantization=spec
                ),
            )


def test_each_model_has_its_checkpoint_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "spach_ms_conv_s.pth").touch()
    (tmp_path / "ms_mlp_s.safetensors").touch()
    for file in ("ms_conv_xs.ckpt", "ms_mlp_xs.safetensors.index.json"):
        (tmp_path / file).touch()
        assert checkpoint_of(file.partition(".")[0], tmp_path, is_alone=False) == tmp_path / file
    assert checkpoint_of("ms_conv_s", tmp_path, is_alone=False) == tmp_path / "spach_ms_conv_s.pth"
    assert checkpoint_of("ms_mlp_s", tmp_path, is_alone=True) == tmp_path / "ms_mlp_s.safetensors"
    assert checkpoint_of("ms_mlp_s", tmp_path / "ms_mlp_s.safetensors", is_alone=True) is not None
    assert checkpoint_of("ms_mlp_s", None, is_alone=False) is None
    with pytest.raises(CheckpointError, match="no checkpoint of ms_hybrid_s"):
        checkpoint_of("ms_hybrid_s", tmp_path, is_alone=False)
    (tmp_path / "ms_conv_s.pth").touch()
    with pytest.raises(CheckpointError, match="2 checkpoints"):
        checkpoint_of("ms_conv_s", tmp_path, is_alone=False)
    with pytest.raises(UsageError, match="is one file"):
        checkpoint_of("ms_mlp_s", tmp_path / "ms_mlp_s.safetensors", is_alone=False)


def test_an_unknown_model_keeps_its_own_error() -> None:
    with pytest.raises(ModelError):
        models_matching("nothing_here")

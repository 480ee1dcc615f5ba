"""What no tensor shows is taken from where it is said, and each value says where it comes from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from spach_deploy.common.errors import ModelError
from spach_deploy.models import LoadedModel, load_model
from spach_deploy.models.hyperparameters import Source, lines
from spach_deploy.models.registry import create_model
from spach_deploy.models.shiftvit import Shift
from spach_deploy.options.specs import Hyperparameters, ModelSpec, parse_channels
from tests.blocks.test_families import FAMILIES, SIZE
from tests.models.small_models import load, refusal, save, state


def sources(loaded: LoadedModel) -> dict[str, tuple[Any, Source]]:
    return {setting.name: (setting.value, setting.source) for setting in loaded.settings}


def test_every_value_that_the_file_does_not_show_is_called_assumed(tmp_path: Path) -> None:
    loaded = load(save(tmp_path, state()))
    assert {source for _, source in sources(loaded).values()} == {Source.ASSUMED}
    assert set(sources(loaded)) == {"heads", "qk_scale", "activation", "norm_eps", "mean", "std"}
    (line,) = lines(loaded.settings)
    assert line == (
        "1 head, qk scale head size ** -0.5, activation gelu, epsilon 1e-06, pixel mean and std of ImageNet"
        " (assumed: as published, the file does not show it)"
    )


CONTAINERS: dict[str, Any] = {
    "a script's args": {"args": argparse.Namespace(num_heads=2, act_layer="nn.ReLU", qk_scale=0, norm_eps=None)},
    "Lightning": {"hyper_parameters": {"num_heads": 2, "act_layer": "relu"}},
    "a model's own section": {"hyper_parameters": {"model": {"num_heads": 2, "act": "relu"}, "lr": 1.0}},
    "the top of the file": {"num_heads": 2, "act_layer": "relu", "epoch": 3},
    "text for nothing": {"args": {"num_heads": "2", "act": "ReLU", "qk_scale": "None"}},
    "arguments of the constructor": {"args": {"model_kwargs": {"num_heads": "2", "activation": "ReLU()"}}},
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_files_own_args_are_honoured(tmp_path: Path, container: str) -> None:
    loaded = load(save(tmp_path, {"state_dict": state(), **CONTAINERS[container]}))
    assert sources(loaded)["heads"] == (2, Source.ARGS)
    assert sources(loaded)["activation"] == ("relu", Source.ARGS)
    assert sources(loaded)["qk_scale"] == (None, Source.ASSUMED)
    assert loaded.model.layer2[1].spatial_func.num_heads == 2  # type: ignore[index, union-attr]
    assert isinstance(loaded.model.layer2[1].channel_func.act, torch.nn.ReLU)  # type: ignore[index, union-attr]


def test_pixels_are_normalized_as_args_say(tmp_path: Path) -> None:
    loaded = load(save(tmp_path, {"model": state(), "args": {"mean": [0.5, 0.5, 0.5], "std": "0.25"}}))
    assert (loaded.preprocessing.mean, loaded.preprocessing.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(("code", "name"), [("bilinear", "bilinear"), (0, "nearest"), ("3", "bicubic")])
def test_pictures_are_resized_as_args_say(tmp_path: Path, code: str | int, name: str) -> None:
    loaded = load(save(tmp_path, {"model": state(), "args": {"crop_pct": 0.95, "interpolation": code}}))
    assert loaded.preprocessing.resize_size == 235
    assert loaded.preprocessing.interpolation.startswith(name)
    found = sources(loaded)
    assert (found["crop"], found["interpolation"]) == ((0.95, Source.ARGS), (name, Source.ARGS))
    asked = load(save(tmp_path, state()), hyperparameters=Hyperparameters(crop=1.0))
    assert asked.preprocessing.resize_size == 224
    assert sources(asked)["crop"] == (1.0, Source.COMMAND_LINE)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ("0.48145466,0.4578275,0.40821073", "0.26862954,0.26130258,0.27577711"),  # CLIP
        ("0.5", "0.5"),  # Inception
        ("0.4914,0.4822,0.4465", "0.2470,0.2435,0.2616"),  # CIFAR-10
        ("0", "1"),
    ],
)
def test_the_fields_means_and_deviations_are_taken(mean: str, std: str) -> None:
    assert len(parse_channels("--mean", mean)) == len(parse_channels("--std", std)) == 1 + 2 * ("," in mean)


def test_the_command_line_is_the_first_to_say_a_value(tmp_path: Path) -> None:
    loaded = load(save(tmp_path, state()), hyperparameters=Hyperparameters(heads=4, mean=(0.0, 0.0, 0.0)))
    assert sources(loaded)["heads"] == (4, Source.COMMAND_LINE)
    assert loaded.preprocessing.mean == (0.0, 0.0, 0.0)


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an activation that is not known": ({"act_layer": "mish"}, ("act_layer = 'mish'", "gelu-tanh")),
    "heads that are no number": ({"num_heads": "many"}, ("num_heads = 'many'",)),
    "heads that do not divide": ({"num_heads": 7}, ("7 heads", "args", "save the weights alone")),
    "another norm": ({"norm_layer": "BatchNorm2d"}, ("norm_layer = 'BatchNorm2d'",)),
    "two that differ": ({"num_heads": 2, "heads": 4}, ("num_heads and heads differ",)),
    "a width that the tensors have not": ({"hidden_dim": 64}, ("hidden_dim = 64",)),
    "no position encoding": ({"cpe": False}, ("cpe = False",)),
    "an interpolation that is not known": ({"interpolation": "random"}, ("interpolation = 'random'", "nearest")),
    "means of other channels": ({"mean": [0.5, 0.5]}, ("mean has 2 numbers (in the checkpoint's args)", "3 channels")),
    "a mean of 0..255": ({"mean": [123.675, 116.28, 103.53]}, ("Pixel mean 123.675 is not in 0..1",)),
    "no deviation": ({"std": [0.5, 0.5, 0]}, ("Pixel std 0 is not in (0, 1]",)),
    "a crop of percents": ({"crop_pct": 95}, ("The crop 95 is not in 0.1..1 (in the checkpoint's args)",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_args_that_cannot_be_honoured_are_refused_by_name(tmp_path: Path, case: str) -> None:
    args, words = REFUSED[case]
    sentence = refusal(save(tmp_path, {"model": state(), "args": args}))
    assert all(word in sentence for word in words), sentence


def test_args_that_contradict_the_command_line_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"model": state(), "args": {"num_heads": 2}})
    sentence = refusal(path, hyperparameters=Hyperparameters(heads=4))
    assert "4 heads was asked for, but the checkpoint's args say 2 heads (num_heads)" in sentence
    assert sources(load(path, hyperparameters=Hyperparameters(heads=2)))["heads"] == (2, Source.COMMAND_LINE)


# Divisions of a ShiftViT's channels


@pytest.fixture(scope="module")
def shifting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a ShiftViT of 32 channels."""
    return save(tmp_path_factory.mktemp("shifting"), create_model(FAMILIES["shiftvit"]).state_dict())


def read(path: Path, **said: Any) -> LoadedModel:
    return load_model(ModelSpec(None, path, image_size=SIZE, hyperparameters=Hyperparameters(**said)))


def test_divisions_are_assumed_as_published_or_said(shifting: Path, tmp_path: Path) -> None:
    assumed, given = read(shifting), read(shifting, divisions=8)
    assert sources(assumed)["divisions"] == (4, Source.ASSUMED)
    assert "4 divisions of the channels" in lines(assumed.settings)[0]
    assert sources(given)["divisions"] == (8, Source.COMMAND_LINE)
    assert given.architecture is not None
    assert given.architecture.divisions == 8
    model = torch.load(shifting, weights_only=True)
    args = {"n_div": 16, "norm_layer": "GroupNorm"}
    assert sources(read(save(tmp_path, {"model": model, "args": args})))["divisions"] == (16, Source.ARGS)
    shifts = [m.group for loaded in (assumed, given) for m in loaded.model.modules() if isinstance(m, Shift)]
    assert shifts == [8, 16, 16, 4, 8, 8]


@pytest.mark.parametrize("divisions", [3, 33])
def test_divisions_that_cannot_be_are_refused(shifting: Path, divisions: int) -> None:
    with pytest.raises(ModelError, match=f"{divisions} divisions is not 4 to 32"):
        read(shifting, divisions=divisions)


def test_divisions_of_a_model_that_shifts_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="shifts no channels, so it has no divisions"):
        load(save(tmp_path, state()), hyperparameters=Hyperparameters(divisions=4))
    with pytest.raises(ModelError, match="A smlpnet shifts no channels"):
        FAMILIES["smlpnet"].replace(divisions=4)


def test_heads_of_a_model_without_attention_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, state("ms_conv_xxs"))
    assert "no attention" in refusal(path, hyperparameters=Hyperparameters(heads=2))
    assert set(sources(load(path))) == {"activation", "norm_eps", "mean", "std"}

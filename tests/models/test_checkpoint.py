"""What a checkpoint's content must be, what is inferred from it, and how conflicts are told."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from spach_deploy.cli.benchmark import main as benchmark_command
from spach_deploy.cli.calibrate import main as calibrate_command
from spach_deploy.cli.export import main as export_command
from spach_deploy.cli.validate import main as validate_command
from spach_deploy.common.errors import CheckpointError
from spach_deploy.models import create_model, matching
from spach_deploy.models.checkpoint import weights_sha256
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.options.specs import WeightSource
from tests.models.small_models import load, refusal, save, state


def noted(path: Path, name: str | None = None, **options: Any) -> str:
    return "; ".join(load(path, name, **options).notes)


def half(tensor: Tensor) -> Tensor:
    """FP16, for smaller files; counters stay as they are."""
    return tensor.half() if tensor.is_floating_point() else tensor


class TestUnwrapping:
    def test_a_published_training_checkpoint(self, tmp_path: Path) -> None:
        args = argparse.Namespace(model="spach_ms_xxs_patch4_224_attn", input_size=224, nb_classes=10)
        ema = {name: tensor * 2 for name, tensor in state().items()}
        content = {
            "model": state(),
            "model_ema": ema,
            "optimizer": {},
            "scaler": {},
            "epoch": 299,
            "args": args,
        }
        loaded = load(save(tmp_path, content))
        assert loaded.origin == "checkpoint"
        assert (loaded.name, loaded.image_size, loaded.num_classes) == ("ms_trans_xxs", 224, 10)
        assert all(torch.equal(tensor, state()[name]) for name, tensor in loaded.model.state_dict().items())
        for note in (
            "unwrapped model",
            "args say model",
            "args say 10 classes",
            "image size 224: args say so",
        ):
            assert note in "; ".join(loaded.notes)
        assert not loaded.model.training
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())

    def test_ema_takes_the_moving_average(self, tmp_path: Path) -> None:
        ema = {f"module.{name}": tensor * 2 for name, tensor in state().items()}
        for content in (
            {"model": state(), "model_ema": ema},
            {"model": state(), "model_ema": {"state_dict": ema}},
        ):
            loaded = load(save(tmp_path, content), weights=WeightSource.EMA)
            assert torch.equal(loaded.model.state_dict()["head.weight"], 2 * state()["head.weight"])
            assert "unwrapped model_ema" in loaded.notes[0]

    def test_ema_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        for content in ({"model": state(), "epoch": 3}, {"model": state(), "model_ema": None, "epoch": 3}):
            text = refusal(save(tmp_path, content), weights=WeightSource.EMA)
            assert "no moving average" in text
            assert "model" in text
            assert "epoch" in text

    def test_a_file_with_only_ema_is_not_taken_for_the_model(self, tmp_path: Path) -> None:
        assert "--weights ema" in refusal(save(tmp_path, {"model_ema": state(), "epoch": 3}))

    @pytest.mark.parametrize("keys", [["state_dict"], ["model", "state_dict"], ["state_dict", "model"], []])
    def test_nested_state_dicts(self, tmp_path: Path, keys: list[str]) -> None:
        content: Any = state()
        for key in reversed(keys):
            content = {key: content}
        notes = noted(save(tmp_path, content))
        assert (f"unwrapped {' > '.join(keys)}" in notes) == bool(keys)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
    def test_prefixes_of_wrappers(self, tmp_path: Path, prefix: str) -> None:
        wrapped = {prefix + name: tensor for name, tensor in state().items()}
        notes = noted(save(tmp_path, wrapped))
        assert f"from {len(wrapped)} names" in notes
        assert all(f"`{part}.`" in notes for part in set(prefix.rstrip(".").split(".")))

    @pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "model._orig_mod.", "module.model.backbone."])
    def test_a_prefix_that_all_names_share(self, tmp_path: Path, prefix: str) -> None:
        loaded = load(save(tmp_path, {"state_dict": {prefix + name: tensor for name, tensor in state().items()}}))
        assert loaded.weights_sha256 == weights_sha256(state())
        plain = ".".join(part for part in prefix.split(".") if part not in ("module", "_orig_mod"))
        assert f"removed the prefix `{plain}`" in loaded.notes

    def test_a_container_of_any_name(self, tmp_path: Path) -> None:
        wrapped = {f"encoder.{name}": tensor for name, tensor in state().items()}
        content = {"epoch": torch.tensor(3), "best": {"net": wrapped}, "optimizer": {"state": {0: {"exp_avg": 0}}}}
        assert "unwrapped best > net; removed the prefix `encoder.`" in noted(save(tmp_path, content))

    def test_the_counter_of_averaged_models(self, tmp_path: Path) -> None:
        averaged = {f"module.{name}": tensor for name, tensor in state().items()} | {"n_averaged": torch.tensor(5)}
        for outer in ("", "module.", "model."):
            notes = noted(save(tmp_path, {outer + name: tensor for name, tensor in averaged.items()}))
            assert f"dropped {outer}n_averaged: 5 models were averaged" in notes

    def test_wrappers_of_sharded_and_recomputed_training(self, tmp_path: Path) -> None:
        """FSDP, activation checkpointing."""
        names = {name: name.replace("layer1.0.", "layer1.0._checkpoint_wrapped_module.") for name in state()}
        wrapped = {f"_fsdp_wrapped_module.{names[name]}": tensor for name, tensor in state().items()}
        assert "removed `_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.`" in noted(save(tmp_path, wrapped))

    def test_averaged_weights_beside_the_model_s(self, tmp_path: Path) -> None:
        """The model's are taken and the others said; --weights ema takes them."""
        ema = {name: tensor * 2 for name, tensor in state().items()}
        flat = {f"model.{name}": tensor for name, tensor in state().items()}
        contents: list[dict[str, Any]] = [
            {"net": state(), "ema": {"module": ema}},
            {"state_dict": flat | {f"ema.module.{name}": tensor for name, tensor in ema.items()}},
            state() | {f"model_ema.{name}": tensor for name, tensor in ema.items()},
        ]
        same = state()
        assert "state_dict_ema" in noted(save(tmp_path, {"state_dict": same, "state_dict_ema": same}))
        for content in contents:
            path = save(tmp_path, content)
            assert torch.equal(load(path).model.state_dict()["head.bias"], state()["head.bias"])
            assert "averaged weights are in the file too" in noted(path)
            averaged = load(path, weights=WeightSource.EMA)
            assert torch.equal(averaged.model.state_dict()["head.bias"], ema["head.bias"])
            assert "too" not in "; ".join(averaged.notes)

    def test_two_models_are_not_chosen_between(self, tmp_path: Path) -> None:
        pair = {"student": state(), "teacher": {name: tensor * 2 for name, tensor in state().items()}}
        path = save(tmp_path, pair)
        text = refusal(path)
        assert "holds 2 models: student, teacher." in text
        assert "--ignore 'teacher.*'" in text
        loaded = load(path, ignore=("student.*",))
        assert torch.equal(loaded.model.state_dict()["head.bias"], 2 * state()["head.bias"])
        assert "--ignore 'student.*' left out what is under student." in loaded.notes

    def test_parts_of_a_training_whose_values_are_elsewhere(self, tmp_path: Path) -> None:
        empty = {name: torch.zeros(0) for name in state()}
        assert "zero_to_fp32.py" in refusal(save(tmp_path, {"module": empty}))

    def test_a_compiled_part_of_the_model(self, tmp_path: Path) -> None:
        wrapped = {name.replace("layer1.0.", "layer1.0._orig_mod."): tensor for name, tensor in state().items()}
        assert "removed `_orig_mod.`" in noted(save(tmp_path, wrapped))

    def test_a_name_that_is_there_twice(self, tmp_path: Path) -> None:
        doubled = state() | {"module.head.weight": state()["head.weight"]}
        assert "head.weight twice" in refusal(save(tmp_path, doubled))

    def test_entries_that_are_no_tensors(self, tmp_path: Path) -> None:
        notes = noted(save(tmp_path, state() | {"epoch": 3, "note": "good", "history": {"loss": [1.0]}}))
        assert "left out 3 entries that are not tensors: epoch, note, history" in notes

    def test_a_tensor_replaced_by_a_list_is_missing(self, tmp_path: Path) -> None:
        content: dict[str, Any] = state()
        content["norm1.weight"] = [1.0] * 32
        assert "1 missing (norm1.weight)" in refusal(save(tmp_path, content), "ms_trans_xxs")

    @pytest.mark.parametrize(
        "content",
        [torch.zeros(3), [1, 2], None, 7, "text", {}, {"model": {}}, {"epoch": 3}, {"model": {"a": 1}}],
    )
    def test_content_without_named_tensors(self, tmp_path: Path, content: Any) -> None:
        assert "The checkpoint holds" in refusal(save(tmp_path, content), "ms_trans_xxs")

    def test_a_dictionary_that_holds_itself(self, tmp_path: Path) -> None:
        content: dict[str, Any] = {}
        content["model"] = content
        assert "holds no tensors" in refusal(save(tmp_path, content))


class TestIgnoring:
    extra = {"head_dist.weight": torch.zeros(10, 256), "head_dist.bias": torch.zeros(10)}  # noqa: RUF012

    def test_a_second_head_is_named_with_the_option_that_drops_it(self, tmp_path: Path) -> None:
        path = save(tmp_path, {"state_dict": {f"model.{key}": value for key, value in (state() | self.extra).items()}})
        for name in (None, "ms_trans_xxs"):
            text = refusal(path, name)
            assert "2 unexpected (head_dist.weight, head_dist.bias)" in text
            assert text.endswith("--ignore 'head_dist.*'.")
        for pattern in ("head_dist.*", "model.head_dist.*", "*dist*"):
            loaded = load(path, ignore=(pattern,))
            assert f"--ignore '{pattern}' dropped " in "; ".join(loaded.notes)
            assert loaded.weights_sha256 == weights_sha256(state())

    def test_tensors_outside_of_the_model_s_prefix(self, tmp_path: Path) -> None:
        wrapped = {f"model.{name}": tensor for name, tensor in state().items()} | {"loss.weight": torch.ones(10)}
        path = save(tmp_path, wrapped)
        assert "those of 1 tensors do not: loss.weight. Drop them with --ignore 'loss.*'." in refusal(path)
        assert load(path, ignore=("loss.*",)).name == "ms_trans_xxs"
        split = {(name if "head" in name else f"backbone.{name}"): tensor for name, tensor in state().items()}
        assert "The head must have that prefix too" in refusal(save(tmp_path, split))

    def test_what_the_option_drops_is_never_what_the_model_needs(self, tmp_path: Path) -> None:
        path = save(tmp_path, state() | {"layer1.0.scale": torch.ones(3)})
        assert "--ignore layer1.0.scale" in refusal(path)
        assert "--ignore 'head.*' would drop 2 tensors of the model" in refusal(
            path, ignore=("layer1.0.scale", "head.*")
        )
        assert "would drop 183 tensors" in refusal(path, ignore=("*",))
        wrapped = save(tmp_path, {f"model.{name}": tensor for name, tensor in state().items()})
        assert "leaves nothing" in refusal(wrapped, ignore=("model.*",))

    @pytest.mark.parametrize("name", ["a[0].w", "it's", "b*d?", "plain"])
    def test_the_option_that_is_named_drops_it(self, tmp_path: Path, name: str) -> None:
        path = save(tmp_path, state() | {name: torch.ones(3)})
        words = shlex.split(refusal(path).partition(" with ")[2].removesuffix("."))
        assert words[0] == "--ignore"
        assert load(path, ignore=(words[1],)).name == "ms_trans_xxs"

    def test_a_pattern_that_matches_nothing_is_said(self, tmp_path: Path) -> None:
        assert "--ignore 'aux.*' matched no tensor" in noted(save(tmp_path, state()), ignore=("aux.*",))

    def test_a_model_without_its_head(self, tmp_path: Path) -> None:
        bare = {name: tensor for name, tensor in state().items() if not name.startswith("head.")}
        for name in (None, "ms_trans_xxs"):
            text = refusal(save(tmp_path, bare), name)
            assert load(save(tmp_path, bare), name, num_classes=0).num_classes == 0
            assert "2 missing (head.weight, head.bias)" in text
            assert "Give the file with its head, or --num-classes 0" in text
        called = bare | {"fc.weight": state()["head.weight"], "fc.bias": state()["head.bias"]}
        text = refusal(save(tmp_path, called | {"projector.weight": torch.ones(2)}))
        assert "Its head is called fc: save it again as head.weight and head.bias" in text
        assert "--ignore 'projector.*'" in text

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            (export_command, ("--model", "ms_trans_xxs")),
            (calibrate_command, ("--model", "ms_trans_xxs", "--calibration", "photos", "-o", "scales.json")),
            (validate_command, ("bundle",)),
            (benchmark_command, ("bundle",)),
        ],
        ids=["export", "calibrate", "validate", "benchmark"],
    )
    def test_it_is_for_checkpoints(self, command: click.Command, words: tuple[str, ...]) -> None:
        """Of every command that takes one."""
        result = CliRunner().invoke(command, [*words, "--ignore", "head_dist.*"])
        assert result.exit_code == 2
        assert "--ignore names tensors of a checkpoint. Give --checkpoint FILE." in result.stderr


class TestDtypes:
    @pytest.mark.parametrize(("dtype", "word"), [(torch.float16, "FP16"), (torch.bfloat16, "BF16")])
    def test_half_weights_become_fp32_and_that_is_noted(self, tmp_path: Path, dtype: torch.dtype, word: str) -> None:
        half = {name: tensor.to(dtype) for name, tensor in state().items()}
        loaded = load(save(tmp_path, half))
        assert f"converted {len(half)} {word} tensors to FP32" in loaded.notes
        assert loaded.weights_sha256 == weights_sha256({name: tensor.float() for name, tensor in half.items()})
        assert {tensor.dtype for tensor in loaded.model.state_dict().values()} == {torch.float32}

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.complex64])
    def test_other_types_are_refused_by_name(self, tmp_path: Path, dtype: torch.dtype) -> None:
        content = state()
        content["head.bias"] = content["head.bias"].to(dtype)
        text = refusal(save(tmp_path, content))
        assert "1 are not" in text
        assert "head.bias" in text
        assert str(dtype).removeprefix("torch.") in text

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_tensors_without_plain_values_are_refused(self, tmp_path: Path) -> None:
        weight = state()["head.weight"]
        for strange in (weight.to_sparse(), weight.to("meta"), torch.nested.nested_tensor([weight])):
            assert "head.weight" in refusal(save(tmp_path, state() | {"head.weight": strange}))

    def test_strided_and_parameter_tensors_are_copied_plainly(self, tmp_path: Path) -> None:
        weight = state()["stem.proj.weight"]
        content = state() | {
            "stem.proj.weight": weight.contiguous(memory_format=torch.channels_last),
            "head.weight": torch.nn.Parameter(state()["head.weight"]),
        }
        loaded = load(save(tmp_path, content))
        assert loaded.weights_sha256 == weights_sha256(state())
        assert all(tensor.is_contiguous() for tensor in loaded.model.state_dict().values())

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_values_that_are_not_finite_are_refused_by_name(self, tmp_path: Path, value: float) -> None:
        content = state()
        for name in ("norm1.weight", "layer2.1.spatial_func.qkv.weight"):
            content[name] = content[name].clone()
            content[name].view(-1)[3] = value
        text = refusal(save(tmp_path, content))
        assert "in 2 tensors" in text
        assert "norm1.weight" in text
        assert "layer2.1.spatial_func.qkv.weight" in text


class TestFit:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_every_model_is_inferred_from_its_tensors(self, name: str) -> None:
        with torch.device("meta"):
            tensors = create_model(name, num_classes=7).state_dict()
        spatial = {key: tensor.shape for key, tensor in tensors.items() if ".spatial_func." in key}
        different = not ARCHITECTURES[name].shared
        values = {
            key: torch.full(shape, float(len(key) + index if different else 0))
            for index, (key, shape) in enumerate(spatial.items())
        }
        assert matching.infer_model({**tensors, **values}, {}, None)[0].name == name

    def test_what_was_inferred_is_noted(self, tmp_path: Path) -> None:
        notes = noted(save(tmp_path, state()))
        assert "model ms_trans_xxs: inferred" in notes
        assert "10 classes: rows of the head" in notes
        assert "image size 224: the default" in notes
        assert "inferred" not in noted(save(tmp_path, state()), "ms_trans_xxs")

    def test_all_differences_are_listed_together(self, tmp_path: Path) -> None:
        content = state()
        del content["norm1.weight"]
        content["extra.weight"] = torch.zeros(3)
        content["norm2.bias"] = torch.zeros(3)
        text = refusal(save(tmp_path, content), "ms_trans_xxs")
        assert "1 missing (norm1.weight)" in text
        assert "1 unexpected (extra.weight)" in text
        assert "1 of another shape (norm2.bias is 3 instead of 256)" in text
        assert "No other model is nearer" in text
        assert "nearest is ms_trans_xxs" in refusal(save(tmp_path, content))

    def test_long_lists_are_counted(self, tmp_path: Path) -> None:
        content = {name: tensor for name, tensor in state().items() if ".channel_func." not in name}
        text = refusal(save(tmp_path, content), "ms_trans_xxs")
        assert "48 missing (layer1.0.channel_func.fc1.weight" in text
        assert "and 40 more" in text

    def test_the_model_that_does_fit_is_named(self, tmp_path: Path) -> None:
        assert "It fits ms_trans_xxs" in refusal(save(tmp_path, state()), "ms_trans_xs")
        assert "It fits ms_trans_xxs" in refusal(save(tmp_path, state()), "conv_s")

    def test_a_nearer_model_is_named(self, tmp_path: Path) -> None:
        content = state()
        del content["norm1.weight"]
        assert "Nearest is ms_trans_xxs, with 1 difference" in refusal(save(tmp_path, content), "ms_trans_xs")

    def test_a_foreign_checkpoint(self, tmp_path: Path) -> None:
        names = [f"layer{i}.{j}.conv{k}.weight" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)]
        foreign = {name: torch.zeros(4, 4, 3, 3) for name in names} | {"fc.weight": torch.zeros(1000, 512)}
        text = refusal(save(tmp_path, foreign))
        assert "not those of a SPACH model" in text
        assert "layer1.0.conv1.weight" in text
        assert "does not seem to be of a SPACH model" in refusal(save(tmp_path, foreign), "ms_hybrid_s")

    def test_a_tensor_that_contradicts_the_others_is_named(self, tmp_path: Path) -> None:
        broken = {**state(), "stem.proj.weight": state()["stem.proj.weight"][:8]}
        for name in (None, "ms_trans_xxs"):
            text = refusal(save(tmp_path, broken), name)
            assert "1 of another shape (stem.proj.weight is 8x3x4x4 instead of 32x3x4x4)" in text
        assert "fit no model; nearest is ms_trans_xxs" in refusal(save(tmp_path, broken))

    @pytest.mark.parametrize("place", ["layer1.0.channel_func.fc1", "layer3.1.channel_func.fc1"])
    @pytest.mark.parametrize("depth", [1, 2])
    def test_one_weight_of_another_width_is_named(self, place: str, depth: int, tmp_path: Path) -> None:
        later = (("trans", depth),)
        stages = ((("conv", 1),), later, later, later)
        architecture = ARCHITECTURES["ms_trans_xxs"].replace(width=48, heads=3, classes=5, stages=stages)
        content = create_model(architecture).state_dict()
        second = place.replace("fc1", "fc2")
        for name, changed in (
            (f"{place}.weight", content[f"{place}.weight"][:-3]),
            (f"{second}.weight", content[f"{second}.weight"][:, :-3]),
        ):
            text = refusal(save(tmp_path, {**content, name: changed}))
            assert f"1 of another shape ({name} is" in text

    def test_an_architecture_outside_the_table_is_described(self, tmp_path: Path) -> None:
        loaded = load(save(tmp_path, create_model("ms_trans_xxs", width=48, heads=3, num_classes=2).state_dict()))
        assert loaded.name == "spach"
        assert loaded.notes[0] == (
            "a spach 48 wide, patch 4, 2 conv | 2 trans | 6 trans | 2 trans: inferred from the tensors' names and"
            " shapes"
        )
        assert str(loaded.settings[0]) == "2 heads"
        assert "--heads or --answers decide" in loaded.settings[0].source.sentence

    def test_a_few_tensors_are_no_model(self, tmp_path: Path) -> None:
        head = {name: tensor for name, tensor in state().items() if name.startswith("head.")}
        assert "not those of a SPACH model" in refusal(save(tmp_path, head))

    def test_tensors_that_fit_several_models_need_a_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(ARCHITECTURES, "twin", ARCHITECTURES["ms_trans_xxs"])
        with pytest.raises(CheckpointError, match=r"fit ms_trans_xxs and twin alike\. Say which with --model"):
            matching.infer_model(state(), {}, None)

    def test_classes(self, tmp_path: Path) -> None:
        path = save(tmp_path, state())
        assert load(path, num_classes=10).num_classes == 10
        for name in (None, "ms_trans_xxs"):
            text = refusal(path, name, num_classes=1000)
            assert "head has 10 classes, but 1000 were asked for" in text

    @pytest.mark.parametrize("head", [torch.zeros(()), torch.zeros(10), torch.zeros(10, 2), torch.zeros(0, 256), None])
    def test_a_strange_head(self, tmp_path: Path, head: Tensor | None) -> None:
        content: dict[str, Any] = state() | {"head.weight": head}
        assert "head" in refusal(save(tmp_path, content), "ms_trans_xxs")

    def test_batchnorm_counters_may_be_missing(self, tmp_path: Path) -> None:
        full = {name: half(tensor) for name, tensor in state("ms_hybrid_xs+").items()}
        old = {name: tensor for name, tensor in full.items() if not name.endswith("num_batches_tracked")}
        loaded = load(save(tmp_path, old))
        assert loaded.name == "ms_hybrid_xs+"
        assert loaded.weights_sha256 == weights_sha256(full)


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """mlp_s_shared; saved once and removed, for it is big."""
    tensors = {name: half(tensor) for name, tensor in state("mlp_s_shared").items()}
    args = argparse.Namespace(model="spach_s_patch16_224_mlp")
    path = save(tmp_path_factory.mktemp("shared"), {"model": tensors, "args": args})
    yield path
    path.unlink()


class TestSharedWeights:
    def test_equal_tensors_in_every_block_are_the_shared_model(self, shared_file: Path) -> None:
        loaded = load(shared_file)
        assert loaded.name == "mlp_s_shared"
        assert len([key for key, _ in loaded.model.named_parameters() if ".spatial_func.fc1.weight" in key]) == 1
        assert "the same in every block" in "; ".join(loaded.notes)

    def test_the_plain_model_takes_them_too(self, shared_file: Path) -> None:
        loaded = load(shared_file, "mlp_s")
        assert loaded.name == "mlp_s"
        assert loaded.weights_sha256 == load(shared_file).weights_sha256

    def test_different_tensors_are_the_plain_model(self) -> None:
        content = state("mlp_s_shared")
        content["blocks.3.spatial_func.fc1.bias"] = content["blocks.3.spatial_func.fc1.bias"] + 1
        assert matching.infer_model(content, {}, None)[0].name == "mlp_s"
        matching.check_fit(ARCHITECTURES["mlp_s"].replace(classes=10), "mlp_s", content)
        with pytest.raises(CheckpointError, match="but 1 differ between") as caught:
            matching.check_fit(ARCHITECTURES["mlp_s_shared"].replace(classes=10), "mlp_s_shared", content)
        assert "blocks.3.spatial_func.fc1.bias" in str(caught.value)
        assert "--model mlp_s." in str(caught.value)


class TestImageSize:
    def test_a_spatial_mlp_fixes_it(self, tmp_path: Path) -> None:
        path = save(tmp_path, state("ms_mlp_xxs"))
        loaded = load(path)
        assert (loaded.name, loaded.image_size) == ("ms_mlp_xxs", 224)
        assert "image size 224: the spatial MLP's weights say so" in loaded.notes
        asked = load(path, image_size=224)
        assert "image size 224: as asked for, and the spatial MLP's weights fit" in asked.notes
        for name in (None, "ms_mlp_xxs"):
            text = refusal(path, name, image_size=256)
            assert "for 224 pixels" in text
            assert "weights fix the number of tokens" in text
            assert "--image-size 224" in text

    def test_a_spatial_mlp_of_another_size_is_recognised(self, tmp_path: Path) -> None:
        model = create_model("mlp_xxs", image_size=64, num_classes=3)
        loaded = load(save(tmp_path, model.state_dict()))
        assert (loaded.name, loaded.image_size) == ("mlp_xxs", 64)

    def test_other_models_take_any_size_that_is_large_enough(self, tmp_path: Path) -> None:
        path = save(tmp_path, state() | {})
        assert load(path, image_size=256).image_size == 256
        assert load(path, image_size=256).weights_sha256 == load(path).weights_sha256
        assert load(path, image_size=225).weights_sha256 == load(path).weights_sha256
        assert "too small" in refusal(path, image_size=0)
        assert "too small" in refusal(path, "ms_trans_xxs", image_size=63)

    def test_a_wrong_size_is_told_before_the_file_is_read(self) -> None:
        assert "too small" in refusal(Path("absent.pth"), "ms_trans_xxs", image_size=63)

    def test_args_decide_when_nothing_was_asked(self, tmp_path: Path) -> None:
        path = save(tmp_path, {"model": state(), "args": {"input_size": 288}})
        assert load(path).image_size == 288
        loaded = load(path, image_size=256)
        assert loaded.image_size == 256
        assert "image size 256 as asked, though args say that it was trained at 288" in loaded.notes

    def test_args_that_contradict_the_tensors(self, tmp_path: Path) -> None:
        path = save(tmp_path, {"model": state("ms_mlp_xxs"), "args": {"input_size": 256}})
        assert "for 224 pixels" in refusal(path)
        assert "256 is what its args say" in refusal(path)


class TestArgs:
    def with_args(self, folder: Path, **args: Any) -> Path:
        return save(folder, {"model": state(), "args": argparse.Namespace(**args)})

    def test_a_model_that_agrees_under_any_of_its_names(self, tmp_path: Path) -> None:
        for said in ("ms_trans_xxs", "spach_ms_xxs_patch4_224_attn", "spach_ms_trans_xxs"):
            assert f"args say model {said}, which agrees" in noted(self.with_args(tmp_path, model=said))

    def test_another_model_is_a_conflict(self, tmp_path: Path) -> None:
        path = self.with_args(tmp_path, model="spach_ms_s_patch4_224_hybrid")
        asked, inferred = refusal(path, "ms_trans_xxs"), refusal(path)
        assert "spach_ms_s_patch4_224_hybrid (here ms_hybrid_s), but ms_trans_xxs was asked for" in asked
        assert "its tensors are those of ms_trans_xxs" in inferred

    def test_variants_share_the_registry_name(self, shared_file: Path) -> None:
        assert "args say model spach_s_patch16_224_mlp, which agrees" in noted(shared_file, "mlp_s_shared")
        assert "args say model spach_s_patch16_224_mlp, which agrees" in noted(shared_file, "mlp_s")

    def test_an_unknown_model_name_is_noted(self, tmp_path: Path) -> None:
        assert "'my_spach', a name that is not known here" in noted(self.with_args(tmp_path, model="my_spach"))

    @pytest.mark.parametrize("field", ["nb_classes", "num_classes"])
    def test_classes(self, tmp_path: Path, field: str) -> None:
        assert "args say 10 classes, which agrees" in noted(self.with_args(tmp_path, **{field: np.int64(10)}))
        text = refusal(self.with_args(tmp_path, **{field: 1000}))
        assert "args say 1000 classes" in text
        assert "head has 10" in text

    @pytest.mark.parametrize("value", [None, "large", [], {}, float("nan"), True])
    def test_values_that_are_no_numbers_are_left_alone(self, tmp_path: Path, value: Any) -> None:
        assert load(self.with_args(tmp_path, input_size=value, nb_classes=value)).image_size == 224

    def test_sizes_of_images_as_a_list(self, tmp_path: Path) -> None:
        assert load(self.with_args(tmp_path, input_size=[3, 256, 256])).image_size == 256
        assert load(self.with_args(tmp_path, input_size=(3, 64, 96))).image_size == (64, 96)


def test_the_weights_hash_sees_names_shapes_and_values() -> None:
    base = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    assert weights_sha256(base) == weights_sha256(dict(reversed(base.items())))
    assert weights_sha256(base) == weights_sha256(base | {"steps": torch.tensor(3)})
    for other in (
        {"a": base["a"], "c": base["b"]},
        base | {"a": base["a"].view(2, 3)},
        base | {"b": torch.ones(2)},
    ):
        assert weights_sha256(other) != weights_sha256(base)


def test_loading_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    with caplog.at_level(logging.DEBUG):
        load(save(tmp_path, state(), _use_new_zipfile_serialization=False))
    assert not caplog.records
    assert not list(recwarn)

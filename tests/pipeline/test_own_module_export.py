"""A module of the user's own goes through the whole export, from a shell and from Python, with every precision."""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import spach_deploy
from spach_deploy.blocks import rewrite
from spach_deploy.bundle.schema import Manifest
from spach_deploy.bundle.store import GRAPH
from spach_deploy.cli.validate import main as validate_command
from spach_deploy.common.errors import ModelError, UsageError
from spach_deploy.models import create_model
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.own_module import loaded_module
from spach_deploy.options.specs import ModelSpec
from tests import small_bundles
from tests.commands import export, refusal
from tests.own_models import Branching, ClassToken, Locked, Looping, PlainNet, TwoHeads
from tests.quantization.small_quantized import pictures
from tests.static_models import IMAGE_SIZE, small_model
from tests.validation import faults

IMAGE = torch.zeros(1, 3, 32, 32)


def seeded(model: nn.Module) -> nn.Module:
    load_demo_weights(model)
    return model


def validate(*words: object) -> Result:
    return CliRunner().invoke(validate_command, list(map(str, words)))


def exported(model: nn.Module, folder: Path, **options: Any) -> Manifest:
    """The manifest of a bundle without an engine, which agrees with the module."""
    example = options.pop("example", IMAGE)
    options = {"precision": "fp32", "engine": "none", **options}
    result = spach_deploy.export(model, example, output=folder / "bundle", **options)
    assert result.validation.passed
    return result.bundle.manifest


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_module_with_known_blocks_and_two_heads(precision: str, tmp_path: Path) -> None:
    model = seeded(TwoHeads()).train()
    manifest = exported(model, tmp_path, precision=precision)
    assert model.training
    assert [(tensor.name, tensor.shape, tensor.role) for tensor in manifest.outputs] == [
        ("classes", (None, 7), "other"),
        ("angle", (None, 1), "other"),
    ]
    assert manifest.graph.levels["known"].modules == ("blocks.0.mix", "blocks.0.mlp", "blocks.1.mix", "blocks.1.mlp")
    assert sum(level.macs for level in manifest.graph.levels.values()) == pytest.approx(1)
    assert (manifest.model.origin, manifest.model.architecture, manifest.graph.certificate.broken) == (
        "module",
        None,
        (),
    )
    assert manifest.model.hyperparameters["mean"].source == "usual"
    page = (tmp_path / "bundle" / "report.html").read_text(encoding="utf-8")
    assert "Blocks of the module: 4 known (62 % of the arithmetic), 8 plain (38 %), 3 unknown" in page


def test_a_module_in_eight_bits(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=pictures(16, 1))
    manifest = exported(seeded(TwoHeads()), tmp_path, precision="int8", calibration=tmp_path / "set.npz")
    assert manifest.quantization is not None
    assert manifest.quantization.layers == 8
    reasons = {kept.module: kept.reason for kept in manifest.quantization.kept_float}
    assert {reasons["classes"], reasons["angle"]} == {"rule: the head's error is the answer's"}


def test_a_convolution_that_took_in_a_batch_norm_stays_in_float_and_that_is_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=pictures(16, 1))
    options = {"precision": "int8", "calibration": tmp_path / "set.npz", "quantize": "body.*"}
    manifest = exported(seeded(PlainNet()), tmp_path, **options)
    assert manifest.quantization is not None
    assert manifest.quantization.layers == 1
    assert {kept.module: kept.reason.split(",")[0] for kept in manifest.quantization.kept_float} == {
        "body.1": "rule: its weights are not those of one layer",
        "head": "rule: the head's error is the answer's",
    }


def test_a_module_without_a_known_block(tmp_path: Path) -> None:
    manifest = exported(seeded(PlainNet()), tmp_path, precision="fp16")
    assert manifest.graph.levels["plain"].macs == 1
    assert manifest.outputs[0].role == "logits"


def test_a_class_token_and_torchs_own_attention(tmp_path: Path) -> None:
    manifest = exported(seeded(ClassToken()), tmp_path, precision="fp16")
    assert manifest.graph.certificate.broken[0].startswith("shape arithmetic")


def test_a_module_is_calibrated_once(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=pictures(16, 1))
    module: dict[str, Any] = {"module": "tests.own_models:PlainNet", "image_size": 32, "quantize": "body.*"}
    torch.manual_seed(0)
    scales = spach_deploy.calibrate(calibration=tmp_path / "set.npz", output=tmp_path / "scales.json", **module)
    assert len(scales.plan.sites) == 1


def test_a_wrapper_around_a_published_model_keeps_its_own_forward(tmp_path: Path) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_model("hybrid")

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = self.net.norm1(self.net.stem((pixels - 0.5) / 0.25))
            for name in self.net.stage_names:
                tokens = getattr(self.net, name)(tokens)
            tokens = self.net.norm2(tokens)
            return self.net.head(tokens.mean(1)), tokens

    manifest = exported(Normalized(), tmp_path, example=torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), precision="fp16")
    assert "net.layer3.1" in manifest.graph.levels["known"].modules
    assert [tensor.layout for tensor in manifest.outputs] == ["NC", "NLC"]


class Siamese(nn.Module):
    """One network on two images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_model("hybrid")

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        difference: torch.Tensor = self.net(left) - 0.5 * self.net(right)
        return difference


def test_a_network_that_runs_on_two_images_keeps_names_unique(tmp_path: Path) -> None:
    example = (torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE),) * 2
    exported(Siamese(), tmp_path, example=example, precision="fp16")
    names = [node.name for node in onnx.load(tmp_path / "bundle" / "model.onnx").graph.node]
    assert len(set(names)) == len(names)


def test_a_transformer_encoder_in_halves_does_not_end_the_process(tmp_path: Path) -> None:
    words = "--module tests.own_models:Encoder --image-size 32 --fp16 --engine none --batch 1:2:4 --output"
    code = "from spach_deploy.cli.export import main; main()"
    command = [sys.executable, "-c", code, *words.split(), str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "AGREED" in done.stdout
    measure = [sys.executable, "-m", "spach_deploy.cli.benchmark", str(tmp_path / "bundle"), "--batch", "1"]
    measured = subprocess.run([*measure, "--runner", "onnxruntime"], capture_output=True, text=True, check=False)
    assert measured.returncode == 0, measured.stderr


Change = Callable[[nn.Module], None]


def _with_a_hook(block: nn.Module) -> None:
    block.register_forward_hook(lambda _module, _inputs, output: output * 1.05)


def _with_another_forward(block: nn.Module) -> None:
    before = block.forward
    block.forward = lambda x: before(x) * 1.05


def _with_another_method(block: nn.Module) -> None:
    kind = type(block)
    block.forward = types.MethodType(lambda self, x: kind.forward(self, x) * 1.05, block)


def _with_a_partial_forward(block: nn.Module) -> None:
    kind = type(block)
    block.forward = functools.partial(lambda self, x: kind.forward(self, x) * 1.05, block)


def _of_a_subclass(block: nn.Module) -> None:
    kind = type(block)

    def forward(self: nn.Module, x: torch.Tensor) -> Any:
        return kind.forward(self, x) + 0.03 * x.sin()

    block.__class__ = type("Mine", (kind,), {"forward": forward})


CHANGES = (_with_a_hook, _of_a_subclass, _with_another_forward, _with_another_method, _with_a_partial_forward)


@pytest.mark.parametrize("change", CHANGES)
def test_a_known_block_that_the_user_changed_stays_as_it_is(change: Callable[[nn.Module], None]) -> None:
    model = seeded(copy.deepcopy(small_model("hybrid")))
    change(model.get_submodule("layer3.1"))
    known = rewrite(loaded_module(model, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), ModelSpec()).model).known
    assert "model.layer3.1" not in known
    assert {"model.layer3.0", "model.layer3.1.spatial_func"} <= {*known}


def test_a_changed_block_is_exported_as_it_is_beside_known_ones(tmp_path: Path) -> None:
    model = seeded(copy.deepcopy(small_model("hybrid")))
    _with_a_hook(model.get_submodule("layer3.1"))
    levels = exported(model, tmp_path, example=torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)).graph.levels
    assert "model.layer3.1" not in levels["known"].modules
    assert any(path.startswith("model.layer3.0") for path in levels["known"].modules)


class BranchOnValues(PlainNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = super().forward(x)
        return found * 2 if found.sum() > 1e9 else found


def test_a_branch_on_values_is_said_without_the_symbols_of_pytorch(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="depends on the values of a tensor") as caught:
        exported(seeded(BranchOnValues()), tmp_path)
    assert "Eq(" not in str(caught.value)


@pytest.mark.parametrize("name", ["ms_conv_xxs", "shiftvit_light_tiny"])
def test_a_published_model_as_a_module_has_the_graph_of_that_model(name: str, tmp_path: Path) -> None:
    model = seeded(create_model(name, image_size=64, num_classes=9))
    own = exported(model, tmp_path, example=torch.zeros(1, 3, 64, 64))
    spach_deploy.export(name, image_size=64, num_classes=9, precision="fp32", engine="none", output=tmp_path / "named")
    graphs = [(tmp_path / name / "model.onnx").read_bytes() for name in ("bundle", "named")]
    assert graphs[0] == graphs[1]
    assert own.graph.levels == {}


def test_a_module_that_holds_a_lock_is_exported(tmp_path: Path) -> None:
    assert exported(seeded(Locked()), tmp_path).graph.levels["plain"].macs == 1


def test_outputs_are_chosen_by_role_and_renamed(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = PlainNet()
            load_demo_weights(self.net)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            vector = self.net.body(x)
            return {"embedding": vector, "logits": self.net.head(vector)}

    manifest = exported(Named(), tmp_path, outputs="embedding", output_name="embedding=vector")
    assert [(tensor.name, tensor.role) for tensor in manifest.outputs] == [("vector", "embedding")]
    with pytest.raises(UsageError, match="No output of your module has the role features: it gives embedding"):
        spach_deploy.export(Named(), IMAGE, precision="fp32", engine="none", outputs="features", output=tmp_path / "x")


@pytest.mark.parametrize(
    ("model", "example", "said"),
    [
        (Looping(), IMAGE, r"forward of Looping \(.*own_models.py:\d+\), or of a part of it, fixes the batch"),
        (Branching(), IMAGE, r"cannot trace the model \(Branching.forward"),
        (PlainNet(), torch.zeros(1, 5, 32, 32), "fails on an input of"),
        (PlainNet(), None, "inputs are not known"),
        ("ms_conv_xxs", IMAGE, "example_inputs are for a module of your own"),
        (3, IMAGE, "A int is no model"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(model: Any, example: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, ModelError), match=said) as caught:
        spach_deploy.export(model, example, precision="fp32", engine="none", output=tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


class TestCommand:
    def test_a_factory_with_a_checkpoint_is_exported_and_validated(self, tmp_path: Path) -> None:
        values = {f"module.{name}": value for name, value in seeded(TwoHeads()).state_dict().items()}
        torch.save({"state_dict": values}, tmp_path / "run.pth")
        given = ("--module", "tests.own_models:TwoHeads", "--checkpoint", tmp_path / "run.pth")
        done = export(*given, "--fp16", "--engine", "none", "--image-size", 32, "-o", tmp_path / "bundle")
        assert done.exit_code == 0, done.output
        assert "Ran tests.own_models:TwoHeads, which is your own code." in done.stderr
        assert "TwoHeads, 32 px, gives classes, angle" in done.stdout
        assert "blocks     4 known (62 % of the arithmetic), 8 plain (38 %), 3 unknown" in done.stdout
        assert "Not compared with answers" not in done.stdout
        assert validate(tmp_path / "bundle").exit_code == 0
        np.savez(tmp_path / "set.npz", images=pictures(3))
        assert validate(tmp_path / "bundle", "--images", tmp_path / "set.npz", *given).exit_code == 0
        assert "Give --module" in refusal(validate(tmp_path / "bundle", "--images", tmp_path / "set.npz"))
        other = validate(tmp_path / "bundle", "--images", tmp_path / "set.npz", *given[:2])
        assert "does not draw weights at random" in refusal(other)

    def test_weights_that_each_call_draws_are_noted_and_do_not_validate_the_bundle(self, tmp_path: Path) -> None:
        options = ("--fp32", "--engine", "none", "--image-size", 32, "--no-cache", "-o", tmp_path / "bundle")
        done = export("--module", "tests.own_models:PlainNet", *options)
        assert done.exit_code == 0, done.output
        assert "tests.own_models:PlainNet makes other weights each time" in done.stderr
        assert "this module has others" in refusal(
            validate(tmp_path / "bundle", "--module", "tests.own_models:PlainNet")
        )
        again = export("--module", "tests.own_models:Talking", *options, "--overwrite")
        assert again.exit_code == 0, again.output
        assert "makes other weights" not in again.stderr
        assert validate(tmp_path / "bundle", "--module", "tests.own_models:Talking").exit_code == 0

    def test_a_fault_in_its_graph_is_bisected_to_its_own_modules(self, tmp_path: Path) -> None:
        torch.save(seeded(TwoHeads()).state_dict(), tmp_path / "run.pth")
        given = ("--module", "tests.own_models:TwoHeads", "--checkpoint", tmp_path / "run.pth")
        done = export(*given, "--fp16", "--engine", "none", "--image-size", 32, "-o", tmp_path / "bundle")
        assert done.exit_code == 0, done.output
        bisect = (tmp_path / "bundle" / GRAPH, "--bisect", "--json", "--accept", "graph")
        assert "Give --module" in refusal(validate(*bisect))
        right = validate(*bisect, *given)
        assert (right.exit_code, json.loads(right.stdout)["bisect"]["suspects"]) == (0, [])
        for weight, module in (
            ("blocks.1.mix.qkv.weight", "blocks.1.mix"),
            ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.up"),
            ("classes.weight", "classes"),
        ):
            spoiled = small_bundles.copy(tmp_path / "bundle", tmp_path / module)
            graph = small_bundles.load_graph(spoiled)
            faults.perturb(graph, weight)
            small_bundles.save_graph(graph, spoiled)
            found = json.loads(validate(spoiled / GRAPH, *bisect[1:], *given).stdout)["bisect"]
            assert found["first_stage"] == "typed graph"
            assert [suspect["module"] for suspect in found["suspects"]] == [module]

    def test_what_the_module_prints_is_no_result(self, tmp_path: Path) -> None:
        given = ("--module", "tests.own_models:Talking", "--fp32", "--engine", "none", "--image-size", "32")
        words = [*given, "-o", str(tmp_path / "bundle"), "--json", "--no-cache"]
        command = [sys.executable, "-m", "spach_deploy.cli.export", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["model"]["name"] == "Talking"
        assert "made" in done.stderr
        assert "called" in done.stderr

    @pytest.mark.parametrize(
        ("factory", "said"),
        [
            (
                "RaisesLater",
                r"input of \(4, 3, 32, 32\): picky \(Picky.forward, .*own_models.py:\d+\) raises KeyError: 'four'",
            ),
            ("BadExample", r"cannot be made: OSError: no example \(.*own_models.py:\d+\)"),
            ("Inner", r"cannot trace part \(Sign.forward, .*own_models.py:\d+\): what it does depends on the values"),
            ("BatchOfFive", "of an image is another in a batch of 5 than alone"),
        ],
    )
    def test_what_goes_wrong_in_the_users_code_is_told_with_its_place(
        self, factory: str, said: str, tmp_path: Path
    ) -> None:
        given = ("--module", f"tests.own_models:{factory}", "--fp32", "--engine", "none", "--image-size", 32)
        done = export(*given, "--batch", "1:4:8", "-o", tmp_path / "bundle")
        assert done.exit_code == 2, done.output
        assert re.search(said, " ".join(done.stderr.split())), done.stderr

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--model", "ms_conv_xxs"), "--module makes the model, and --model names another"),
            (("--heads", 2), "--heads is for the models of spach-export --list"),
            (("--mean", "0.5,0.5"), "Pixel mean has 2 numbers, and the model takes images of 3 channels"),
            (("--outputs", "features"), "No output of your module has the role features"),
        ],
    )
    def test_what_does_not_fit_the_module_is_refused_by_a_dry_run_too(
        self, words: tuple[Any, ...], said: str, tmp_path: Path
    ) -> None:
        given = ("--module", "tests.own_models:PlainNet", "--fp32", "--engine", "none", "-o", tmp_path / "x")
        assert said in refusal(export(*given, *words))
        told = export(*given, *words, "--dry-run")
        assert (told.exit_code, said in told.stdout) == (2, True)

    def test_a_dry_run_runs_the_factory_and_says_so(self, tmp_path: Path) -> None:
        given = ("--module", "tests.own_models:PlainNet", "--fp32", "--engine", "none", "-o", tmp_path / "x")
        told = export(*given, "--dry-run")
        assert told.exit_code == 0, told.output
        assert "model       tests.own_models:PlainNet" in told.stdout
        assert "weights     those that your code makes" in told.stdout
        assert "Ran tests.own_models:PlainNet, which is your own code." in told.stdout
